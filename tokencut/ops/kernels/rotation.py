"""Rotary positions on a GPU: queries and keys turned in one launch, where PyTorch takes a dozen and fp32 copies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencut.ops.kernels import opaque
from tokencut.ops.kernels.launching import Kernel, Launch, by_shape

TOKENS = 32  # that a program turns, of one head


@Kernel
@triton.jit
def _rotate(
    query, key, table, turned_query, turned_key, count, heads, q_batch, q_head, q_row, k_batch, k_head, k_row,
    t_batch, t_head, t_row, PREFIX: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head; prefix tokens are copied."""
    image, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    place = tl.arange(0, PADDED)
    # Each number turns with another: the one half a head away, or the one beside it.
    if HALF:
        other = (place + WIDTH // 2) % WIDTH
        sign = tl.where(place < WIDTH // 2, -1.0, 1.0)
    else:
        other = place ^ 1
        sign = tl.where(place % 2 == 0, -1.0, 1.0)
    inside = (rows[:, None] < count) & (place[None, :] < WIDTH)
    turns = inside & (rows[:, None] >= PREFIX)
    angles = table + image * t_batch + head * t_head + (rows[:, None] - PREFIX) * t_row + place[None, :]
    sines = tl.load(angles, mask=turns, other=0.0).to(tl.float32) * sign[None, :]
    cosines = tl.load(angles + WIDTH, mask=turns, other=1.0).to(tl.float32)
    result = (tl.program_id(1).to(tl.int64) * count + rows[:, None]) * WIDTH + place[None, :]
    query += image * q_batch + head * q_head + rows[:, None] * q_row
    x = tl.load(query + place[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(query + other[None, :], mask=turns, other=0.0).to(tl.float32)
    tl.store(turned_query + result, (x * cosines + y * sines).to(turned_query.dtype.element_ty), mask=inside)
    key += image * k_batch + head * k_head + rows[:, None] * k_row
    x = tl.load(key + place[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(key + other[None, :], mask=turns, other=0.0).to(tl.float32)
    tl.store(turned_key + result, (x * cosines + y * sines).to(turned_key.dtype.element_ty), mask=inside)


@opaque(
    "(Tensor query, Tensor key, Tensor table, int prefix, bool half) -> (Tensor, Tensor)",
    lambda query, key, table, prefix, half: (query.new_empty(query.shape), key.new_empty(key.shape)),
)
def rotate(query: Tensor, key: Tensor, table: Tensor, prefix: int, half: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by a table of rotations (RoPE, arXiv 2104.09864), all but the prefix tokens.

    Args:
        query: `(B, H, P + N, d)`, the last dimension contiguous, like `key`.
        key: `(B, H, P + N, d)`.
        table: Sines, then cosines, `(..., N, 2 d)` with `...` what broadcasts to `(B, H)`.
        prefix: `P`.
        half: Whether a number turns with the one half a head away, not with its neighbour.

    Returns:
        Both, `(B, H, P + N, d)`, contiguous.
    """
    batch, heads, count, width = query.shape
    turned = torch.empty((batch, heads, count, width), dtype=query.dtype, device=query.device)
    turned_key = torch.empty((batch, heads, count, width), dtype=key.dtype, device=key.device)
    table = table if table.stride(-1) == 1 else table.contiguous()
    steps = table.expand(batch, heads, count - prefix, 2 * width).stride()
    _turning(query.shape, query.stride(), key.stride(), steps, prefix, half)(query, key, table, turned, turned_key)
    return turned, turned_key


@by_shape
def _turning(
    shape: tuple[int, ...], query: tuple[int, ...], key: tuple[int, ...], table: tuple[int, ...], prefix: int,
    half: bool,
) -> Launch:  # fmt: skip
    """Turns queries of a shape, for `rotate`; the others are strides."""
    batch, heads, count, width = shape
    return _rotate.prepare(
        (triton.cdiv(count, TOKENS), batch * heads), count, heads, *query[:3], *key[:3], *table[:3],
        PREFIX=prefix, HALF=half, WIDTH=width, PADDED=triton.next_power_of_2(width), TOKENS=TOKENS,
    )  # fmt: skip
