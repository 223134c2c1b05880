"""Keep the attentive tokens, drop the rest: the first control (arXiv 2202.07800 without its fused token)."""

from __future__ import annotations

from dataclasses import dataclass

from tokencut.methods.base import Method, StageInput, StageShape, register
from tokencut.ops.grouping import Selection


@register
@dataclass(frozen=True)
class TopK(Method):
    """The tokens of highest class attention stay, the others are dropped."""

    name = "topk"
    source = "arXiv 2202.07800"
    prop_attn = False

    def decide(self, stage_input: StageInput, budget: int) -> Selection:
        return stage_input.attention.most_attended(stage_input.tokens, budget)

    def macs(self, shape: StageShape) -> int:
        return 0

    def merges(self) -> bool:
        return False
