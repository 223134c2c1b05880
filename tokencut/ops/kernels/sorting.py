"""Ranking scores on a GPU, `ops.ranking.ranking`, by comparing each with all.

The compiler's own kernel for `torch.sort` took over a hundred seconds to build (torch 2.11, 196 scores); the eager one
takes a handful of launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencut.ops.kernels import opaque
from tokencut.ops.kernels.launching import Kernel, Launch, by_shape

TOKENS, CHUNK = 16, 128  # tokens that a program copies at once, and features of them
OWN, OTHERS = 128, 16  # scores that a program ranks, and those it compares them with at once


@triton.jit
def _number(scores, there):
    """Scores to be compared: what is no number comes last, so that ranks are all different."""
    loaded = tl.load(scores, mask=there, other=0)
    return tl.where(loaded == loaded, loaded, -float("inf"))


@triton.jit
def _ahead(scores, mine, own, count, DESCENDING: tl.constexpr, OTHERS: tl.constexpr):
    """How many scores come before each of one's own, equal ones by lower number."""
    rank = tl.zeros(own.shape, tl.int32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        there = others < count
        theirs = _number(scores + others, there) if DESCENDING else tl.load(scores + others, mask=there)
        before = theirs[:, None] > mine[None, :] if DESCENDING else theirs[:, None] < mine[None, :]
        tied = (theirs[:, None] == mine[None, :]) & (others[:, None] < own[None, :])
        rank += tl.sum(((before | tied) & there[:, None]).to(tl.int32), 0)
    return rank


@Kernel
@triton.jit
def _rank(scores, order, count, DESCENDING: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr):
    """Writes the number of each owned score to its place."""
    image = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    scores += image * count
    mine = _number(scores + own, own < count) if DESCENDING else tl.load(scores + own, mask=own < count)
    rank = _ahead(scores, mine, own, count, DESCENDING, OTHERS)
    tl.store(order + image * count + rank, own.to(tl.int64), mask=own < count)


@opaque(
    "(Tensor scores, bool descending) -> Tensor",
    lambda scores, descending: scores.new_empty(scores.shape, dtype=torch.int64),
)
def ranking(scores: Tensor, descending: bool) -> Tensor:
    """Numbers of the scores of each image in order, equal ones by lower number.

    Args:
        scores: `(B, N)`.
        descending: Whether the highest comes first.

    Returns:
        int64 `(B, N)`.
    """
    batch, count = scores.shape
    order = torch.empty((batch, count), dtype=torch.int64, device=scores.device)
    _ranking(batch, count, descending)(scores.contiguous(), order)
    return order


@by_shape
def _ranking(batch: int, count: int, descending: bool) -> Launch:
    """Ranks so many scores, for `ranking`."""
    return _rank.prepare((triton.cdiv(count, OWN), batch), count, DESCENDING=descending, OWN=OWN, OTHERS=OTHERS)


@triton.jit
def mean_of_rows(rows, columns, count, row_stride, ROWS: tl.constexpr):
    """The mean of rows of scores at some columns, added up one after the other."""
    total = tl.zeros(columns.shape, tl.float32)
    for row in range(0, ROWS):
        total += tl.load(rows + row * row_stride + columns, mask=columns < count, other=0.0)
    return total / ROWS


@triton.jit
def _choose(scores, chosen, own, count, wanted, OTHERS: tl.constexpr):
    """Writes the numbers of an image's highest scores, ascending; all of its tokens are owned."""
    mine = _number(scores + own, own < count)
    among = (_ahead(scores, mine, own, count, True, OTHERS) < wanted) & (own < count)
    place = tl.cumsum(among.to(tl.int32), 0) - 1
    tl.store(chosen + place, own.to(tl.int64), mask=among)


@Kernel
@triton.jit
def _highest(scores, chosen, count, wanted, stride, OWN: tl.constexpr, OTHERS: tl.constexpr):
    """The numbers of the highest scores of an image."""
    image = tl.program_id(0).to(tl.int64)
    _choose(scores + image * stride, chosen + image * wanted, tl.arange(0, OWN), count, wanted, OTHERS)


@opaque(
    "(Tensor scores, int count) -> Tensor",
    lambda scores, count: scores.new_empty((scores.shape[0], count), dtype=torch.int64),
)
def highest(scores: Tensor, count: int) -> Tensor:
    """Numbers of the highest scores of each image, `ops.ranking.highest`, in one launch.

    Args:
        scores: fp32 `(B, N)`, `N` at most `CHOSEN_AT_ONCE`.
        count: `M`.

    Returns:
        int64 `(B, M)`, ascending.
    """
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    batch, tokens = scores.shape
    chosen = torch.empty((batch, count), dtype=torch.int64, device=scores.device)
    _choosing(batch, tokens, count, scores.stride(0))(scores, chosen)
    return chosen


@by_shape
def _choosing(batch: int, tokens: int, count: int, stride: int) -> Launch:
    """Chooses from so many scores, for `highest`."""
    own = triton.next_power_of_2(tokens)
    return _highest.prepare(
        (batch,), tokens, count, stride, OWN=own, OTHERS=OTHERS, num_warps=max(1, own // 64)
    )  # fmt: skip


@Kernel
@triton.jit
def _keep(features, rows, kept, chosen, count, wanted, batch_stride, token_stride,
          ROWS: tl.constexpr, PREFIX: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr,
          TOKENS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Copies some features of an image's prefix tokens and of those whose mean score is highest.

    Behind the rows there is room for their mean. Each program of an image makes the same choice and writes the same.
    """
    image = tl.program_id(1).to(tl.int64)
    own = tl.arange(0, OWN)
    columns = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    wide = columns < WIDTH
    rows += image * (ROWS + 1) * (PREFIX + count) + PREFIX
    mean = rows + ROWS * (PREFIX + count)
    chosen += image * wanted
    tl.store(mean + own, mean_of_rows(rows, own, count, PREFIX + count, ROWS), mask=own < count)
    tl.debug_barrier()  # what one thread has written another will read
    _choose(mean, chosen, own, count, wanted, OTHERS)
    tl.debug_barrier()
    features += image * batch_stride
    kept += image * (PREFIX + wanted) * WIDTH
    for token in tl.static_range(PREFIX):
        first = tl.load(features + token * token_stride + columns, mask=wide)
        tl.store(kept + token * WIDTH + columns, first, mask=wide)
    for start in range(0, wanted, TOKENS):
        places = start + tl.arange(0, TOKENS)
        inside = (places[:, None] < wanted) & wide[None, :]
        tokens = PREFIX + tl.load(chosen + places, mask=places < wanted, other=0)
        values = tl.load(features + tokens[:, None] * token_stride + columns[None, :], mask=inside)
        tl.store(kept + (PREFIX + places[:, None]) * WIDTH + columns[None, :], values, mask=inside)


@by_shape
def keeping(shape: tuple[int, ...], strides: tuple[int, ...], rows: int, prefix: int, count: int) -> Launch:
    """Keeps `count` tokens of features of a shape and strides by the mean of so many rows of scores."""
    batch, tokens, width = shape
    own = triton.next_power_of_2(tokens - prefix)
    return _keep.prepare(
        (triton.cdiv(width, CHUNK), batch), tokens - prefix, count, *strides[:2], ROWS=rows, PREFIX=prefix, WIDTH=width,
        OWN=own, OTHERS=OTHERS, TOKENS=TOKENS, CHUNK=CHUNK, num_warps=max(2, own // 64),
    )  # fmt: skip
