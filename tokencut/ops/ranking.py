"""Decoupling attentive from inattentive tokens by class attention (arXiv 2211.11315, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencut.ops import kernels


def ranking(scores: Tensor) -> Tensor:
    """Token numbers from the highest score to the lowest; equal scores by lower number.

    A stable sort, since `torch.topk` promises no order among equals: the same image must give the same tokens, alone
    or in any batch.

    Args:
        scores: fp32 `(B, N)`.

    Returns:
        int64 `(B, N)`.
    """
    if kernels.usable(scores):
        from tokencut.ops.kernels import sorting as kernel

        return kernel.ranking(scores, True)
    return torch.sort(scores, dim=1, descending=True, stable=True).indices


def highest(scores: Tensor, count: int) -> Tensor:
    """The numbers of the `count` tokens of highest score, ascending; of equal scores the lower numbers.

    Args:
        scores: fp32 `(B, N)`.
        count: `M`.

    Returns:
        int64 `(B, M)`.
    """
    if kernels.usable(scores):
        from tokencut.ops.kernels import sorting as kernel

        if scores.shape[1] <= kernel.CHOSEN_AT_ONCE:
            return kernel.highest(scores, count)
    return ascending(ranking(scores)[:, :count])


def ascending(numbers: Tensor) -> Tensor:
    """The same token numbers in ascending order, int64 `(B, M)`."""
    if kernels.usable(numbers):
        from tokencut.ops.kernels import sorting as kernel

        return numbers.gather(1, kernel.ranking(numbers, False))
    return numbers.sort(dim=1).values


def by_attention(attention: Tensor, attentive: int) -> tuple[Tensor, Tensor]:
    """Splits image tokens into the `attentive` ones of highest class attention and the rest.

    Args:
        attention: Class attention, fp32 `(B, N)`.
        attentive: `K`, how many are attentive.

    Returns:
        Attentive tokens by falling attention, int64 `(B, K)`, and inattentive tokens by number, int64 `(B, N - K)`.
    """
    order = ranking(attention)
    return order[:, :attentive], ascending(order[:, attentive:])


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of `values` `(B, N, F)` or entries of `(B, N)` at `index` `(B, M)`."""
    if values.dim() == 2:
        return values.gather(1, index)
    return values.gather(1, index.unsqueeze(2).expand(-1, -1, values.shape[2]))
