"""Every architecture that timm builds of its class `Cait`: talking heads, then a class token that looks on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.cait import Cait, ClassAttn, LayerScaleBlock, LayerScaleBlockClassAttn, TalkingHeadAttn
from torch import Tensor

from tokencut.adapters.base import BareContext, Context, linear_macs, register_adapter
from tokencut.adapters.columnar import ColumnarAdapter, patches
from tokencut.adapters.subclasses import known_class
from tokencut.adapters.vit_blocks import BlockHandler, Layers
from tokencut.attention import AttentionInfo, QueryKey, TimmModule, mixed_values
from tokencut.calling import call
from tokencut.cost import BlockCost, Macs, ModelCost
from tokencut.errors import ModelError
from tokencut.tokens import Tokens, full_precision


def _talking(layer: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, tuple[QueryKey, ...]]:
    """Runs `TalkingHeadAttn` (arXiv 2003.02436) by its own sub-modules, as timm does: heads are mixed before and behind
    the softmax, so the weights are needed.
    """
    query, key, value = (p.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for p in layer.qkv(x).chunk(3, dim=2))
    logits = (query * layer.scale) @ key.transpose(-2, -1)
    logits = layer.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if context.bias is not None:
        logits = logits + context.bias
    weights = layer.proj_w(logits.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if context.bias is not None and layer.proj_w.bias is not None:
        # What the mixture adds to every weight, it adds for each patch that a token holds.
        weights = weights + layer.proj_w.bias.view(1, -1, 1, 1) * (context.bias.exp() - 1)
    y = (layer.attn_drop(weights) @ value).transpose(1, 2).flatten(2)
    return layer.proj_drop(layer.proj(y)), (QueryKey(query, key),)


@dataclass(frozen=True)
class TalkingAttentionInfo(AttentionInfo):
    """`AttentionInfo` of talking heads.

    Attributes:
        mix: What mixes the heads' logits, `(..., H)` to the same.
    """

    mix: Any = None

    def class_attention(self) -> Tensor:
        """What the mean query attends to, by the mixed logits of all heads, fp32 `(B, N)`."""
        ((heads,),) = self.layers
        query = heads.query.float().mean(2, keepdim=True)
        with full_precision(query.device):
            logits = torch.matmul(query * query.shape[-1] ** -0.5, heads.key.float().transpose(-2, -1))
            logits = F.linear(logits.movedim(1, -1), self.mix.weight.float(), _float(self.mix.bias)).movedim(-1, 1)
        if self.bias is not None:
            logits = logits + self.bias.float()
        return logits.softmax(-1).mean((1, 2))


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


class CaitBlockHandler(BlockHandler):
    """`LayerScaleBlock`: pre-norm, LayerScale as two parameters, one drop path for both halves."""

    attention_runs = {TalkingHeadAttn: _talking}

    def attention_half(self, block: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, Layers]:
        y, maps = self.attend(block.attn, block.norm1(x), context)
        return x + block.drop_path(block.gamma_1 * y), (maps,)

    def mlp_half(self, block: TimmModule, x: Tensor) -> Tensor:
        return x + block.drop_path(block.gamma_2 * block.mlp(block.norm2(x)))

    def layer_macs(self, layer: TimmModule) -> Macs:
        pairs = linear_macs(layer.proj_l) + linear_macs(layer.proj_w)
        return super().layer_macs(layer) + Macs(per_token=-pairs, per_pair=pairs)

    def cost(self, block: TimmModule, class_rows: int) -> BlockCost:
        cost = super().cost(block, class_rows)
        return replace(cost, class_row=cost.class_row + Macs(per_token=linear_macs(block.attn.proj_l)))


@register_adapter
class CaitAdapter(ColumnarAdapter):
    """Blocks without a class token, then class-attention layers, which see how many patches a token holds."""

    family = "CaiT"
    timm_modules = ("cait",)
    classes = (Cait,)
    handlers = {LayerScaleBlock: CaitBlockHandler()}

    def check(self, model: TimmModule) -> None:
        super().check(model)
        for block in model.blocks_token_only or ():
            if known_class(block, (LayerScaleBlockClassAttn,)) is None or known_class(block.attn, (ClassAttn,)) is None:
                raise ModelError(f"the class-attention layer {type(block).__name__} is not known to tokencut; "
                                 "build the model with timm's own, or report its name")  # fmt: skip

    def attention_note(self, model: TimmModule) -> str | None:
        return ("attention holds the weights of all pairs of tokens in memory, since heads are mixed behind the "
                "softmax, in timm's own model too")  # fmt: skip

    def class_rows(self, model: TimmModule) -> tuple[int, ...]:
        return ()

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        return Tokens(model.pos_drop(patches(model.patch_embed, images) + model.pos_embed), 0)

    def context(self, model: TimmModule, number: int, tokens: Tokens) -> Context:
        return BareContext(tokens.bias)

    def needs_halves(self, block: TimmModule, features: Tensor, context: Context) -> bool:
        return context.bias is not None

    def attention_half(
        self, model: TimmModule, block: TimmModule, tokens: Tokens, context: Context
    ) -> tuple[Tokens, AttentionInfo]:
        half, info = super().attention_half(model, block, tokens, context)
        return half, TalkingAttentionInfo(info.layers, 0, (), info.bias, mix=block.attn.proj_l)

    def leaving(self, model: TimmModule, tokens: Tokens) -> Tokens:
        if model.blocks_token_only is None or tokens.num_prefix_tokens:
            return tokens
        x, bias = tokens.features, tokens.bias
        if bias is None:
            return replace(tokens, features=model.forward_cls(x), num_prefix_tokens=1)
        bias = F.pad(bias, (1, 0))
        seen = model.cls_token.expand(x.shape[0], -1, -1)
        for block in model.blocks_token_only:
            seen = call(block, partial(_class_layer, block, bias), x, seen)
        return replace(tokens, features=torch.cat((seen, x), 1), num_prefix_tokens=1, bias=bias)

    def cost(self, model: TimmModule) -> ModelCost:
        cost, width = super().cost(model), model.embed_dim
        once = per_token = 0
        for block in model.blocks_token_only or ():
            once += linear_macs(block.attn.q) + linear_macs(block.attn.proj) + linear_macs(block.mlp)
            per_token += linear_macs(block.attn.k) + linear_macs(block.attn.v) + 2 * width
        return replace(
            cost, head=cost.head + Macs(fixed=once, per_token=per_token), num_prefix_tokens=0, head_prefix_tokens=1
        )


def _class_layer(block: TimmModule, bias: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """A class-attention layer by its own sub-modules, with a bias for each token, `(B, 1, 1, 1 + N)`."""
    normed = block.norm1(torch.cat((seen, x), dim=1))
    y = call(block.attn, partial(_class_attention, block.attn, bias), normed)
    seen = seen + block.drop_path(block.gamma_1 * y)
    return seen + block.drop_path(block.gamma_2 * block.mlp(block.norm2(seen)))


def _class_attention(layer: TimmModule, bias: Tensor, x: Tensor) -> Tensor:
    query, key, value = (
        part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for part in (layer.q(x[:, :1]), layer.k(x), layer.v(x))
    )
    y = mixed_values(layer, query, key, value, bias)
    return layer.proj_drop(layer.proj(y.transpose(1, 2).flatten(2)))
