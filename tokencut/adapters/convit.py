"""Every architecture that timm builds of its class `ConVit`: attention by content and by position, mixed by gates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from timm.models.convit import GPSA, MHSA, Block, ConVit
from torch import Tensor

from tokencut.adapters.base import BareContext, Context, linear_macs, register_adapter
from tokencut.adapters.columnar import patches
from tokencut.adapters.positions import PositionedAdapter, grid_positions
from tokencut.adapters.vit_blocks import BlockHandler, Layers
from tokencut.attention import QueryKey, TimmModule, mixed_values
from tokencut.cost import BlockCost, Macs, ModelCost
from tokencut.errors import ModelError
from tokencut.tokens import Tokens


@dataclass(frozen=True)
class OffsetContext(BareContext):
    """`Context` of a block that takes no arguments beside features, and what it makes of positions by itself.

    Attributes:
        offsets: Of each pair of tokens the columns and rows from query to key and the square of their distance,
            `(B, N, N, 3)`; None while tokens are patches, for which timm makes them.
    """

    offsets: Tensor | None = None


def _positional(layer: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, tuple[QueryKey, ...]]:
    """Runs `GPSA` by its own sub-modules, as timm does: its weights are a mixture of two softmaxes.

    Class attention is read off the one by content.
    """
    assert isinstance(context, OffsetContext)
    query, key = (p.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for p in layer.qk(x).chunk(2, dim=2))
    value = layer.v(x).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
    offsets = layer.get_rel_indices(x.shape[1]) if context.offsets is None else context.offsets
    place = layer.pos_proj(offsets.to(x.dtype)).permute(0, 3, 1, 2)
    content = (query @ key.transpose(-2, -1)) * layer.scale
    if context.bias is not None:  # a token counts in both as often as it holds patches
        content, place = content + context.bias, place + context.bias
    gate = layer.gating_param.view(1, -1, 1, 1).sigmoid()
    weights = (1.0 - gate) * content.softmax(dim=-1) + gate * place.softmax(dim=-1)
    weights = layer.attn_drop(weights / weights.sum(dim=-1, keepdim=True))
    y = (weights @ value).transpose(1, 2).flatten(2)
    return layer.proj_drop(layer.proj(y)), (QueryKey(query, key),)


def _plain(layer: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, tuple[QueryKey, ...]]:
    """Runs `MHSA` by its own sub-modules."""
    query, key, value = (p.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for p in layer.qkv(x).chunk(3, dim=2))
    y = mixed_values(layer, query, key, value, context.bias)
    return layer.proj_drop(layer.proj(y.transpose(1, 2).flatten(2))), (QueryKey(query, key),)


class ConVitBlockHandler(BlockHandler):
    """`Block` of ConViT: pre-norm, one drop path for both halves."""

    attention_runs = {GPSA: _positional, MHSA: _plain}

    def attention_half(self, block: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, Layers]:
        y, maps = self.attend(block.attn, block.norm1(x), context)
        return x + block.drop_path(y), (maps,)

    def mlp_half(self, block: TimmModule, x: Tensor) -> Tensor:
        return x + block.drop_path(block.mlp(block.norm2(x)))

    def layer_macs(self, layer: TimmModule) -> Macs:
        pairs = linear_macs(layer.pos_proj) if isinstance(layer, GPSA) else 0
        return super().layer_macs(layer) + Macs(per_token=-pairs, per_pair=pairs)


@register_adapter
class ConVitAdapter(PositionedAdapter):
    """Blocks that attend by content and by position, then blocks of plain attention, which a class token joins."""

    family = "ConViT"
    timm_modules = ("convit",)
    classes = (ConVit,)
    handlers = {Block: ConVitBlockHandler()}

    def check(self, model: TimmModule) -> None:
        super().check(model)
        rows, columns = model.patch_embed.grid_size
        if rows != columns:  # timm takes the root of the number of patches for both
            raise ModelError(f"ConViT knows square grids of patches only, and this is {rows} x {columns}; "
                             "give `img_size` one number")  # fmt: skip

    def attention_note(self, model: TimmModule) -> str | None:
        return ("attention holds the weights of all pairs of tokens in memory, since two softmaxes are mixed, in "
                "timm's own model too")  # fmt: skip

    def class_rows(self, model: TimmModule) -> tuple[int, ...]:
        return (0,)

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        x = patches(model.patch_embed, images)
        if model.use_pos_embed:
            x = x + model.pos_embed
        tokens = self.located(model, model.pos_drop(x), self.grid(model, *images.shape[-2:]))
        return replace(tokens, num_prefix_tokens=0)

    def entering(self, model: TimmModule, number: int, tokens: Tokens) -> Tokens:
        if number <= model.local_up_to_layer or tokens.num_prefix_tokens or model.cls_token is None:
            return tokens
        x = torch.cat((model.cls_token.expand(tokens.features.shape[0], -1, -1), tokens.features), 1)
        bias = None if tokens.bias is None else F.pad(tokens.bias, (1, 0))
        return replace(tokens, features=x, num_prefix_tokens=1, bias=bias)

    def prepare(self, model: TimmModule, tokens: Tokens) -> Tokens:
        if tokens.positions is None:
            return tokens
        shares, grid = self.shares(tokens), tokens.grid
        assert grid is not None
        if shares is None:
            return replace(tokens, shared=_offsets(self.places(tokens)))
        whole = _offsets(grid_positions(grid, shares.device).unsqueeze(0)).permute(0, 3, 1, 2)
        average = shares.unsqueeze(1) @ whole @ shares.unsqueeze(1).transpose(2, 3)
        return replace(tokens, shared=average.permute(0, 2, 3, 1))

    def context(self, model: TimmModule, number: int, tokens: Tokens) -> Context:
        return OffsetContext(tokens.bias, tokens.shared)

    def needs_halves(self, block: TimmModule, features: Tensor, context: Context) -> bool:
        assert isinstance(context, OffsetContext)
        return context.bias is not None or (context.offsets is not None and block.use_gpsa)

    def cost(self, model: TimmModule) -> ModelCost:
        cost = super().cost(model)
        local = model.local_up_to_layer
        blocks = (*cost.blocks[:local], *(_with_one_more(block) for block in cost.blocks[local:]))
        return replace(cost, blocks=blocks, num_prefix_tokens=0)


def _offsets(positions: Tensor) -> Tensor:
    """Columns, rows and squared distance from each token to each, `(B, N, N, 3)`, as `GPSA.get_rel_indices`."""
    rows, columns = (line.unsqueeze(1) - line.unsqueeze(2) for line in positions.unbind(-1))
    return torch.stack((columns, rows, rows.square() + columns.square()), -1)


def _with_one_more(block: BlockCost) -> BlockCost:
    """A block's cost at one token more than it is asked for: the class token."""
    before, after, row = (
        Macs(
            macs.fixed + macs.per_token + macs.per_pair,
            macs.per_token + 2 * macs.per_pair,
            macs.per_pair,
        )
        for macs in (block.before, block.after, block.class_row)
    )
    return replace(block, before=before, after=after, class_row=row)
