"""Density-peak clustering of all image tokens (DPC-KNN): TCFormer, arXiv 2204.08680."""

from __future__ import annotations

from dataclasses import dataclass

from tokencut.methods.base import FEATURE_KINDS, Method, StageInput, StageShape, option, register
from tokencut.ops.density_peaks import PeakRule, density_average
from tokencut.ops.grouping import Grouping
from tokencut.ops.merge_weights import WEIGHT_KINDS, raw_weights


@register
@dataclass(frozen=True)
class DPC(Method):
    """Every token joins the nearest of the budget's density peaks; a cluster becomes its members' average.

    TCFormer weighs members by a score it learns. Untrained, that score is the same for all: `weights=equal`.

    As published, the density depends on the scale of the features: a model with larger ones, which computes the same,
    gets other clusters, and the larger they are the less separation counts. `bat` has a rule without that.
    """

    name = "dpc"
    source = "arXiv 2204.08680"
    prop_attn = True

    neighbours: int = option(
        5, "nearest tokens that count for a density, the token itself among them", low=1, high=1_000
    )
    features: str = option("tokens", "what clusters compare", choices=FEATURE_KINDS)
    weights: str = option("equal", "what a member of a cluster is weighted by", choices=WEIGHT_KINDS)

    def decide(self, stage_input: StageInput, budget: int) -> Grouping:
        tokens = stage_input.tokens
        attention = stage_input.attention.class_attention() if self.reads_attention() else None
        alike = tokens.sizes is None and self.weights in ("size", "equal")
        weight, sizes = None if alike else raw_weights(self.weights, tokens.known_sizes(), attention), tokens.sizes
        return density_average(stage_input.features(self.features), weight, sizes, budget, PeakRule(self.neighbours))

    def macs(self, shape: StageShape) -> int:
        return shape.tokens * shape.tokens * shape.feature_width(self.features)

    def reads_attention(self) -> bool:
        return self.weights in ("attention", "product")

    def merges(self) -> bool:
        return True
