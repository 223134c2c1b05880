"""Density-peak clustering (Rodriguez & Laio 2014), the simplified form of arXiv 2204.08680 and 2211.11315."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencut.reduction.decouple import ranking


def squared_distances(points: Tensor) -> Tensor:
    """Squared Euclidean distances between all points, by one batched product.

    Args:
        points: fp32 `(B, n, F)`.

    Returns:
        fp32 `(B, n, n)`, not negative, exactly 0 on the diagonal.
    """
    norms = points.square().sum(2)
    sums = norms.unsqueeze(2) + norms.unsqueeze(1)
    distances = torch.baddbmm(sums, points, points.transpose(1, 2), alpha=-2)
    distances = distances.clamp(min=0.0, max=torch.finfo(torch.float32).max)
    return distances * (1 - torch.eye(points.shape[1], device=points.device))


def peak_scores(distances: Tensor, width: int, neighbours: int, log_mass: Tensor | None = None) -> Tensor:
    """How much each point is a centre: log density plus log separation.

    Density is `mass * exp(-mean squared distance to the nearest / width)`; separation the distance to the nearest
    denser point, for the densest the largest distance of its image. Logarithms, since the density underflows on tokens
    of large norm.

    Args:
        distances: Squared distances, fp32 `(B, n, n)`.
        width: `F`, the numbers in a point.
        neighbours: How many nearest count for the density, the point itself among them.
        log_mass: Logarithm of each point's mass, fp32 `(B, n)`; every mass is 1 where None, as published.

    Returns:
        fp32 `(B, n)`; higher is more of a centre, `-inf` for a point that coincides with a denser one.
    """
    count = distances.shape[1]
    log_density = -_mean_of_nearest(distances, min(neighbours, count)) / width
    if log_mass is not None:
        log_density = log_density + log_mass
    order = ranking(log_density)
    rank = torch.arange(count, device=distances.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(1, order, rank)
    # Added rather than filled in: a masked fill took five times as long on a CPU (2.2 ms of 16 x 196 x 196).
    not_denser = rank.unsqueeze(1) >= rank.unsqueeze(2)
    to_denser = torch.add(distances, not_denser, alpha=torch.finfo(torch.float32).max).amin(2)
    separation = torch.where(rank == 0, distances.amax((1, 2)).unsqueeze(1), to_denser)
    return log_density + 0.5 * separation.log()


def _mean_of_nearest(distances: Tensor, neighbours: int) -> Tensor:
    """Mean distance to the nearest points, the point itself among them, `(B, n)`."""
    if neighbours < 2 or neighbours > 4:
        return distances.topk(neighbours, dim=2, largest=False).values.mean(2)
    # A few minima in turn: finding them by topk took a fifth of a stage on a GPU. The point itself is at 0.
    far = torch.finfo(torch.float32).max
    others = torch.add(distances, torch.eye(distances.shape[1], device=distances.device), alpha=far)
    found = []
    for _ in range(neighbours - 2):
        nearest = others.argmin(2, keepdim=True)
        found.append(others.gather(2, nearest).squeeze(2))
        others = others.scatter(2, nearest, far)
    return sum(found, others.amin(2)) / neighbours


def nearest_centre(distances: Tensor, centres: Tensor) -> Tensor:
    """The centre each point is nearest to; a centre joins itself, equal distances go to the earlier centre.

    Args:
        distances: Distances in any monotonic form, `(B, n, n)`.
        centres: Numbers of the centres, int64 `(B, C)`.

    Returns:
        Position in `centres`, int64 `(B, n)`.
    """
    count = distances.shape[2]
    rows = distances.gather(1, centres.unsqueeze(2).expand(-1, -1, count))
    own = torch.arange(centres.shape[1], device=centres.device).expand_as(centres)
    # argmin is documented to return the first of equal minima.
    return rows.argmin(1).scatter(1, centres, own)


def density_clusters(points: Tensor, clusters: int, neighbours: int, log_mass: Tensor | None = None) -> Tensor:
    """Clusters the points of each image around its density peaks.

    Args:
        points: fp32 `(B, n, F)`.
        clusters: `C`, at most `n`.
        neighbours: How many nearest count for the density, the point itself among them.
        log_mass: Logarithm of each point's mass, fp32 `(B, n)`; see `peak_scores`.

    Returns:
        Cluster of each point, int64 `(B, n)`, numbered by the order of their centres among the points.
    """
    distances = squared_distances(points)
    scores = peak_scores(distances, points.shape[2], neighbours, log_mass)
    centres = ranking(scores)[:, :clusters].sort(dim=1).values
    return nearest_centre(distances, centres)
