"""Keep the attentive tokens, fuse the rest into one: EViT, arXiv 2202.07800."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokencut.methods.base import Method, StageInput, StageShape, option, register
from tokencut.ops.exporting import numbers, running
from tokencut.ops.grouping import Grouping, ordered_average
from tokencut.ops.ranking import are_highest


@register
@dataclass(frozen=True)
class EViT(Method):
    """The tokens of highest class attention stay; the others become one token, their attention-weighted sum.

    The published sum is not divided by its weights, so the fused token is short where little attention was left.
    """

    name = "evit"
    source = "arXiv 2202.07800"
    prop_attn = False

    normalized: bool = option(False, "divide the fused token's weights by their sum")
    extra_token: bool = option(False, "the published count: the fused token comes on top of the budget")

    def decide(self, stage_input: StageInput, budget: int) -> Grouping:
        attention, sizes = stage_input.attention.class_attention(), stage_input.tokens.known_sizes()
        goes = torch.logical_not(are_highest(attention, budget - 1))
        gone = running(goes)
        # The fused token stands where the first that goes into it stood.
        fused = (gone == 0).to(gone.dtype).sum(1, keepdim=True, dtype=gone.dtype)
        place = numbers(gone, gone.shape[1])
        group = torch.where(goes, fused, place - gone + (gone > 0).to(gone.dtype))
        if self.normalized:
            return ordered_average(group, attention, sizes, budget)
        weight = torch.where(goes, attention, torch.ones_like(attention))
        return Grouping(group, weight, budget, ordered=True)

    def tokens_out(self, tokens: int, budget: int) -> int:
        return budget + 1 if self.extra_token else budget

    def attentive(self, tokens: int, budget: int) -> int:
        return max(1, budget - 1)  # the last one is the fused token

    def macs(self, shape: StageShape) -> int:
        return 0

    def merges(self) -> bool:
        return True

    def averages(self) -> bool:
        return False  # one token holds whatever is not attentive
