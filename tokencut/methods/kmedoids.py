"""K-medoids of all image tokens, started from the attentive ones; compared in arXiv 2308.04657."""

from __future__ import annotations

from dataclasses import dataclass

from tokencut.methods.base import FEATURE_KINDS, Method, StageInput, StageShape, option, register
from tokencut.ops.exporting import put
from tokencut.ops.grouping import Grouping, ordered_average
from tokencut.ops.medoids import medoid_clusters
from tokencut.ops.merge_weights import WEIGHT_KINDS, raw_weights
from tokencut.ops.ranking import ranking, take


@register
@dataclass(frozen=True)
class KMedoids(Method):
    """Clusters around medoids; the tokens of highest class attention are the first. A cluster becomes its average.

    The same weights decide what a member adds to a medoid's total distance and to the average. Ties go to the more
    attentive token.
    """

    name = "kmedoids"
    source = "arXiv 2308.04657"
    prop_attn = True

    iterations: int = option(3, "how often medoids are chosen anew; 0 leaves the attentive tokens", low=0, high=1_000)
    features: str = option("tokens", "what clusters compare", choices=FEATURE_KINDS)
    weights: str = option("size", "what a member of a cluster is weighted by", choices=WEIGHT_KINDS)

    def decide(self, stage_input: StageInput, budget: int) -> Grouping:
        attention, sizes = stage_input.attention.class_attention(), stage_input.tokens.known_sizes()
        weight = raw_weights(self.weights, sizes, attention)
        # Clustered in order of attention, so that ties do not depend on where a token stands.
        order = ranking(attention)
        points = take(stage_input.features(self.features), order)
        ranked = medoid_clusters(points, take(weight, order), budget, self.iterations)
        return ordered_average(put(ranked, order), weight, sizes, budget)

    def macs(self, shape: StageShape) -> int:
        return shape.tokens * shape.tokens * shape.feature_width(self.features)

    def merges(self) -> bool:
        return True
