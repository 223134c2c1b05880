"""Rotations by position (RoPE): timm's tables of sines and cosines, made for tokens wherever they are.

Every RoPE of timm turns pairs of numbers by angles linear in the position, so a table for merged tokens needs only
where they are. Up to the first stage the model's own table is used, as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import (
    AttentionRope,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    apply_rot_embed_cat,
)
from timm.layers.pos_embed_sincos import RotaryEmbeddingMRope, _apply_coord_augs
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from tokencut.adapters.base import Context
from tokencut.adapters.positions import PositionedAdapter, grid_positions
from tokencut.adapters.vit_blocks import AttentionRun, BlockHandler, Layers
from tokencut.attention import AttentionInfo, QueryKey, TimmModule, mixed_values
from tokencut.errors import ModelError
from tokencut.ops import kernels
from tokencut.tokens import Tokens


@dataclass(frozen=True)
class RotaryContext(Context):
    """`Context` with a table for the block, `(N, 2 d)` or `(B, 1 or H, N, 2 d)`: sines, then cosines; None for none."""

    table: Tensor | None = None

    def block_arguments(self) -> dict[str, Any]:
        return {"rope": self.table, **super().attention_arguments()}

    def attention_arguments(self) -> dict[str, Any]:
        return self.block_arguments()

    def given(self, *, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False) -> Context:
        same = rope is self.table and attn_mask is self.bias
        return self if same else replace(self, table=rope, bias=attn_mask)


@dataclass(frozen=True)
class RotatedQueryKey(QueryKey):
    """Queries and keys after their rotation, with those before it."""

    raw: QueryKey | None = None


class RotaryAdapter(PositionedAdapter):
    """A columnar model whose attention turns queries and keys by the table of a timm RoPE in `model.rope`.

    Attributes:
        raw_keys: Whether methods that compare tokens by their keys see them before the rotation.
        raw_class_attention: Whether class attention is that of queries and keys before the rotation.
    """

    raw_keys: bool = False
    raw_class_attention: bool = False

    def rope(self, model: TimmModule) -> TimmModule | None:
        """timm's RoPE; None where the model has none."""
        return self.core(model).rope

    def check(self, model: TimmModule) -> None:
        super().check(model)
        if self.rope(model) is not None and type(self.rope(model)) not in _ANGLES:
            raise ModelError(f"the rotary positions {type(self.rope(model)).__name__} are not known to tokencut; "
                             "please report the model's name")  # fmt: skip

    def turned(self, model: TimmModule, features: Tensor, table: Tensor | None, grid: tuple[int, int],
               kept: Tensor | None = None) -> Tokens:  # fmt: skip
        """The tokens entering the first block, with where they are and the model's own table.

        Args:
            model: The model.
            features: `(B, P + N, D)`.
            table: The model's own table for them, of all blocks where it has one for each; None without RoPE.
            grid: Rows and columns of patches.
            kept: Which patches patch dropout has left, `(B, N)`; None for all.
        """
        if table is None:
            return Tokens(features, self.num_prefix_tokens(model))
        tokens = replace(self.located(model, features, grid, kept), shared=table)
        rope = self.rope(model)
        assert rope is not None
        if not (rope.training and rope.aug_active) or self.follows_patches(model):
            return tokens
        # While training timm moves positions at random; tables behind a stage have to be moved as this one is.
        assert tokens.positions is not None
        return self.prepare(model, replace(tokens, positions=_moved(rope, tokens.positions, grid)))

    def prepare(self, model: TimmModule, tokens: Tokens) -> Tokens:
        if tokens.positions is None:
            return tokens
        # A table a block, and a head, is made block by block.
        mixed = isinstance(self.rope(model), RotaryEmbeddingMixed)
        return replace(tokens, shared=None if mixed else self.table(self.rope(model), tokens, 1))

    def needs_halves(self, block: TimmModule, features: Tensor, context: Context) -> bool:
        # With a table for each image timm's own operations would read more than the attention does.
        table = context.table if isinstance(context, RotaryContext) else None
        each = table is not None and table.dim() == 4 and has_rotation_kernel(features, features, table)
        return each or super().needs_halves(block, features, context)

    def context(self, model: TimmModule, number: int, tokens: Tokens) -> Context:
        table = tokens.shared
        if tokens.positions is not None and isinstance(self.rope(model), RotaryEmbeddingMixed):
            table = self.table(self.rope(model), tokens, number) if table is None else table[number - 1]
        return RotaryContext(tokens.bias, table)

    def table(self, rope: TimmModule, tokens: Tokens, number: int) -> Tensor:
        """A block's table for tokens with positions, by `position_rule`: `(B, 1 or H, N, 2 d)` in timm's dtype."""
        grid, shares = tokens.grid, self.shares(tokens)
        assert grid is not None
        if shares is None:
            return rotation_table(rope, self.places(tokens), grid, number)
        whole = rotation_table(rope, grid_positions(grid, shares.device).unsqueeze(0), grid, number)
        return torch.matmul(shares.unsqueeze(1), whole.float()).to(whole.dtype)

    def attention_half(
        self, model: TimmModule, block: TimmModule, tokens: Tokens, context: Context
    ) -> tuple[Tokens, AttentionInfo]:
        half, info = super().attention_half(model, block, tokens, context)
        raw: Layers = tuple(tuple(_unrotated(heads) for heads in maps) for maps in info.layers)
        return half, replace(
            info,
            layers=raw if self.raw_class_attention else info.layers,
            compared=raw if self.raw_keys else info.layers,
        )


def _unrotated(heads: QueryKey) -> QueryKey:
    return heads.raw if isinstance(heads, RotatedQueryKey) and heads.raw is not None else heads


def rotation_table(rope: TimmModule, positions: Tensor, grid: tuple[int, int], number: int) -> Tensor:
    """A RoPE's table for any positions.

    Args:
        rope: One of timm's, with a table or without.
        positions: Rows and columns of patches from the first, fp32 `(B, N, 2)`; between patches too.
        grid: Rows and columns of patches of the image.
        number: The block's 1-based number, for a RoPE that differs between blocks.

    Returns:
        Sines, then cosines, `(B, 1, N, 2 d)`, or `(B, H, N, 2 d)` where heads differ, in the dtype of timm's table.
    """
    places = positions.unsqueeze(1).unbind(-1)
    row, column = (place * step + start for place, (step, start) in zip(places, _axes(rope, grid), strict=True))
    ordered = (column, row) if rope.grid_indexing == "xy" else (row, column)
    angles = _ANGLES[type(rope)](rope, *(line.unsqueeze(-1) for line in ordered), number)
    sines, cosines = angles.sin(), angles.cos()
    if getattr(rope, "rotate_half", isinstance(rope, RotaryEmbeddingMRope)):
        table = torch.cat((sines, sines, cosines, cosines), -1)
    else:
        table = torch.cat((sines.repeat_interleave(2, -1), cosines.repeat_interleave(2, -1)), -1)
    return table.to(_table_dtype(rope))


def _axes(rope: TimmModule, grid: tuple[int, int]) -> list[tuple[float, float]]:
    """What turns rows, and columns, into a RoPE's own coordinates: a step for each patch, and where the first is."""
    kind = "centered" if isinstance(rope, RotaryEmbeddingDinoV3) else getattr(rope, "grid_type", "index")
    offset, reference = getattr(rope, "grid_offset", 0.0), getattr(rope, "ref_feat_shape", None)
    found = []
    for axis, count in enumerate(grid):
        if kind == "pixel":  # evenly from -1 to 1
            step, start = (2.0 / (count - 1) if count > 1 else 0.0), -1.0
        elif kind == "centered":  # from -1 to 1 at the borders of the first and the last patch
            by: Mapping[str, float] = {"max": max(grid), "min": min(grid), "separate": count}
            step = 1.0 / by[rope.normalize_coords]
            start = (0.5 + offset) * step
        else:
            step, start = 1.0, offset
        if reference is not None:  # EVA's way with another size than that of its training
            step, start = step / count * reference[axis], start / count * reference[axis]
        if kind == "centered":
            step, start = 2.0 * step, 2.0 * start - 1.0
        found.append((step, start))
    return found


def _moved(rope: TimmModule, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions as timm's augmentation moves them while training, by one draw for all images and blocks."""
    axes = torch.tensor(_axes(rope, grid), device=patches.device)
    coordinates = patches * axes[:, 0] + axes[:, 1]
    order = [1, 0] if rope.grid_indexing == "xy" else [0, 1]
    moved = _apply_coord_augs(coordinates[..., order], rope.shift_coords, rope.jitter_coords, rope.rescale_coords)
    return (moved[..., order] - axes[:, 1]) / axes[:, 0].where(axes[:, 0] != 0, 1.0)


def _by_bands(rope: TimmModule, first: Tensor, second: Tensor, number: int) -> Tensor:
    return torch.cat((first * rope.bands, second * rope.bands), -1)


def _by_periods(rope: TimmModule, first: Tensor, second: Tensor, number: int) -> Tensor:
    return torch.cat([2 * math.pi * line / rope.periods for line in (first, second)], -1)


def _by_axis(rope: TimmModule, first: Tensor, second: Tensor, number: int) -> Tensor:
    return torch.cat((torch.zeros_like(first), first, second), -1)[..., rope.axis] * rope.inv_freq


def _by_heads(rope: TimmModule, first: Tensor, second: Tensor, number: int) -> Tensor:
    rates = rope.freqs[:, number - 1].float().unsqueeze(2)
    return first * rates[0] + second * rates[1]


# Angles of a token, `(B, 1 or H, N, d / 2)`, from coordinates `(B, 1, N, 1)`.
_ANGLES: dict[type[nn.Module], Any] = {
    RotaryEmbeddingCat: _by_bands,
    RotaryEmbeddingDinoV3: _by_periods,
    RotaryEmbeddingMRope: _by_axis,
    RotaryEmbeddingMixed: _by_heads,
}


def _table_dtype(rope: TimmModule) -> torch.dtype:
    """timm's tables have the model's dtype where they are kept, fp32 where they are made for each batch."""
    if isinstance(rope, RotaryEmbeddingMixed):
        return rope.freqs.dtype
    kept = getattr(rope, "pos_embed_cached" if isinstance(rope, RotaryEmbeddingDinoV3) else "pos_embed", None)
    return torch.float32 if kept is None else kept.dtype


def project_qkv(layer: TimmModule, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `(B, H, P + N, d)` by one projection or by three, with the biases that timm keeps apart.

    Args:
        layer: An attention layer of timm's EVA, BEiT or `AttentionRope`; keys and values may have fewer heads.
        x: Normed features, `(B, P + N, D)`.
    """
    if layer.qkv is None:
        heads = (layer.num_heads, *(getattr(layer, "num_kv_heads", layer.num_heads),) * 2)
        parts = (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
    else:
        heads, biases = (layer.num_heads,) * 3, getattr(layer, "q_bias", None)
        if biases is None:
            packed = layer.qkv(x)
        else:
            biases = torch.cat((layer.q_bias, layer.k_bias, layer.v_bias))
            separate = layer.qkv_bias_separate
            packed = layer.qkv(x) + biases if separate else F.linear(x, layer.qkv.weight, biases)
        parts = packed.chunk(3, dim=2)
    query, key, value = (part.unflatten(2, (h, -1)).transpose(1, 2) for part, h in zip(parts, heads, strict=True))
    return query, key, value


def rotary_attention(layer: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, tuple[QueryKey, ...]]:
    """Runs timm's `AttentionRope` or `EvaAttention` by its own sub-modules, fused, and keeps queries and keys.

    Args:
        layer: The attention layer.
        x: Normed features, `(B, P + N, D)`.
        context: A `RotaryContext`.

    Returns:
        The attention's output `(B, P + N, D)`, and its one map.
    """
    assert isinstance(context, RotaryContext)
    query, key, value = project_qkv(layer, x)
    raw = QueryKey(layer.q_norm(query), layer.k_norm(key))
    query, key = _rotated(layer, raw, context.table, value)
    groups = getattr(layer, "num_kv_groups", 1)
    if groups > 1:  # grouped queries: a head of keys and values serves several of queries
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        raw = QueryKey(raw.query, raw.key.repeat_interleave(groups, 1))
    y = mixed_values(layer, query, key, value, context.bias)
    y = layer.norm(y.transpose(1, 2).flatten(2))
    if layer.gate is not None:
        y = y * layer.gate(x).sigmoid()
    return layer.proj_drop(layer.proj(y)), (RotatedQueryKey(query, key, raw=raw),)


def _rotated(layer: TimmModule, raw: QueryKey, table: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the table, but for prefix tokens, in the dtype of the values."""
    if table is None:
        return raw.query, raw.key
    prefix = layer.num_prefix_tokens
    if has_rotation_kernel(raw.query, raw.key, table) and raw.query.shape == raw.key.shape:
        return kernels.rotation.rotate(raw.query, raw.key, table, prefix, layer.rotate_half)
    query, key = (
        torch.cat((x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], table, half=layer.rotate_half)), 2)
        for x in (raw.query, raw.key)
    )
    return query.type_as(value), key.type_as(value)


def has_rotation_kernel(query: Tensor, key: Tensor, table: Tensor) -> bool:
    """Whether a kernel turns queries and keys: half precision on a GPU."""
    half = query.dtype == key.dtype and query.dtype in (torch.float16, torch.bfloat16)
    return half and kernels.usable(query, key, table)


class ScaledBlockHandler(BlockHandler):
    """A pre-norm block whose LayerScale is a pair of parameters, `gamma_1` and `gamma_2`, or None."""

    attention_runs: ClassVar[Mapping[type[nn.Module], AttentionRun]] = {
        AttentionRope: rotary_attention,
        EvaAttention: rotary_attention,
    }

    def attention_half(self, block: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, Layers]:
        y, maps = self.attend(block.attn, block.norm1(x), context)
        return x + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y), (maps,)

    def mlp_half(self, block: TimmModule, x: Tensor) -> Tensor:
        y = block.mlp(block.norm2(x))
        return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)
