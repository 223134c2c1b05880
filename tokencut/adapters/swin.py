"""Every architecture that timm builds of its classes `SwinTransformer`, `SwinTransformerV2` and `SwinTransformerV2Cr`:
attention in windows, which are shifted in every other block.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr, SwinTransformerV2CrBlock
from torch import Tensor, nn

from tokencut.adapters.base import counted_macs, linear_macs, register_adapter
from tokencut.adapters.hierarchy import STAGE, HierarchicalAdapter, Run
from tokencut.attention import TimmModule
from tokencut.calling import StandIn, call, unwrapped
from tokencut.errors import ModelError
from tokencut.ops.constants import constant
from tokencut.ops.grid_clusters import Windows
from tokencut.ops.grouping import GridGroups
from tokencut.tokens import Tokens


@dataclass(frozen=True)
class SmallerWindows:
    """What all blocks on a smaller grid share.

    Attributes:
        shift: By how many rows and columns windows are shifted in every other block.
        mask: What is added to the attention of shifted windows, `(W, n, n)`; None where windows are not shifted.
        positions: What the family's attention needs of the relative positions in such windows.
    """

    shift: tuple[int, int]
    mask: Tensor | None
    positions: Any


@dataclass(frozen=True)
class Offsets:
    """How tables of relative positions are looked up for smaller windows.

    Attributes:
        rows: What each pair of rows of a window takes of a table's, `(h' * h', 2h - 1)`.
        columns: The same for columns, transposed.
        layers: The attention layers for which that is done already, since it takes as long for all as for one.
        biases: What each of them adds for relative positions, `(1, H, n, n)`.
    """

    rows: Tensor
    columns: Tensor
    layers: tuple[TimmModule, ...] = ()
    biases: tuple[Tensor, ...] = ()


class ShiftedWindowAdapter(HierarchicalAdapter):
    """What the two versions of Swin have in common.

    Attributes:
        norm_first: Whether a block's norm stands before its MLP, and not behind it.
    """

    stages_name = "layers"
    norm_first: ClassVar[bool] = False

    def check(self, model: TimmModule) -> None:
        super().check(model)
        if not len(self.blocks(model)):
            raise ModelError(f"the model has {len(self.stages(model))} stages with blocks, and it is the third that is "
                             "reduced; build one with more stages")  # fmt: skip

    def input_size(self, model: TimmModule) -> tuple[int, int] | None:
        size: tuple[int, int] | None = model.patch_embed.img_size
        return size

    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        height, width = model.patch_embed.patch_size
        return int(height) << STAGE, int(width) << STAGE

    def stage_grid(self, model: TimmModule, stage: int, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.patch_grid(model, height, width)
        for _ in range(stage):
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return int(rows), int(columns)

    def patch_grid(self, model: TimmModule, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches, before any are merged."""
        rows, columns = model.patch_embed.dynamic_feat_size((height, width))
        return rows, columns

    def classifier(self, model: TimmModule) -> nn.Module:
        classifier: nn.Module = model.head.fc
        return classifier

    def windows(self, model: TimmModule, rows: int, columns: int) -> Windows:
        height, width = plain(self.blocks(model)[0]).window_size
        return Windows(rows, columns, int(height), int(width))

    def width(self, block: TimmModule) -> int:
        return int(block.dim)

    def stood_in_for(self, block: TimmModule) -> list[nn.Module]:
        return [block, block.attn]

    def prepare(self, model: TimmModule, tokens: Tokens) -> Tokens:
        if tokens.clustered is None:
            return tokens
        before, windows = tokens.clustered.clusters.windows, tokens.windows
        assert windows is not None
        blocks = [plain(block) for block in self.blocks(model)]
        shifted = next((block for block in blocks if any(block.shift_size)), None)
        down, across = (0, 0) if shifted is None else shifted.shift_size
        shift = windows.height // 2 if down else 0, windows.width // 2 if across else 0
        mask = constant(_shift_mask, windows, shift, like=tokens.features) if any(shift) else None
        layers = [plain(block.attn) for block in blocks[tokens.clustered.block - 1 :]]
        positions = self.positions(layers, before, windows, tokens.features)
        return replace(tokens, shared=SmallerWindows(shift, mask, positions))

    def run_smaller(self, block: TimmModule, features: Tensor, tokens: Tokens) -> Tensor:
        windows, shared = tokens.windows, tokens.shared
        assert windows is not None
        shifts = any(plain(block).shift_size) and any(shared.shift)
        done: Tensor = StandIn(
            block,
            window_size=(windows.height, windows.width),
            window_area=windows.places,
            shift_size=shared.shift if shifts else (0, 0),
            dynamic_mask=False,
            attn_mask=shared.mask if shifts else None,
            attn=self.attention(block.attn, windows, shared.positions),
        )(features)
        return done

    def run_grouped(self, block: TimmModule, features: Tensor, groups: GridGroups | None) -> Tensor:
        if groups is None:
            return self.run_block(block, features)
        inner = plain(block)
        ahead = {"norm2": _unchanged} if self.norm_first else {}
        norm = inner.norm2 if self.norm_first else _unchanged
        done: Tensor = StandIn(block, mlp=partial(_shared, norm, inner.mlp, groups), **ahead)(features)
        return done

    def grouped_macs(self, block: TimmModule, windows: Windows, count: int) -> int:
        whole = self.block_macs(block, windows, smaller=False)
        return whole - (windows.count - count) * int(linear_macs(block.mlp))

    @abstractmethod
    def positions(self, layers: Sequence[TimmModule], before: Windows, windows: Windows, like: Tensor) -> Any:
        """What attention needs of the relative positions in smaller windows.

        Args:
            layers: The attention of each of the blocks that run on the smaller grid.
            before: The grid in the model's own windows.
            windows: The smaller grid.
            like: A tensor of the features' device and dtype.
        """

    @abstractmethod
    def attention(self, layer: TimmModule, windows: Windows, positions: Any) -> StandIn:
        """The attention of a block in smaller windows, with what it adds for relative positions."""

    @abstractmethod
    def position_macs(self, layer: TimmModule, own: Windows, windows: Windows | None) -> int:
        """Multiply-adds of what attention adds for relative positions.

        Args:
            layer: The attention.
            own: The grid in the model's own windows.
            windows: The smaller grid where attention is on one, else None.
        """

    def block_macs(self, block: TimmModule, windows: Windows, *, smaller: bool) -> int:
        layer = plain(block.attn)
        own = Windows(windows.rows, windows.columns, *layer.window_size)
        inside = windows if smaller else own
        padded = inside.number * inside.places
        width = linear_out(layer.qkv) // 3
        macs: int = padded * (linear_macs(layer.qkv) + linear_macs(layer.proj) + 2 * width * inside.places)
        macs += windows.count * linear_macs(block.mlp)
        return macs + self.position_macs(layer, own, windows if smaller else None)

    def other_macs(self, model: TimmModule, stage: int, height: int, width: int) -> int:
        rows, columns = self.stage_grid(model, stage, height, width)
        if stage:
            stages: Any = self.stages(model)
            return rows * columns * linear_macs(stages[stage].downsample)
        embed = model.patch_embed
        proj = plain(embed.proj)
        if type(embed) is PatchEmbed and isinstance(proj, nn.Conv2d):
            return rows * columns * proj.weight.numel()
        return counted_macs(embed, (model.in_chans, height, width))

    def head_macs(self, model: TimmModule, tokens: int) -> int:
        return linear_macs(model.head.fc) * (1 if model.head.global_pool.pool_type else tokens)


@register_adapter
class SwinAdapter(ShiftedWindowAdapter):
    """Windows with a table of relative positions.

    Clusters lie `w / w'` tokens apart: so the table is looked up between its own offsets, linearly, at `w / w'` times
    the offset in the smaller window.
    """

    family = "Swin"
    norm_first = True
    timm_modules = ("swin_transformer",)
    classes = (SwinTransformer,)
    block_classes = (SwinTransformerBlock,)

    def all_blocks(self, model: TimmModule, run: Run) -> Any:
        return partial(call, self.blocks(model), partial(self.on_grid, model, run))

    def positions(self, layers: Sequence[TimmModule], before: Windows, windows: Windows, like: Tensor) -> Offsets:
        offsets = Offsets(
            constant(_offsets, before.height, windows.height, like=like),
            constant(_offsets, before.width, windows.width, like=like).transpose(0, 1),
        )
        # What FSDP shards is there only inside a layer's own call.
        if any(hasattr(layer.relative_position_bias_table, "placements") for layer in layers):
            return offsets
        tables = torch.stack([layer.relative_position_bias_table for layer in layers])
        biases = _position_biases(tables, layers[0].window_size, offsets)
        return replace(offsets, layers=tuple(layers), biases=biases.unsqueeze(1).unbind(0))

    def attention(self, layer: TimmModule, windows: Windows, positions: Offsets) -> StandIn:
        return StandIn(
            layer,
            window_size=(windows.height, windows.width),
            window_area=windows.places,
            _get_rel_pos_bias=partial(_position_bias, layer, positions),
        )

    def position_macs(self, layer: TimmModule, own: Windows, windows: Windows | None) -> int:
        if windows is None:
            return 0
        (high, wide), (rows, columns) = ((2 * own.height - 1, 2 * own.width - 1), (windows.height**2, windows.width**2))
        return int(layer.num_heads * rows * wide * (high + columns))


@register_adapter
class SwinV2Adapter(ShiftedWindowAdapter):
    """Windows with a small network for relative positions, which takes any offset: those between clusters as well."""

    family = "Swin V2"
    timm_modules = ("swin_transformer_v2",)
    classes = (SwinTransformerV2,)
    block_classes = (SwinTransformerV2Block,)

    def all_blocks(self, model: TimmModule, run: Run) -> Any:
        return [partial(self.on_grid, model, run)]

    def positions(
        self, layers: Sequence[TimmModule], before: Windows, windows: Windows, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Offsets are divided by those of a window's ends. In a window of fewer clusters, `w / w'` tokens apart, the
        # same ends are so many clusters away.
        layer = layers[0]
        ends = layer.pretrained_window_size if layer.pretrained_window_size[0] > 0 else (before.height, before.width)
        shares = windows.height / before.height, windows.width / before.width
        scaled = StandIn(
            layer,
            window_size=(windows.height, windows.width),
            pretrained_window_size=tuple(1 + (end - 1) * share for end, share in zip(ends, shares, strict=True)),
        )
        made: tuple[Tensor, Tensor] = scaled._make_pair_wise_relative_positions(device=like.device, dtype=like.dtype)
        return made

    def attention(self, layer: TimmModule, windows: Windows, positions: tuple[Tensor, Tensor]) -> StandIn:
        table, index = positions
        return StandIn(
            layer,
            window_size=(windows.height, windows.width),
            relative_coords_table=table,
            relative_position_index=index,
        )

    def position_macs(self, layer: TimmModule, own: Windows, windows: Windows | None) -> int:
        asked = own if windows is None else windows
        return (2 * asked.height - 1) * (2 * asked.width - 1) * linear_macs(layer.cpb_mlp)


@register_adapter
class SwinV2CrAdapter(ShiftedWindowAdapter):
    """timm's own form of Swin V2: a network for the offset of each pair, in tokens, and channels before rows."""

    family = "Swin V2 CR"
    timm_modules = ("swin_transformer_v2_cr",)
    classes = (SwinTransformerV2Cr,)
    block_classes = (SwinTransformerV2CrBlock,)
    stages_name = "stages"

    def all_blocks(self, model: TimmModule, run: Run) -> Any:
        return [partial(self.on_grid, model, run)]

    def as_taken(self, grid: Tensor) -> Tensor:
        return grid.permute(0, 3, 1, 2)

    def patch_grid(self, model: TimmModule, height: int, width: int) -> tuple[int, int]:
        high, wide = model.patch_embed.patch_size
        return height // high, width // wide

    def final_norm(self, model: TimmModule, features: Tensor) -> Tensor:
        return features  # the last block's own

    def positions(self, layers: Sequence[TimmModule], before: Windows, windows: Windows, like: Tensor) -> Tensor:
        rows, columns = (
            torch.arange(small, device=like.device, dtype=torch.float32) * (large / small)
            for large, small in ((before.height, windows.height), (before.width, windows.width))
        )
        places = torch.stack((rows.unsqueeze(1).expand(-1, len(columns)), columns.expand(len(rows), -1)), 2).flatten(
            0, 1
        )
        apart = (places.unsqueeze(1) - places.unsqueeze(0)).flatten(0, 1)
        return (apart.sign() * (1 + apart.abs()).log()).to(like.dtype)

    def attention(self, layer: TimmModule, windows: Windows, positions: Tensor) -> StandIn:
        return StandIn(layer, window_size=(windows.height, windows.width), relative_coordinates_log=positions)

    def position_macs(self, layer: TimmModule, own: Windows, windows: Windows | None) -> int:
        return (own if windows is None else windows).places ** 2 * linear_macs(layer.meta_mlp)


def _shared(norm: Callable[[Tensor], Tensor], mlp: nn.Module, groups: GridGroups, x: Tensor) -> Tensor:
    """An MLP, behind a norm, once for each group of tokens `(B, N, D)`: on the one that stays, which it knows how to
    take, and not on a mean.
    """
    return groups.given_back(mlp(norm(groups.taken(x))))


def _unchanged(x: Tensor) -> Tensor:
    return x


def linear_out(layer: nn.Module) -> int:
    """How many numbers a linear layer gives, also one that peft has put something around."""
    inner: Any = getattr(layer, "base_layer", layer)
    return int(inner.out_features)


def plain(module: nn.Module) -> TimmModule:
    """A module out of wrappers that change no numbers."""
    inner: TimmModule = unwrapped(module)
    return inner


def _offsets(size: int, smaller: int, device: torch.device) -> Tensor:
    """Between which of the offsets `1 - size .. size - 1` those of each pair of a smaller window's places lie, by how
    much of each: `(smaller * smaller, 2 * size - 1)`.
    """
    place = torch.arange(smaller, device=device, dtype=torch.float32) * (size / smaller)
    sought = (place.unsqueeze(1) - place.unsqueeze(0)).flatten().unsqueeze(1)
    own = torch.arange(1 - size, size, device=device, dtype=torch.float32)
    return (1 - (sought - own).abs()).clamp(min=0)


def _shift_mask(windows: Windows, shift: tuple[int, int], device: torch.device) -> Tensor:
    """What keeps the attention of shifted windows among tokens that were neighbours, `(W, n, n)`: 0, or -100 as timm
    has it.
    """
    parts = []
    for size, window, by in (
        (windows.down * windows.height, windows.height, shift[0]),
        (windows.across * windows.width, windows.width, shift[1]),
    ):
        place = torch.arange(size, device=device, dtype=torch.float32)
        part = (place >= size - window).float() + (place >= size - by).float()
        parts.append(part if by else torch.zeros_like(part))
    whole = Windows(len(parts[0]), len(parts[1]), windows.height, windows.width)
    part = whole.cut((3 * parts[0].unsqueeze(1) + parts[1]).flatten().view(1, -1, 1))[0, ..., 0]
    return (part.unsqueeze(1) - part.unsqueeze(2)).abs().clamp(max=1) * -100.0


def _position_bias(layer: TimmModule, positions: Offsets) -> Tensor:
    """What attention adds in a smaller window, `(1, H, n, n)`."""
    layer = plain(layer)
    for known, bias in zip(positions.layers, positions.biases, strict=True):
        if known is layer:
            return bias
    return _position_biases(layer.relative_position_bias_table.unsqueeze(0), layer.window_size, positions)


def _position_biases(tables: Tensor, window: tuple[int, int], offsets: Offsets) -> Tensor:
    """The same of tables of several layers `(L, relative positions, H)`, `(L, H, n, n)`."""
    tables = tables.unflatten(1, (2 * window[0] - 1, 2 * window[1] - 1)).permute(0, 3, 1, 2)
    pairs = torch.matmul(torch.matmul(offsets.rows, tables), offsets.columns)
    rows, columns = math.isqrt(offsets.rows.shape[0]), math.isqrt(offsets.columns.shape[1])
    pairs = pairs.unflatten(3, (columns, columns)).unflatten(2, (rows, rows)).transpose(3, 4)
    return pairs.flatten(4, 5).flatten(2, 3)
