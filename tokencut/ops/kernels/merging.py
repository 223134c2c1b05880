"""Carrying a merge out on a GPU: the product of `tokens.apply_decision`, its matrix never written to memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencut.ops.kernels import opaque
from tokencut.ops.kernels.launching import Kernel, Launch, by_shape

GROUPS, TOKENS = 64, 32  # that a program makes, and that it adds up at once
CHUNK = 128  # features of them, in half precision


@Kernel
@triton.jit
def _merge(features, group, share, held, merged, logarithms, count, groups, batch_stride, row_stride,
           PREFIX: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr,
           CHUNK: tl.constexpr, ORDERED: tl.constexpr, WEIGHED: tl.constexpr):  # fmt: skip
    """Weighted sums of the groups, behind the prefix tokens, and the logarithms of what they hold, behind zeros."""
    image = tl.program_id(2).to(tl.int64)
    numbers = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    wide = columns[None, :] < WIDTH
    features += image * batch_stride
    merged += image * (PREFIX + groups) * WIDTH
    sums = tl.zeros((GROUPS, CHUNK), tl.float32)
    # Groups numbered by their smallest member begin at their number or later.
    for start in range(tl.program_id(1) * GROUPS if ORDERED else 0, count, TOKENS):
        rows = start + tl.arange(0, TOKENS)
        theirs = tl.load(group + image * count + rows, mask=rows < count, other=-1)
        weight = tl.load(share + image * count + rows, mask=rows < count, other=0.0)
        values = tl.load(features + (PREFIX + rows[:, None]) * row_stride + columns[None, :],
                         mask=(rows[:, None] < count) & wide, other=0.0)  # fmt: skip
        matrix = tl.where(theirs[None, :] == numbers[:, None], weight[None, :], 0.0).to(values.dtype)
        sums = tl.dot(matrix, values, sums, input_precision="ieee")
    tl.store(merged + (PREFIX + numbers[:, None]) * WIDTH + columns[None, :], sums.to(merged.dtype.element_ty),
             mask=(numbers[:, None] < groups) & wide)  # fmt: skip
    if tl.program_id(1) == 0:
        for token in tl.static_range(PREFIX):
            kept = tl.load(features + token * row_stride + columns, mask=columns < WIDTH)
            tl.store(merged + token * WIDTH + columns, kept, mask=columns < WIDTH)
    if WEIGHED & (tl.program_id(0) == 0):
        logarithms += image * (PREFIX + groups)
        size = tl.load(held + image * groups + numbers, mask=numbers < groups, other=1.0)
        tl.store(logarithms + PREFIX + numbers, tl.log(size).to(logarithms.dtype.element_ty), mask=numbers < groups)
        first = tl.arange(0, GROUPS)
        tl.store(logarithms + first, tl.zeros((GROUPS,), logarithms.dtype.element_ty),
                 mask=(first < PREFIX) & (tl.program_id(1) == 0))  # fmt: skip


@Kernel
@triton.jit
def _take(features, index, taken, count, index_stride, batch_stride, row_stride,
          PREFIX: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Copies the prefix tokens and those that an image keeps."""
    image = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = rows < PREFIX + count
    chosen = tl.load(index + image * index_stride + rows - PREFIX, mask=inside & (rows >= PREFIX), other=0)
    place = tl.where(rows < PREFIX, rows, PREFIX + chosen)
    mask = inside[:, None] & (columns[None, :] < WIDTH)
    values = tl.load(features + image * batch_stride + place[:, None] * row_stride + columns[None, :], mask=mask)
    taken += image * (PREFIX + count) * WIDTH
    tl.store(taken + rows[:, None] * WIDTH + columns[None, :], values, mask=mask)


@opaque(
    "(Tensor features, int prefix, Tensor index) -> Tensor",
    lambda features, prefix, index: features.new_empty((features.shape[0], prefix + index.shape[1], features.shape[2])),
)
def take(features: Tensor, prefix: int, index: Tensor) -> Tensor:
    """The prefix tokens, and the image tokens that stay.

    Args:
        features: `(B, P + N, D)`.
        prefix: `P`.
        index: Numbers of image tokens, int64 `(B, M)`.

    Returns:
        `(B, P + M, D)`.
    """
    features = features if features.stride(2) == 1 else features.contiguous()
    index = index if index.stride(1) == 1 else index.contiguous()
    count = index.shape[1]
    taken = features.new_empty((features.shape[0], prefix + count, features.shape[2]))
    _taking(features.shape, features.stride(), prefix, count, index.stride(0))(features, index, taken)
    return taken


@by_shape
def _taking(shape: tuple[int, ...], strides: tuple[int, ...], prefix: int, count: int, index: int) -> Launch:
    """Takes tokens of a shape and strides, for `take`; `index` is a stride too."""
    batch, _, width = shape
    return _take.prepare(
        (triton.cdiv(width, CHUNK), triton.cdiv(prefix + count, TOKENS), batch), count, index, *strides[:2],
        PREFIX=prefix, WIDTH=width, TOKENS=TOKENS, CHUNK=CHUNK,
    )  # fmt: skip


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what the backward needs."""
    _, ctx.prefix, group, weight, ctx.count, _ = inputs
    ctx.save_for_backward(group, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Each token's gradient is its group's, times its weight: read, and nothing added up."""
    group, weight = ctx.saved_tensors
    away = group == ctx.count
    index = group.masked_fill(away, 0).unsqueeze(2).expand(-1, -1, gradient.shape[2])
    share = weight.masked_fill(away, 0.0).to(gradient.dtype).unsqueeze(2)
    image = gradient[:, ctx.prefix :].gather(1, index) * share
    return torch.cat((gradient[:, : ctx.prefix], image), 1), None, None, None, None, None


@opaque(
    "(Tensor features, int prefix, Tensor group, Tensor weight, int count, bool ordered) -> Tensor",
    lambda features, prefix, group, weight, count, ordered: features.new_empty(
        (features.shape[0], prefix + count, features.shape[2])
    ),
    backward=(_backward, _keep),
)
def merge(features: Tensor, prefix: int, group: Tensor, weight: Tensor, count: int, ordered: bool) -> Tensor:
    """Weighted sums of each group's features, behind the untouched prefix tokens.

    Args:
        features: `(B, P + N, D)`; gradients go to them alone.
        prefix: `P`.
        group: Group of each image token, int64 `(B, N)`.
        weight: Coefficients, fp32 `(B, N)`, used in the features' dtype.
        count: `M`, the number of groups.
        ordered: Whether they are numbered by their smallest member (`tokens.in_order`), which takes less reading.

    Returns:
        `(B, P + M, D)`.
    """
    features = features if features.stride(2) == 1 else features.contiguous()
    merged = features.new_empty((features.shape[0], prefix + count, features.shape[2]))
    launch = _merging(features.shape, features.stride(), features.dtype, prefix, count, ordered, False)
    launch(features, group.contiguous(), weight.contiguous(), weight, merged, merged)
    return merged


@opaque(
    "(Tensor features, int prefix, Tensor group, Tensor weight, Tensor held, bool ordered) -> (Tensor, Tensor)",
    lambda features, prefix, group, weight, held, ordered: _two_empty(features, prefix, held),
)
def merge_and_weigh(
    features: Tensor, prefix: int, group: Tensor, weight: Tensor, held: Tensor, ordered: bool
) -> tuple[Tensor, Tensor]:
    """`merge`, and along with it what `attention.log_sizes` makes of the groups' sizes, in the features' dtype.

    Args:
        features: As there, but no gradient.
        prefix: Likewise.
        group: Likewise.
        weight: Likewise.
        held: Patches held by each group, fp32 `(B, M)`.
        ordered: Likewise.

    Returns:
        `(B, P + M, D)` and `(B, 1, 1, P + M)`.
    """
    features = features if features.stride(2) == 1 else features.contiguous()
    results = merged, logarithms = _two_empty(features, prefix, held)
    launch = _merging(features.shape, features.stride(), features.dtype, prefix, held.shape[1], ordered, True)
    launch(features, group.contiguous(), weight.contiguous(), held.contiguous(), merged, logarithms)
    return results


def _two_empty(features: Tensor, prefix: int, held: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what `merge_and_weigh` returns."""
    batch, count = held.shape
    return (features.new_empty((batch, prefix + count, features.shape[2])),
            features.new_empty((batch, 1, 1, prefix + count)))  # fmt: skip


@by_shape
def _merging(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, prefix: int, count: int, ordered: bool,
    weighed: bool,
) -> Launch:  # fmt: skip
    """Merges features of a shape, strides and dtype, for `merge` and `merge_and_weigh`."""
    batch, tokens, width = shape
    chunk = CHUNK if dtype.itemsize == 2 else CHUNK // 2
    return _merge.prepare(
        (triton.cdiv(width, chunk), triton.cdiv(count, GROUPS), batch), tokens - prefix, count, *strides[:2],
        PREFIX=prefix, WIDTH=width, GROUPS=GROUPS, TOKENS=TOKENS, CHUNK=chunk, ORDERED=ordered, WEIGHED=weighed,
    )  # fmt: skip
