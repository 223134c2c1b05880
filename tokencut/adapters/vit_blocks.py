"""The block types of timm's Vision Transformers, each in two halves: up to the stage, and behind it.

The halves call the block's own sub-modules, so LayerScale, drop path, norms and gates take part as timm has them.
A block class that is not known is refused by name: guessing would silently change the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import Attention, DiffAttention, Mlp
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from tokencut.adapters.base import Context, fused_attention_macs, linear_macs
from tokencut.adapters.subclasses import known_class, why_unknown
from tokencut.attention import (
    QueryKey,
    TimmModule,
    differential_attention,
    differential_core,
    mixed_values,
    self_attention,
)
from tokencut.calling import call, has_hooks, is_bare, parts_of, through
from tokencut.cost import BlockCost, Macs
from tokencut.errors import ModelError

Layers = tuple[tuple[QueryKey, ...], ...]
AttentionRun = Callable[[TimmModule, Tensor, Context], tuple[Tensor, tuple[QueryKey, ...]]]


class BlockHandler:
    """A pre-norm block (`Block`), and what other block types have in common with it.

    Attributes:
        attention_runs: How an attention layer of each class is run by its parts, so that queries and keys are kept.
    """

    attention_runs: ClassVar[Mapping[type[nn.Module], AttentionRun]] = {
        Attention: lambda layer, x, context: self_attention(layer, x, context.bias),
        DiffAttention: lambda layer, x, context: differential_attention(layer, x, context.bias),
    }

    def check(self, block: TimmModule) -> None:
        """Raises ModelError where the block's attention is of an unknown class."""
        for layer in self.attentions(block):
            if known_class(layer, self.attention_runs) is None:
                why = (
                    why_unknown(layer, self.attention_runs)
                    or f"the attention layer {type(layer).__name__} is not known"
                )
                raise ModelError(f"{why}: no stage can stand behind it; build the model with timm's own, "
                                 "or report its name")  # fmt: skip

    def attentions(self, block: TimmModule) -> list[TimmModule]:
        """The block's attention layers."""
        return [block.attn]

    def attend(self, layer: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, tuple[QueryKey, ...]]:
        """Runs an attention layer on normed features by its parts, with what is hooked to it and wrapped around it.

        Returns:
            Its output, `(B, P + N, D)`, and its maps.
        """
        kind = known_class(layer, self.attention_runs)
        assert kind is not None  # `check` has refused others
        if is_bare(layer):
            return self.attention_runs[kind](layer, x, context)
        maps: tuple[QueryKey, ...] = ()

        def forward(x: Tensor, **given: Any) -> Tensor:
            nonlocal maps
            y, maps = self.attention_runs[kind](layer, x, context.given(**given))
            return y

        y: Tensor = call(layer, forward, x, **context.attention_arguments())
        return y, maps

    def attention_half(self, block: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, Layers]:
        """Up to the stage: features `(B, P + N, D)` after the attention residual, and the attention's heads."""
        parts = parts_of(block)
        y, maps = self.attend(parts["attn"], through(parts["norm1"], x), context)
        return x + through(parts["drop_path1"], through(parts["ls1"], y)), (maps,)

    def passes_hooks_by(self, block: TimmModule) -> bool:
        """Whether timm's block, under a mask, leaves out hooks that it runs without one."""
        return False

    def is_bare(self, block: TimmModule) -> bool:
        """Whether the two halves are all that calling the block does: its attention is known and fused, and nothing is
        around either.
        """
        layers = self.attentions(block)
        for part in (block, *layers):
            if not is_bare(part) or not vars(part).get("fused_attn", True):
                return False
        return None not in [known_class(layer, self.attention_runs) for layer in layers]

    def mlp_half(self, block: TimmModule, x: Tensor) -> Tensor:
        """Behind the stage, `(B, P + M, D)` to the same."""
        parts = parts_of(block)
        y = feed_forward(parts["mlp"], through(parts["norm2"], x))
        return x + through(parts["drop_path2"], through(parts["ls2"], y))

    def pre_mlp_norm(self, block: TimmModule, x: Tensor) -> Tensor:
        """Features as the second half's norm gives them."""
        return block.norm2(x)

    def cost(self, block: TimmModule, class_rows: int) -> BlockCost:
        """The block's multiply-adds, with `class_rows` class rows computed for a stage."""
        layers = self.attentions(block)
        before = sum((self.layer_macs(layer) for layer in layers), Macs())
        rows = sum(self.projection(layer).in_features for layer in layers) * class_rows
        after, width = Macs(per_token=self.mlp_macs(block)), self.projection(layers[0]).out_features
        key_width = self.projection(layers[0]).in_features // layers[0].num_heads
        if isinstance(layers[0], DiffAttention):  # its heads stand in pairs
            key_width //= 2
        return BlockCost(before, after, Macs(per_token=rows), width, key_width)

    def projection(self, layer: TimmModule) -> TimmModule:
        """What an attention layer's mixed values go through last, a linear layer."""
        return layer.proj

    def layer_macs(self, layer: TimmModule) -> Macs:
        """Projections and fused attention of one attention layer."""
        width = self.projection(layer).in_features
        mixing = _differential_macs(width) if isinstance(layer, DiffAttention) else fused_attention_macs(width, width)
        return Macs(per_token=linear_macs(layer)) + mixing

    def mlp_macs(self, block: TimmModule) -> int:
        """Multiply-adds per token behind the stage."""
        return linear_macs(block.mlp)


class ResPostBlockHandler(BlockHandler):
    """`ResPostBlock`: the norms stand behind attention and MLP."""

    def attention_half(self, block: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, Layers]:
        y, maps = self.attend(block.attn, x, context)
        return x + block.drop_path1(block.norm1(y)), (maps,)

    def mlp_half(self, block: TimmModule, x: Tensor) -> Tensor:
        return x + block.drop_path2(block.norm2(block.mlp(x)))

    def pre_mlp_norm(self, block: TimmModule, x: Tensor) -> Tensor:
        return x


class ParallelThingsHandler(BlockHandler):
    """`ParallelThingsBlock` (arXiv 2203.09795): several attentions side by side, then several MLPs."""

    def attentions(self, block: TimmModule) -> list[TimmModule]:
        return [branch.attn for branch in block.attns]

    def attention_half(self, block: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, Layers]:
        layers: list[tuple[QueryKey, ...]] = []

        def run(branch: TimmModule, x: Tensor) -> Tensor:
            y, maps = self.attend(branch.attn, branch.norm(x), context)
            layers.append(maps)
            return branch.drop_path(branch.ls(y))

        outputs = [call(branch, partial(run, branch), x) for branch in block.attns]
        return x + torch.stack(outputs).sum(dim=0), tuple(layers)

    def passes_hooks_by(self, block: TimmModule) -> bool:
        return any(has_hooks(branch) for branch in block.attns)

    def mlp_half(self, block: TimmModule, x: Tensor) -> Tensor:
        return x + torch.stack([branch(x) for branch in block.ffns]).sum(dim=0)

    def pre_mlp_norm(self, block: TimmModule, x: Tensor) -> Tensor:
        return block.ffns[0].norm(x)

    def mlp_macs(self, block: TimmModule) -> int:
        return sum(linear_macs(branch.mlp) for branch in block.ffns)


class ParallelScalingHandler(BlockHandler):
    """`ParallelScalingBlock` (arXiv 2302.05442): attention and MLP side by side, so the stage follows the block."""

    def attentions(self, block: TimmModule) -> list[TimmModule]:
        return []

    def attention_half(self, block: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, Layers]:
        hidden, *qkv = torch.split(block.in_proj(block.in_norm(x)), block.in_split, dim=-1)
        if block.mlp_bias is not None:
            hidden = hidden + block.mlp_bias
        y, maps = self.mix(block, tuple(qkv), context.bias)
        hidden = block.mlp_drop(block.mlp_act(hidden))
        if block.out_proj is not None:
            y = block.out_proj(torch.cat((y, hidden), dim=-1))
        else:
            y = block.attn_out_proj(y) + block.mlp_out_proj(hidden)
        return x + block.drop_path(block.ls(y)), (maps,)

    def mix(
        self, block: TimmModule, qkv: tuple[Tensor, ...], bias: Tensor | None
    ) -> tuple[Tensor, tuple[QueryKey, ...]]:
        """The attention inside the block: query, key, value `(B, P + N, D)` to its output before the projection."""
        query, key, value = (t.unflatten(2, (block.num_heads, -1)).transpose(1, 2) for t in qkv)
        query, key = block.q_norm(query), block.k_norm(key)
        y = mixed_values(block, query, key, value, bias)
        return y.transpose(1, 2).flatten(2), (QueryKey(query, key),)

    def mlp_half(self, block: TimmModule, x: Tensor) -> Tensor:
        return x

    def pre_mlp_norm(self, block: TimmModule, x: Tensor) -> Tensor:
        return x

    def cost(self, block: TimmModule, class_rows: int) -> BlockCost:
        values = block.in_split[-1]
        before = Macs(per_token=linear_macs(block)) + self.attention_macs(values)
        width = block.in_proj.in_features
        return BlockCost(before, Macs(), Macs(per_token=values * class_rows), width, block.head_dim)

    def attention_macs(self, width: int) -> Macs:
        """QK' and PV of the block's attention, `D = width` numbers a token."""
        return fused_attention_macs(width, width)


class DiffParallelScalingHandler(ParallelScalingHandler):
    """`DiffParallelScalingBlock`: the same with differential attention (arXiv 2410.05258)."""

    def mix(
        self, block: TimmModule, qkv: tuple[Tensor, ...], bias: Tensor | None
    ) -> tuple[Tensor, tuple[QueryKey, ...]]:
        return differential_core(block, qkv, bias)

    def attention_macs(self, width: int) -> Macs:
        return _differential_macs(width)


def _differential_macs(width: int) -> Macs:
    """Two maps over half of the query width each, both over the whole value width."""
    return fused_attention_macs(width // 2, width) + fused_attention_macs(width // 2, width)


_MLP_PARTS = ("fc1", "act", "drop1", "norm", "fc2", "drop2")


def feed_forward(layer: TimmModule, x: Tensor) -> Tensor:
    """Runs the MLP of a block, `(B, N, D)` to the same: timm's `Mlp` by its own sub-modules, without those that do
    nothing; any other, or with something hooked to it, wrapped around it or compiled, as it is.
    """
    parts = layer._modules
    if type(layer) is not Mlp or tuple(parts) != _MLP_PARTS or not is_bare(layer) or torch.compiler.is_compiling():
        whole: Tensor = layer(x)
        return whole
    for name in _MLP_PARTS:
        x = through(parts[name], x)
    return x


HANDLERS: Mapping[type[nn.Module], BlockHandler] = {
    timm_vit.Block: BlockHandler(),
    timm_vit.ResPostBlock: ResPostBlockHandler(),
    timm_vit.ParallelThingsBlock: ParallelThingsHandler(),
    timm_vit.ParallelScalingBlock: ParallelScalingHandler(),
    timm_vit.DiffParallelScalingBlock: DiffParallelScalingHandler(),
}
