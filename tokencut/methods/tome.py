"""Bipartite soft matching: ToMe, arXiv 2210.09461."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tokencut.methods.base import Method, StageInput, StageShape, register
from tokencut.ops import kernels
from tokencut.ops.exporting import numbers, pick, running
from tokencut.ops.grouping import Grouping, group_average, membership
from tokencut.ops.matching import in_turn, match_in_turn


@register
@dataclass(frozen=True)
class ToMe(Method):
    """Tokens with similar keys merge, in rounds of at most half of them each, weighted by size.

    Tokens stand on two sides by their position in the sequence, prefix included: those at even positions are merged
    away into those at odd ones. What is left of the first side leaves before the second, as published, since that order
    decides the sides of the next round and of later blocks.
    """

    name = "tome"
    source = "arXiv 2210.09461"
    prop_attn = True

    def decide(self, stage_input: StageInput, budget: int) -> Grouping:
        keys, sizes = stage_input.attention.keys(), stage_input.tokens.known_sizes()
        if kernels.usable(keys, sizes) and sizes.shape[1] <= kernels.MATCHED_AT_ONCE:
            return merged_by_kernels(keys, sizes, stage_input.tokens.num_prefix_tokens, budget)
        group = numbers(sizes, sizes.shape[1]).expand(sizes.shape[0], -1)
        current, now = keys, sizes.shape[1]
        for leaving in rounds(now, budget):
            if now < sizes.shape[1]:
                # A group's key is the mean over its patches: keys are linear, so it can be taken from the first ones.
                matrix = membership(group, now).to(sizes.dtype) * group_average(group, sizes, sizes, now).unsqueeze(1)
                current = torch.matmul(matrix, keys)
            group = pick(match_round(current, stage_input.tokens.num_prefix_tokens, now - leaving), group)
            now = leaving
        return Grouping(group, group_average(group, sizes, sizes, budget), budget)

    def macs(self, shape: StageShape) -> int:
        macs, now = 0, shape.tokens
        for leaving in rounds(shape.tokens, shape.budget):
            averaging = now * shape.tokens if now < shape.tokens else 0
            macs += (averaging + (now // 2) * (now - now // 2)) * shape.key_width
            now = leaving
        return macs

    def reads_attention(self) -> bool:
        return False

    def merges(self) -> bool:
        return True


def merged_by_kernels(keys: Tensor, sizes: Tensor, prefix: int, budget: int) -> Grouping:
    """The same decision on a GPU, each round in two launches."""
    alternating_average = kernels.matching.alternating_average
    after = rounds(sizes.shape[1], budget)
    group, weight, held = alternating_average(keys, sizes, prefix, sizes.shape[1] - after[0])
    for now, leaving in pairwise(after):
        means = torch.matmul(membership(group, now) * weight.unsqueeze(1), keys)
        joined, share, held = alternating_average(means, held, prefix, now - leaving)
        group, weight = joined.gather(1, group), weight * share.gather(1, group)
    return Grouping(group, weight, budget, held)


def rounds(tokens: int, budget: int) -> list[int]:
    """Tokens after each round: at most half are merged away in one."""
    after = []
    while tokens > budget:
        tokens = max(budget, tokens - tokens // 2)
        after.append(tokens)
    return after


def match_round(points: Tensor, prefix: int, pairs: int) -> Tensor:
    """One round of bipartite soft matching.

    Args:
        points: What is compared (cosine), fp32 `(B, n, F)`, image tokens only.
        prefix: `P`, how many prefix tokens stand before them; these take no part, but shift the alternation.
        pairs: How many tokens are merged away, at most `n // 2`.

    Returns:
        Group of each token, int64 `(B, n)`: the rest of the even positions in order, then the odd positions in order.
    """
    batch, count, _ = points.shape
    gone, best = match_in_turn(points, prefix % 2, pairs)
    side = gone.shape[1]
    behind = numbers(points, count - side, side - pairs).expand(batch, -1)
    left = running(torch.logical_not(gone)) - 1
    return in_turn(torch.where(gone, best + (side - pairs), left), behind, prefix % 2)
