"""A round of bipartite soft matching on a GPU, `ops.matching.alternating_average`, in two launches instead of forty."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencut.ops.kernels import opaque
from tokencut.ops.kernels.launching import Kernel, Launch, by_shape
from tokencut.ops.kernels.phases import TINY

ROWS, COLUMNS, CHUNK = 32, 64, 32  # of a tile of similarities, and the features it adds up at once
OTHERS = 4  # tokens that all of an image's are compared with at once


@Kernel
@triton.jit
def _best(points, similarity, partner, count, first, side, other_side, batch_stride, row_stride, WIDTH: tl.constexpr,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The most similar token of the other side for some tokens of one side, the first of several, by cosine."""
    image = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    points += image * batch_stride
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    found = tl.zeros((ROWS,), tl.int32)
    for start in range(0, other_side, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        products = tl.zeros((ROWS, COLUMNS), tl.float32)
        row_norms = tl.zeros((ROWS,), tl.float32)
        column_norms = tl.zeros((COLUMNS,), tl.float32)
        for begin in range(0, WIDTH, CHUNK):
            features = begin + tl.arange(0, CHUNK)
            a = tl.load(points + (first + 2 * rows[:, None]) * row_stride + features[None, :],
                        mask=(rows[:, None] < side) & (features[None, :] < WIDTH), other=0.0)  # fmt: skip
            b = tl.load(points + (1 - first + 2 * columns[None, :]) * row_stride + features[:, None],
                        mask=(columns[None, :] < other_side) & (features[:, None] < WIDTH), other=0.0)  # fmt: skip
            a, b = a.to(tl.float32), b.to(tl.float32)
            row_norms += tl.sum(a * a, 1)
            column_norms += tl.sum(b * b, 0)
            products = tl.dot(a, b, products, input_precision="tf32x3")
        shrink = tl.rsqrt(tl.maximum(row_norms, TINY))[:, None] * tl.rsqrt(tl.maximum(column_norms, TINY))[None, :]
        # What is no number, like what is not there, is the least similar.
        cosine = products * shrink
        cosine = tl.where((cosine == cosine) & (columns[None, :] < other_side), cosine, -float("inf"))
        best, place = tl.max(cosine, 1, return_indices=True)
        found = tl.where(best > highest, start + place, found)
        highest = tl.maximum(highest, best)
    tl.store(similarity + image * side + rows, highest, mask=rows < side)
    tl.store(partner + image * side + rows, found, mask=rows < side)


@Kernel
@triton.jit
def _join(similarity, partner, sizes, group, weight, held, count, first, side, other_side, pairs,
          OWN: tl.constexpr, OTHERS: tl.constexpr):  # fmt: skip
    """Merges the most similar pairs of an image: numbers of the groups, coefficients, and what the groups hold.

    What is left of the one side stands first, then all of the other side.
    """
    image = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, OWN)
    similarity += image * side
    partner += image * side
    sizes += image * count
    group += image * count
    weight += image * count
    held += image * (count - pairs)
    here = own < side
    mine = tl.load(similarity + own, mask=here, other=-float("inf"))
    rank = tl.zeros((OTHERS, OWN), tl.int32)
    for start in range(0, side, OTHERS):
        others = start + tl.arange(0, OTHERS)
        there = others < side
        theirs = tl.load(similarity + others, mask=there, other=-float("inf"))
        ahead = (theirs[:, None] > mine[None, :]) | (
            (theirs[:, None] == mine[None, :]) & (others[:, None] < own[None, :])
        )
        rank += (ahead & there[:, None]).to(tl.int32)
    away = (tl.sum(rank, 0) < pairs) & here
    stays = here & (tl.sum(rank, 0) >= pairs)
    place = tl.cumsum(stays.to(tl.int32), 0) - 1
    joined = tl.load(partner + own, mask=here, other=0)
    number = tl.where(away, side - pairs + joined, place)
    size = tl.load(sizes + first + 2 * own, mask=here, other=0.0)
    tl.store(group + first + 2 * own, number.to(tl.int64), mask=here)
    # Those that stay alone weigh 1; of those that go each writes its size, which the loop below reads.
    tl.store(weight + first + 2 * own, tl.where(stays, 1.0, size), mask=here)
    tl.store(held + place, size, mask=stays)
    tl.debug_barrier()  # what one thread has written another will read
    others_own = own < other_side
    together = tl.zeros((OTHERS, OWN), tl.float32)
    for start in range(0, side, OTHERS):
        others = start + tl.arange(0, OTHERS)
        there = others < side
        theirs = tl.load(group + first + 2 * others, mask=there, other=-1)
        add = tl.load(sizes + first + 2 * others, mask=there, other=0.0)
        together += tl.where(theirs[:, None] == (side - pairs + own)[None, :], add[:, None], 0.0)
    alone = tl.load(sizes + 1 - first + 2 * own, mask=others_own, other=1.0)
    total = alone + tl.sum(together, 0)
    tl.store(group + 1 - first + 2 * own, (side - pairs + own).to(tl.int64), mask=others_own)
    tl.store(weight + 1 - first + 2 * own, alone / total, mask=others_own)
    tl.store(held + side - pairs + own, total, mask=others_own)
    tl.debug_barrier()
    whole = tl.load(held + number, mask=away, other=1.0)
    tl.store(weight + first + 2 * own, size / whole, mask=away)


@opaque(
    "(Tensor points, Tensor sizes, int prefix, int pairs) -> (Tensor, Tensor, Tensor)",
    lambda points, sizes, prefix, pairs: (
        torch.empty_like(sizes, dtype=torch.int64),
        torch.empty_like(sizes),
        sizes.new_empty((sizes.shape[0], sizes.shape[1] - pairs)),
    ),
)
def alternating_average(points: Tensor, sizes: Tensor, prefix: int, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """One round: tokens at even places of the sequence that are most similar to one at an odd place join it.

    Args:
        points: What is compared (cosine), `(B, n, F)` in any floating dtype, `n` at most `MATCHED_AT_ONCE`.
        sizes: Patches that each token holds, fp32 `(B, n)`.
        prefix: `P`, how many prefix tokens stand before them.
        pairs: How many tokens are merged away, at most those at even places.

    Returns:
        Group of each token, int64 `(B, n)`; its size as a share of its group's, fp32 `(B, n)`; patches held by each
        group, fp32 `(B, n - pairs)`.
    """
    points, sizes = points if points.stride(2) == 1 else points.contiguous(), sizes.contiguous()
    batch, count, _ = points.shape
    best, join = _round(points.shape, points.stride(), prefix % 2, pairs)
    side = (count - prefix % 2 + 1) // 2
    similarity = torch.empty((batch, side), dtype=torch.float32, device=points.device)
    partner = torch.empty((batch, side), dtype=torch.int32, device=points.device)
    best(points, similarity, partner)
    group = torch.empty((batch, count), dtype=torch.int64, device=points.device)
    weight = torch.empty((batch, count), dtype=torch.float32, device=points.device)
    held = torch.empty((batch, count - pairs), dtype=torch.float32, device=points.device)
    join(similarity, partner, sizes, group, weight, held)
    return group, weight, held


@by_shape
def _round(shape: tuple[int, ...], strides: tuple[int, ...], first: int, pairs: int) -> tuple[Launch, Launch]:
    """Finds partners, and joins them, of points of a shape and strides; the sides begin at `first` and the other."""
    batch, count, width = shape
    side = (count - first + 1) // 2
    best = _best.prepare(
        (triton.cdiv(side, ROWS), batch), count, first, side, count - side, *strides[:2], WIDTH=width, ROWS=ROWS,
        COLUMNS=COLUMNS, CHUNK=CHUNK,
        num_stages=1,  # as in `clusters`: pipelined, a product reads what is already overwritten if a sum reads it too
    )  # fmt: skip
    own = max(64, triton.next_power_of_2(triton.cdiv(count, 2)))
    join = _join.prepare(
        (batch,), count, first, side, count - side, pairs, OWN=own, OTHERS=OTHERS, num_warps=min(16, max(2, own // 64))
    )
    return best, join
