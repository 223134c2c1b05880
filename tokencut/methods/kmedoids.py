"""K-medoids of all image tokens, started from the attentive ones; compared in arXiv 2308.04657."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencut.methods.base import FEATURE_KINDS, Method, StageInput, StageShape, option, register
from tokencut.ops.density_peaks import nearest_centre, squared_distances
from tokencut.ops.grouping import Grouping, membership, ordered_average
from tokencut.ops.merge_weights import WEIGHT_KINDS, raw_weights
from tokencut.ops.ranking import ascending, ranking, take


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
        ranked = medoid_clusters(squared_distances(points), take(weight, order), budget, self.iterations)
        return ordered_average(torch.empty_like(ranked).scatter(1, order, ranked), weight, sizes, budget)

    def macs(self, shape: StageShape) -> int:
        return shape.tokens * shape.tokens * shape.feature_width(self.features)

    def merges(self) -> bool:
        return True


def medoid_clusters(distances: Tensor, weight: Tensor, clusters: int, iterations: int) -> Tensor:
    """Alternates between assigning each point to its nearest medoid and choosing each cluster's medoid.

    The first points are the first medoids. A cluster's medoid is the member with the least weighted total distance to
    all members. Ties go to the earlier point. No cluster is ever empty: a medoid belongs to its own.

    Args:
        distances: Squared distances, fp32 `(B, N, N)`.
        weight: What each point's distance counts for, fp32 `(B, N)`.
        clusters: `C`.
        iterations: How many times medoids are chosen.

    Returns:
        Cluster of each point, int64 `(B, N)`, numbered by the order of the medoids' numbers.
    """
    # The two members of a pair tie where they weigh the same: a product's last bit must not decide between them.
    distances = torch.minimum(distances, distances.transpose(1, 2))
    medoids = torch.arange(clusters, device=distances.device).expand(distances.shape[0], -1)
    group = nearest_centre(distances, medoids)
    for _ in range(iterations):
        together = group.unsqueeze(2) == group.unsqueeze(1)
        total = torch.where(together, distances * weight.unsqueeze(1), 0.0).sum(2)
        # argmin is documented to return the first of equal minima.
        candidates = torch.where(membership(group, clusters), total.unsqueeze(1), torch.inf)
        medoids = ascending(candidates.argmin(2))
        group = nearest_centre(distances, medoids)
    return group
