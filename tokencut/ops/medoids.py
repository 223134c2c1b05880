"""K-medoids, from given medoids on (compared in arXiv 2308.04657)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencut.ops import kernels
from tokencut.ops.density_peaks import nearest_marked, squared_distances
from tokencut.ops.exporting import beyond, numbers, whole
from tokencut.ops.ranking import marked


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
    half = points.dtype in (torch.float16, torch.bfloat16)
    if half and kernels.usable(points, weight) and points.shape[1] <= kernels.medoids.AT_ONCE:
        return kernels.medoids.medoid_clusters(points, weight, clusters, iterations)
    distances = squared_distances(points)
    # The two members of a pair tie where they weigh the same: a product's last bit must not decide between them.
    distances = torch.minimum(distances, distances.transpose(1, 2))
    first = numbers(distances, distances.shape[1]) < clusters
    group = nearest_marked(distances, first.expand(distances.shape[0], -1))
    centre = numbers(distances, clusters).view(1, -1, 1).float()
    for _ in range(iterations):
        # Masks of floats, made in place: on a CPU they take a fifth of the time of bools.
        own = group.float().unsqueeze(1)
        together = (own - own.transpose(1, 2)).eq_(0.0)
        total = (distances * weight.unsqueeze(1) * together).sum(2).unsqueeze(1)
        others = (own - centre).ne_(0.0)
        # argmin is documented to return the first of equal minima.
        medoids = torch.addcmul(total, others, beyond(total)).argmin(2).to(whole())
        group = nearest_marked(distances, marked(medoids, distances.shape[1]))
    return group
