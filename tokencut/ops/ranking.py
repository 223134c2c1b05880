"""Decoupling attentive from inattentive tokens by class attention (arXiv 2211.11315, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencut.ops import kernels
from tokencut.ops.exporting import exporting, not_earlier, numbers, pick, put, running, whole


def ranking(scores: Tensor) -> Tensor:
    """Token numbers from the highest score to the lowest; equal scores by lower number.

    A stable sort, since `torch.topk` promises no order among equals: the same image must give the same tokens, alone
    or in any batch. In an exported graph a count.

    Args:
        scores: fp32 `(B, N)`.

    Returns:
        int64 `(B, N)`; int32 in an exported graph, as all token numbers.
    """
    if exporting():
        return put(numbers(scores, scores.shape[1]).expand_as(scores), ranks(scores))
    if kernels.usable(scores):
        return kernels.sorting.ranking(scores, True)
    return torch.sort(scores, dim=1, descending=True, stable=True).indices


def ranks(scores: Tensor) -> Tensor:
    """The place of each token in `ranking`.

    Args:
        scores: fp32 `(B, N)`.

    Returns:
        int64 `(B, N)`.
    """
    if exporting():
        count = scores.shape[1]
        behind = not_ahead(scores).sum(2).to(whole())
        # Scores that are no numbers are behind nothing, not even themselves: let their ranks be places all the same.
        # The sum is used twice: what is done to a sum of int32 alone OpenVINO 2026.4 does to the first N images alone.
        return count - behind - (behind == 0).to(whole())
    order = ranking(scores)
    return put(numbers(scores, scores.shape[1]).expand_as(order), order)


def not_ahead(scores: Tensor) -> Tensor:
    """Which tokens do not come before a token in `ranking`, itself among them.

    Args:
        scores: fp32 `(B, N)`.

    Returns:
        fp32 `(B, N, N)`: at `[:, i, j]` 1 where `j` is not before `i`, else 0.
    """
    if exporting():
        theirs, own = scores.unsqueeze(1), scores.unsqueeze(2)
        behind = torch.logical_or(theirs < own, torch.logical_and(theirs <= own, not_earlier(scores, scores.shape[1])))
        return behind.to(torch.float32)
    places = ranks(scores).float()
    # In place, which leaves a float: making a bool and turning that into a float took five times as long on a CPU.
    return (places.unsqueeze(1) - places.unsqueeze(2)).ge_(0.0)


def are_highest(scores: Tensor, count: int) -> Tensor:
    """Which tokens are the `count` of highest score; of equal scores the lower numbers.

    Args:
        scores: fp32 `(B, N)`.
        count: `M`.

    Returns:
        Bool `(B, N)`.
    """
    if exporting():
        return not_ahead(scores).sum(2) > scores.shape[1] - count
    chosen = _chosen_at_once(scores, count)
    return marked(ranking(scores)[:, :count] if chosen is None else chosen, scores.shape[1])


def marked(found: Tensor, count: int) -> Tensor:
    """Which of the numbers `0..count - 1` are among those of an image.

    Args:
        found: `(B, M)`.
        count: `N`.

    Returns:
        Bool `(B, N)`.
    """
    none = torch.zeros_like(numbers(found, count).expand(found.shape[0], -1))
    return none.scatter(1, found.to(torch.int64), torch.ones_like(found)) > 0


def _chosen_at_once(scores: Tensor, count: int) -> Tensor | None:
    """`highest` by one launch of a kernel; None where there is none for these scores."""
    if scores.shape[1] <= kernels.CHOSEN_AT_ONCE and kernels.usable(scores):
        return kernels.sorting.highest(scores, count)
    return None


def highest(scores: Tensor, count: int) -> Tensor:
    """The numbers of the `count` tokens of highest score, ascending; of equal scores the lower numbers.

    Args:
        scores: fp32 `(B, N)`.
        count: `M`.

    Returns:
        int64 `(B, M)`.
    """
    if exporting():
        so_far = running(are_highest(scores, count))[:, :-1]
        # As many tokens as come before the first that makes them one more; of scores that are no numbers too it is one.
        before = so_far.unsqueeze(1) <= numbers(scores, count).view(1, count, 1)
        return before.to(torch.float32).sum(2).to(whole())
    chosen = _chosen_at_once(scores, count)
    return ascending(ranking(scores)[:, :count]) if chosen is None else chosen


def ascending(found: Tensor) -> Tensor:
    """The same token numbers in ascending order, int64 `(B, M)`."""
    if exporting():
        return put(found, ranks(-found))
    if kernels.usable(found):
        return found.gather(1, kernels.sorting.ranking(found, False))
    return found.sort(dim=1).values


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
        return pick(values, index)
    return values.gather(1, index.to(torch.int64).unsqueeze(2).expand(-1, -1, values.shape[2]))


def take_rows(features: Tensor, index: Tensor) -> Tensor:
    """`features[b, index[b, i]]`, `(B, M, D)` and `(B, I)` to `(B, I, D)`: 0.05 ms on a CPU where a gather takes 0.42
    (4 x 256 x 384).
    """
    batch, count, width = features.shape
    if exporting():
        return features.gather(1, index.to(torch.int64).unsqueeze(2).expand(-1, -1, width))
    offset = count * torch.arange(batch, device=index.device).unsqueeze(1)
    return features.reshape(batch * count, width).index_select(0, (index + offset).flatten()).view(*index.shape, width)
