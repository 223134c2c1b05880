"""Carrying a merge out on a GPU: the product of `tokens.apply_decision`, its matrix never written to memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencut.ops.kernels import opaque
from tokencut.ops.kernels.launching import Kernel

GROUPS, TOKENS = 64, 32  # that a program makes, and that it adds up at once
CHUNK = 128  # features of them, in half precision


@Kernel
@triton.jit
def _merge(features, group, share, merged, count, groups, batch_stride, row_stride,
           PREFIX: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr,
           CHUNK: tl.constexpr, ORDERED: tl.constexpr):  # fmt: skip
    """Weighted sums of the groups, behind the prefix tokens."""
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
    batch, tokens, width = features.shape
    merged = features.new_empty((batch, prefix + count, width))
    chunk = CHUNK if features.element_size() == 2 else CHUNK // 2
    grid = (triton.cdiv(width, chunk), triton.cdiv(count, GROUPS), batch)
    _merge[grid](
        features, group.contiguous(), weight.contiguous(), merged, tokens - prefix, count, features.stride(0),
        features.stride(1), PREFIX=prefix, WIDTH=width, GROUPS=GROUPS, TOKENS=TOKENS, CHUNK=chunk,
        ORDERED=ordered,
    )  # fmt: skip
    return merged
