"""K-medoids on a GPU, `ops.medoids`: one program an image instead of a dozen launches a round.

Each phase writes what the next reads, for all tokens of an image, behind a barrier; see `ops.kernels.phases`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencut.ops.kernels import opaque
from tokencut.ops.kernels.clusters import LANES, OTHERS, distances_and_lengths
from tokencut.ops.kernels.launching import Kernel, Launch, by_shape
from tokencut.ops.kernels.phases import join_centres

AT_ONCE = 512  # up to so many points one program does an image; beyond, plain operations fill the GPU better


@triton.jit
def _totals(image, own, distances, weight, joined, totals, count, OTHERS: tl.constexpr):
    """The weighted total distance of each owned point to its cluster."""
    mine = tl.load(joined + image * count + own, mask=own < count, other=-1)
    total = tl.zeros((OTHERS, own.shape[0]), tl.float32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        inside = (others < count)[:, None] & (own < count)[None, :]
        fellow = tl.load(joined + image * count + others, mask=others < count, other=-2)[:, None] == mine[None, :]
        # On the diagonal stand lengths.
        apart = fellow & inside & (others[:, None] != own[None, :])
        squared = tl.load(distances + (image * count + others)[:, None] * count + own[None, :], mask=apart, other=0.0)
        heavy = tl.load(weight + image * count + others, mask=others < count, other=0.0)
        total += squared * heavy[:, None]
    tl.store(totals + image * count + own, tl.sum(total, 0), mask=own < count)


@triton.jit
def _elect(image, own, joined, totals, centres, count, OTHERS: tl.constexpr):
    """1 for the owned points with the least total of their cluster, the earlier of equal ones."""
    mine = tl.load(joined + image * count + own, mask=own < count, other=-1)
    least = tl.load(totals + image * count + own, mask=own < count, other=0.0)
    beaten = tl.zeros((OTHERS, own.shape[0]), tl.int32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        fellow = tl.load(joined + image * count + others, mask=others < count, other=-2)[:, None] == mine[None, :]
        theirs = tl.load(totals + image * count + others, mask=others < count, other=0.0)[:, None]
        before = (theirs < least[None, :]) | ((theirs == least[None, :]) & (others[:, None] < own[None, :]))
        beaten += (fellow & before).to(tl.int32)
    tl.store(centres + image * count + own, (tl.sum(beaten, 0) == 0).to(tl.int32), mask=own < count)


@Kernel
@triton.jit
def _medoids(distances, weight, centres, joined, totals, group, count, clusters, ITERATIONS: tl.constexpr,
             OWN: tl.constexpr, OTHERS: tl.constexpr):  # fmt: skip
    """The clusters of an image."""
    image = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, OWN)
    tl.store(centres + image * count + own, (own < clusters).to(tl.int32), mask=own < count)
    tl.debug_barrier()
    join_centres(image, own, distances, centres, joined, count, count, OTHERS)
    tl.debug_barrier()
    for _ in range(ITERATIONS):
        _totals(image, own, distances, weight, joined, totals, count, OTHERS)
        tl.debug_barrier()
        _elect(image, own, joined, totals, centres, count, OTHERS)
        tl.debug_barrier()
        join_centres(image, own, distances, centres, joined, count, count, OTHERS)
        tl.debug_barrier()
    chosen = tl.load(centres + image * count + own, mask=own < count, other=0)
    tl.debug_barrier()
    tl.store(centres + image * count + own, tl.cumsum(chosen, 0) - 1, mask=own < count)
    tl.debug_barrier()
    medoid = tl.load(joined + image * count + own, mask=own < count, other=0)
    number = tl.load(centres + image * count + medoid, mask=own < count, other=0)
    # Where distances are no numbers a cluster may have several medoids.
    number = tl.minimum(tl.maximum(number, 0), clusters - 1)
    tl.store(group + image * count + own, number.to(tl.int64), mask=own < count)


@opaque(
    "(Tensor points, Tensor weight, int clusters, int iterations) -> Tensor",
    lambda points, weight, clusters, iterations: points.new_empty(points.shape[:2], dtype=torch.int64),
)
def medoid_clusters(points: Tensor, weight: Tensor, clusters: int, iterations: int) -> Tensor:
    """Alternates between assigning each point to its nearest medoid and choosing each cluster's medoid.

    Args:
        points: `(B, n, F)` in any floating dtype, `n` at most `AT_ONCE`; the first are the first medoids.
        weight: What each point's distance counts for, fp32 `(B, n)`.
        clusters: `C`.
        iterations: How many times medoids are chosen.

    Returns:
        Cluster of each point, int64 `(B, n)`, numbered by the order of the medoids' numbers.
    """
    batch, count, _ = points.shape
    distances = distances_and_lengths(points if points.stride(2) == 1 else points.contiguous())
    integers = torch.empty((2, batch, count), dtype=torch.int32, device=points.device)
    totals = torch.empty((batch, count), dtype=torch.float32, device=points.device)
    group = torch.empty((batch, count), dtype=torch.int64, device=points.device)
    launch = _alternating(batch, count, clusters, iterations)
    launch(distances, weight.contiguous(), integers[0], integers[1], totals, group)
    return group


@by_shape
def _alternating(batch: int, count: int, clusters: int, iterations: int) -> Launch:
    """Clusters so many points, for `medoid_clusters`."""
    own = max(64, triton.next_power_of_2(count))
    return _medoids.prepare(
        (batch,), count, clusters, ITERATIONS=iterations, OWN=own, OTHERS=OTHERS, num_warps=LANES * own // 32
    )
