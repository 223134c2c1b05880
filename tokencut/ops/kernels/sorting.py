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

OWN, OTHERS = 128, 16  # scores that a program ranks, and those it compares them with at once


@triton.jit
def _rank(scores, order, count, DESCENDING: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr):
    """Writes the number of each owned score to its place."""
    image = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    mine = tl.load(scores + image * count + own, mask=own < count)
    rank = tl.zeros((OWN,), tl.int32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        theirs = tl.load(scores + image * count + others, mask=others < count)
        ahead = theirs[:, None] > mine[None, :] if DESCENDING else theirs[:, None] < mine[None, :]
        tied = (theirs[:, None] == mine[None, :]) & (others[:, None] < own[None, :])
        rank += tl.sum(((ahead | tied) & (others[:, None] < count)).to(tl.int32), 0)
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
    # Zeros, since scores that are not numbers leave places free.
    order = torch.zeros((batch, count), dtype=torch.int64, device=scores.device)
    _rank[triton.cdiv(count, OWN), batch](
        scores.contiguous(), order, count, DESCENDING=descending, OWN=OWN, OTHERS=OTHERS
    )
    return order
