"""K-medoids, from given medoids on (compared in arXiv 2308.04657)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencut.ops import kernels
from tokencut.ops.density_peaks import nearest_centre, squared_distances
from tokencut.ops.grouping import membership
from tokencut.ops.ranking import ascending


def medoid_clusters(points: Tensor, weight: Tensor, clusters: int, iterations: int) -> Tensor:
    """Alternates between assigning each point to its nearest medoid and choosing each cluster's medoid.

    The first points are the first medoids. A cluster's medoid is the member with the least weighted total distance to
    all members. Ties go to the earlier point. No cluster is ever empty: a medoid belongs to its own.

    Args:
        points: `(B, N, F)` in any floating dtype; compared in fp32, by squared distance.
        weight: What each point's distance counts for, fp32 `(B, N)`.
        clusters: `C`.
        iterations: How many times medoids are chosen.

    Returns:
        Cluster of each point, int64 `(B, N)`, numbered by the order of the medoids' numbers.
    """
    if points.dtype in (torch.float16, torch.bfloat16) and kernels.usable(points, weight):
        from tokencut.ops.kernels import medoids as kernel

        if points.shape[1] <= kernel.AT_ONCE:
            return kernel.medoid_clusters(points, weight, clusters, iterations)
    distances = squared_distances(points)
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
