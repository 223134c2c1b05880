"""Hiera (arXiv 2306.00989) by timm's `hiera`: ordinary stages among the blocks that attend globally on one grid."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokencut.adapters.base import (
    BareContext,
    Context,
    counted_macs,
    fused_attention_macs,
    linear_macs,
    register_adapter,
)
from tokencut.adapters.columnar import ColumnarAdapter
from tokencut.adapters.hierarchy import Run, tokens_reached
from tokencut.adapters.vit_blocks import BlockHandler
from tokencut.attention import QueryKey, TimmModule, fused_attention
from tokencut.calling import StandIn, unwrapped
from tokencut.cost import BlockCost, Macs, ModelCost
from tokencut.errors import ModelError, UsageError
from tokencut.ops.exporting import exporting
from tokencut.schedule import Keep, Schedule, default_layers, make_schedule
from tokencut.schedule import Layers as LayersTyped
from tokencut.tokens import Tokens
from tokencut.unmerging import Unmerging


def _global_attention(layer: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, tuple[QueryKey, ...]]:
    """Runs a `MaskUnitAttention` without mask units and pooling by its own sub-modules."""
    batch, count, _ = x.shape
    qkv = layer.qkv(x).reshape(batch, count, 3, layer.heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = (part.contiguous() for part in qkv.unbind(0))  # as timm: flash attention asks for it
    y = fused_attention(query, key, value, context.bias)
    return layer.proj(y.transpose(1, 2).reshape(batch, count, -1)), (QueryKey(query, key),)


class HieraBlockHandler(BlockHandler):
    """`HieraBlock` that attends globally and pools nothing: pre-norm, LayerScale or none."""

    attention_runs = {MaskUnitAttention: _global_attention}

    def cost(self, block: TimmModule, class_rows: int) -> BlockCost:
        width, layer = block.dim_out, _layer(block)
        before = Macs(per_token=linear_macs(block.attn)) + fused_attention_macs(width, width)
        after = Macs(per_token=linear_macs(block.mlp))
        return BlockCost(before, after, Macs(per_token=width * class_rows), width, layer.head_dim)


@register_adapter
class HieraAdapter(ColumnarAdapter):
    """The blocks of the longest run of those that attend globally on one grid may reduce: in all of timm's names the
    third stage's behind its first, which pools. All else is timm's own forward, run with other code for those blocks.
    Behind them patches have their features back, with what their token has changed by: the next stage pools squares.
    """

    family = "Hiera"
    timm_modules = ("hiera",)
    classes = (Hiera,)
    handlers = {HieraBlock: HieraBlockHandler()}
    runs_inside = True

    def check(self, model: TimmModule) -> None:
        for block in model.blocks:
            self.handler(block).check(block)
        start, stop = self._run_of_plain(model)
        if start == stop:
            raise ModelError("no block of this Hiera attends to all tokens of one grid, and in windows there are none "
                             "to spare; build it with such as mask_unit_attn=(True, True, False, False)")  # fmt: skip
        super().check(model)

    def check_method(self, method: Any) -> None:
        super().check_method(method)
        if method.needs_training:
            raise UsageError(f"method {method.name} hides tokens while it trains, and {self.family}'s next stage pools "
                             f"them all; type another, such as `method={self.default_method!r}`")  # fmt: skip

    def schedule(
        self, model: TimmModule, keep: Keep | None, layers: LayersTyped | None, reduce_by: int | None
    ) -> Schedule:
        depth = len(self.blocks(model))
        outside = [] if layers is None or isinstance(layers, str) else [n for n in layers if not 1 <= n <= depth]
        if outside:
            start, stop = self._run_of_plain(model)
            raise UsageError(
                f"layer {outside[0]} cannot reduce: layers 1 to {depth} are the blocks {start + 1} to {stop} of this "
                f"{self.family}, which attend to all tokens of one grid; those before attend in windows or pool them, "
                f"and the next pools squares of them; type such as `layers={list(default_layers(depth))}`"
            )
        return make_schedule(depth, keep, layers, reduce_by)

    def _run_of_plain(self, model: TimmModule) -> tuple[int, int]:
        """The blocks that may reduce, from the first to before the last, counted from 0."""
        best = start = stop = 0
        for number, block in enumerate(model.blocks):
            layer = _layer(block)
            if layer.use_mask_unit_attn or layer.q_stride > 1 or block.do_expand:
                best = number + 1
            elif number + 1 - best > stop - start:
                start, stop = best, number + 1
        return start, stop

    def blocks(self, model: TimmModule) -> nn.ModuleList | nn.Sequential:
        start, stop = self._run_of_plain(model)
        found: nn.ModuleList = model.blocks[start:stop]
        return found

    def feature_maps(self, model: TimmModule) -> int:
        return sum(end < len(model.blocks) for end in model.stage_ends)

    def num_prefix_tokens(self, model: TimmModule) -> int:
        return 0

    def _unrolling(self, model: TimmModule) -> tuple[Sequence[Sequence[int]], tuple[int, int]]:
        """In the blocks that may reduce: the strides by which timm has tokens in order, and rows and columns."""
        schedule, size = model.reroll.schedule[self._run_of_plain(model)[0]]
        return schedule, (size[0], size[1])

    def grid(self, model: TimmModule, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.patch_size(model)
        return height // rows, width // columns

    def input_size(self, model: TimmModule) -> tuple[int, int] | None:
        rows, columns = model.tokens_spatial_shape
        return rows * model.patch_stride[0], columns * model.patch_stride[1]

    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        (rows, columns), (_, left) = model.tokens_spatial_shape, self._unrolling(model)
        return model.patch_stride[0] * rows // left[0], model.patch_stride[1] * columns // left[1]

    def classifier(self, model: TimmModule) -> nn.Module:
        classifier: nn.Module = model.head.fc
        return classifier

    def follows_patches(self, model: TimmModule) -> bool:
        return True

    def inside(self, model: TimmModule, run: Run) -> StandIn:
        start, stop = self._run_of_plain(model)
        schedule, grid = self._unrolling(model)

        def reducible(x: Tensor) -> Tensor:
            # Pictures and maps have tokens in rows; where patch dropout has left some out there are none.
            whole = x.shape[1] == math.prod(grid)
            tokens = run(Tokens(model.reroll(x, start).flatten(1, 2) if whole else x, 0))
            return unrolled(tokens.image, grid, schedule) if whole else tokens.image

        before, behind = (
            [self._as_timm(model, block) for block in part] for part in (model.blocks[:start], model.blocks[stop:])
        )
        # timm counts blocks to know where its stages end.
        around = [*before, reducible, *[_unchanged] * (stop - start - 1), *behind]
        return StandIn(model, blocks=around, grad_checkpointing=False)

    def _as_timm(self, model: TimmModule, block: TimmModule) -> Callable[[Tensor], Tensor]:
        """A block that never reduces; activations are computed again in backward where timm would."""
        called: Callable[[Tensor], Tensor] = block
        if exporting() and _layer(block).use_mask_unit_attn:
            # Its attention has five dimensions, for which torch's exporter to ONNX (2.14) has no fused one.
            called = StandIn(block, attn=StandIn(block.attn, fused_attn=False))
        return partial(checkpoint, called, use_reentrant=False) if self.recomputes(model) else called

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        return tokens_reached(partial(self.inside, model), images)

    def head(self, model: TimmModule, tokens: Tokens) -> Tensor:
        """All that follows the blocks that may reduce: logits `(B, classes)`."""
        schedule, grid = self._unrolling(model)
        _, stop = self._run_of_plain(model)
        x = unrolled(tokens.image, grid, schedule)
        for block in model.blocks[stop:]:
            x = block(x)
        logits: Tensor = model.forward_head(x)
        return logits

    def context(self, model: TimmModule, number: int, tokens: Tokens) -> Context:
        return BareContext(tokens.bias)

    def needs_halves(self, block: TimmModule, features: Tensor, context: Context) -> bool:
        return context.bias is not None

    def reduced(self, model: TimmModule, entering: Tokens, leaving: Tokens, similar: bool) -> Tokens:
        unmerging = Unmerging("change", similar) if entering.shared is None else copy.copy(entering.shared)
        unmerging.stage(entering, leaving)
        return replace(leaving, shared=unmerging)

    def leaving(self, model: TimmModule, tokens: Tokens) -> Tokens:
        if tokens.shared is None:
            return tokens
        return replace(tokens, features=tokens.shared.patches(tokens), sizes=None, bias=None, shared=None)

    def final_norm(self, model: TimmModule, features: Tensor) -> Tensor:
        return features  # it stands behind the pooling

    def forward_head(self, model: TimmModule, tokens: Tokens, pre_logits: bool = False) -> Tensor:
        logits: Tensor = model.forward_head(tokens.features, pre_logits=pre_logits)
        return logits

    def pools_by_size(self, model: TimmModule) -> bool:
        return False

    def cost(self, model: TimmModule) -> ModelCost:
        start, stop = self._run_of_plain(model)
        tokens, costs, size = math.prod(model.tokens_spatial_shape), list[int](), self.input_size(model)
        for block in model.blocks:
            costs.append(_macs(block, tokens))
            tokens //= _layer(block).q_stride
        assert size is not None
        return ModelCost(
            embed=counted_macs(model.patch_embed, (model.in_chans, *size)) + sum(costs[:start]),
            blocks=tuple(self.handler(block).cost(block, 1) for block in self.blocks(model)),
            head=Macs(fixed=sum(costs[stop:]) + linear_macs(model.head)),
            num_prefix_tokens=0,
            patches=self.patches(model),
            head_prefix_tokens=0,
        )


def _layer(block: TimmModule) -> TimmModule:
    """A block's attention, out of what is around it."""
    layer: TimmModule = unwrapped(block.attn)
    return layer


def _unchanged(x: Tensor) -> Tensor:
    return x


def unrolled(x: Tensor, grid: tuple[int, int], schedule: Sequence[Sequence[int]]) -> Tensor:
    """Tokens in rows, `(B, N, D)`, in the order in which timm pools them, as its `Unroll` puts them."""
    batch, count, width = x.shape
    rows, columns = grid
    for down, across in schedule:
        rows, columns = rows // down, columns // across
        x = x.reshape(-1, rows, down, columns, across, width).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, count, width)


def _macs(block: TimmModule, tokens: int) -> int:
    """Multiply-adds of a whole block for so many tokens entering."""
    layer = _layer(block)
    queries = tokens // layer.q_stride
    keys = layer.window_size * layer.q_stride if layer.use_mask_unit_attn else tokens
    attention = linear_macs(layer.qkv) * tokens + linear_macs(layer.proj) * queries + 2 * layer.dim_out * queries * keys
    widening = linear_macs(block.proj) * tokens if block.proj is not None else 0
    return attention + widening + linear_macs(block.mlp) * queries
