"""Every architecture that timm builds of its class `PyramidVisionTransformerV2`: no positions, convolutions instead."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models.pvt_v2 import Block, PyramidVisionTransformerV2
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from tokencut.adapters.base import linear_macs, register_adapter
from tokencut.adapters.columnar import described_size
from tokencut.adapters.hierarchy import STAGE, HierarchicalAdapter, Run
from tokencut.attention import TimmModule, fused_attention
from tokencut.calling import StandIn, call, unwrapped
from tokencut.errors import ModelError
from tokencut.ops.grid_clusters import Windows
from tokencut.ops.grouping import GridGroups
from tokencut.tokens import Tokens, group_means

# Tokens are clustered in windows of about so many rows and columns, four of them at 224 px: in one the products of
# clustering took four times as much, 5 % of a b3, and no cluster reaches far.
WINDOW, LEAST, LARGEST = 7, 4, 16
# With fewer blocks in the third stage next to nothing is saved: b0 and b1 have 2, b2 has 6.
FEWEST = 4
# Where tokens are grouped, attention asks once for each square of so many tokens a side, by the mean of these: what
# is answered, by keys and values that stand for several tokens each, differs little from place to place.
QUERY_CELL = 4


@register_adapter
class PvtAdapter(HierarchicalAdapter):
    """Blocks that are told rows and columns and see their tokens as a picture, by depth-wise convolutions and by one
    with a stride that makes fewer keys and values: they run as they are on any regular grid that its stride divides.
    """

    family = "PVT v2"
    timm_modules = ("pvt_v2",)
    classes = (PyramidVisionTransformerV2,)
    block_classes = (Block,)
    stages_name = "stages"

    def check(self, model: TimmModule) -> None:
        super().check(model)
        if not len(self.blocks(model)):
            raise ModelError(f"the model has {len(self.stages(model))} stages with blocks, and it is the third that is "
                             "reduced; build one with more stages")  # fmt: skip

    def keep_note(self, model: TimmModule, keep: float, method: Any) -> str | None:
        told, depth = super().keep_note(model, keep, method), len(self.blocks(model))
        if told is None or depth >= FEWEST:
            return told
        return f"{told}; with {depth} blocks in the third stage that saves next to nothing, take pvt_v2_b2 or larger"

    def input_size(self, model: TimmModule) -> tuple[int, int] | None:
        return described_size(model)

    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        down, across = _convolution(model.patch_embed.proj).stride
        return int(down) << STAGE, int(across) << STAGE

    def stage_grid(self, model: TimmModule, stage: int, height: int, width: int) -> tuple[int, int]:
        stages: Any = self.stages(model)
        for part in (model.patch_embed, *(stages[number].downsample for number in range(1, stage + 1))):
            conv = _convolution(part.proj)
            height, width = (
                (size + 2 * padding - kernel) // stride + 1
                for size, padding, kernel, stride in zip(
                    (height, width), conv.padding, conv.kernel_size, conv.stride, strict=True
                )
            )
        return int(height), int(width)

    def classifier(self, model: TimmModule) -> nn.Module:
        classifier: nn.Module = model.head
        return classifier

    def windows(self, model: TimmModule, rows: int, columns: int) -> Windows:
        stride = max((_stride(block) for block in self.blocks(model)), default=1)
        return Windows(rows, columns, _side(rows, stride), _side(columns, stride))

    def width(self, block: TimmModule) -> int:
        layer: TimmModule = unwrapped(block.attn)
        return int(layer.dim)

    def stood_in_for(self, block: TimmModule) -> list[nn.Module]:
        return []  # a block runs as it is, whatever its forward

    def all_blocks(self, model: TimmModule, run: Run) -> object:
        def blocks(x: Tensor, grid: tuple[int, int]) -> Tensor:
            return self.on_grid(model, run, x.unflatten(1, grid)).flatten(1, 2)

        return [blocks]  # timm's stage calls one after the other

    def run_block(self, block: TimmModule, features: Tensor) -> Tensor:
        grid = int(features.shape[1]), int(features.shape[2])
        done: Tensor = block(features.flatten(1, 2), grid)
        return done.unflatten(1, grid)

    def run_smaller(self, block: TimmModule, features: Tensor, tokens: Tokens) -> Tensor:
        # Kernels that are resampled for tokens further apart lose more: 14 points of top-1 to 9 at 10 x 10 of 14 x 14.
        return self.run_block(block, features)

    def run_grouped(self, block: TimmModule, features: Tensor, groups: GridGroups | None) -> Tensor:
        grid, inner = (int(features.shape[1]), int(features.shape[2])), _plain(block)
        layer, mlp = _plain(inner.attn), _plain(inner.mlp)
        asked = partial(call, inner.attn, partial(_asked_by_cells, layer))
        # The convolution between sees all tokens, those that share what leads into it by the one that stays: means of
        # several would be smooth where it looks for differences.
        shared = {} if groups is None else {
            "mlp": StandIn(inner.mlp, fc1=partial(_by_one, mlp.fc1, groups), fc2=partial(_by_mean, mlp.fc2, groups))
        }  # fmt: skip
        done: Tensor = StandIn(block, attn=asked, **shared)(features.flatten(1, 2), grid)
        return done.unflatten(1, grid)

    def grouped_macs(self, block: TimmModule, windows: Windows, count: int) -> int:
        layer: TimmModule = unwrapped(block.attn)
        mlp: TimmModule = unwrapped(block.mlp)
        asked = math.ceil(windows.rows / QUERY_CELL) * math.ceil(windows.columns / QUERY_CELL)
        keys = self._keys(layer, windows)
        per_query = int(linear_macs(layer.q) + linear_macs(layer.proj)) + 2 * int(layer.dim) * keys
        whole = self.block_macs(block, windows, smaller=False)
        return whole - (windows.count - asked) * per_query - (windows.count - count) * int(linear_macs(mlp))

    def final_norm(self, model: TimmModule, features: Tensor) -> Tensor:
        return features  # each stage has a norm of its own

    def block_macs(self, block: TimmModule, windows: Windows, *, smaller: bool) -> int:
        layer: TimmModule = unwrapped(block.attn)
        mlp: TimmModule = unwrapped(block.mlp)
        keys, fewer = self._keys(layer, windows), 0
        if layer.sr is not None:
            fewer = keys * _convolution(layer.sr).weight.numel()
        per_token = linear_macs(layer.q) + linear_macs(layer.proj) + 2 * layer.dim * keys
        per_token += linear_macs(mlp) + _convolution(mlp.dwconv).weight.numel()
        return windows.count * per_token + keys * linear_macs(layer.kv) + fewer

    def _keys(self, layer: TimmModule, windows: Windows) -> int:
        """How many keys and values attention looks at."""
        if layer.pool is not None:
            return math.prod(_pair(unwrapped(layer.pool).output_size))
        if layer.sr is None:
            return windows.count
        down, across = _convolution(layer.sr).stride
        return int((windows.rows // down) * (windows.columns // across))

    def other_macs(self, model: TimmModule, stage: int, height: int, width: int) -> int:
        stages: Any = self.stages(model)
        part = stages[stage].downsample if stage else model.patch_embed
        return math.prod(self.stage_grid(model, stage, height, width)) * _convolution(part.proj).weight.numel()

    def head_macs(self, model: TimmModule, tokens: int) -> int:
        return linear_macs(model.head) * (1 if model.global_pool else tokens)


def _asked_by_cells(layer: TimmModule, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention of squares of tokens, each of which gets what its square does.

    Args:
        layer: The attention; run by its own parts.
        x: `(B, N, D)`, normed.
        grid: Rows and columns.
    """
    picture = x.transpose(1, 2).unflatten(2, grid)
    cells = F.avg_pool2d(picture, QUERY_CELL, ceil_mode=True, count_include_pad=False)
    query = _heads(layer, layer.q(cells.flatten(2).transpose(1, 2)))
    if layer.sr is not None:
        x = layer.sr(picture if layer.pool is None else layer.pool(picture))
        x = layer.norm(x.flatten(2).transpose(1, 2))
        x = x if layer.pool is None else layer.act(x)
    key, value = (_heads(layer, part) for part in layer.kv(x).chunk(2, dim=2))
    asked = fused_attention(query, key, value, None).transpose(1, 2).flatten(2)
    asked = layer.proj_drop(layer.proj(asked)).unflatten(1, (cells.shape[2], cells.shape[3]))
    wide = asked.unsqueeze(3).unsqueeze(2).expand(-1, -1, QUERY_CELL, -1, QUERY_CELL, -1)
    whole = wide.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]
    return whole.flatten(1, 2)


def _by_one(layer: nn.Module, groups: GridGroups, x: Tensor) -> Tensor:
    """A layer once for each group of tokens `(B, N, D)`, on the one that stays."""
    return groups.given_back(layer(groups.taken(x)))


def _by_mean(layer: nn.Module, groups: GridGroups, x: Tensor) -> Tensor:
    """The same on the mean of each group."""
    return groups.given_back(layer(group_means(x, groups)))


def _plain(module: nn.Module) -> TimmModule:
    """A module out of wrappers that change no numbers."""
    inner: TimmModule = unwrapped(module)
    return inner


def _heads(layer: TimmModule, x: Tensor) -> Tensor:
    """`(B, n, D)` to `(B, H, n, D / H)`."""
    return x.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)


def _convolution(module: nn.Module) -> Any:
    """A convolution, out of what is around it; LoRA's products are not counted, which depend on what is in it."""
    module = unwrapped(module)
    return getattr(module, "base_layer", module)


def _stride(block: TimmModule) -> int:
    """By what a block's grid has to be divided for its fewer keys and values."""
    layer: TimmModule = unwrapped(block.attn)
    return 1 if layer.sr is None else max(_convolution(layer.sr).stride)


def _side(size: int, stride: int) -> int:
    """Rows or columns of windows, of which there is a multiple of the stride, so that any smaller ones leave a multiple
    too; where none of a fitting size do, as in a grid that is none itself, windows about alike.
    """
    sides = [size // number for number in range(stride, size + 1, stride) if size % number == 0]
    fitting = [side for side in sides if min(LEAST, size // stride) <= side <= LARGEST]
    if fitting:
        return min(fitting, key=lambda side: abs(math.log(side / WINDOW)))
    return math.ceil(size / max(1, round(size / WINDOW)))
