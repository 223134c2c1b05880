"""Density-peak clusters, and their averages, on a GPU: `reduction.density_peaks` in two launches instead of sixty.

One kernel makes the distances, on tensor cores in half precision: the products of half-precision numbers are exact in
fp32, so only the order of summation differs from an fp32 product. Another does all the rest (`kernels.phases`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencut.kernels import opaque
from tokencut.kernels.phases import run_phases

NEIGHBOURS = (3, 4)  # how many nearest can be counted, the point itself among them
SIDE, CHUNK = 64, 64  # of a tile of distances, and the features it adds up at once
OWN, OTHERS = 256, 16  # tokens that a program owns, and those it compares them with at once
WHOLE = 512  # up to so many tokens one program does all of an image; beyond, one launch a phase fills the GPU better


@triton.jit
def _distances(points, distances, count, batch_stride, row_stride,
               WIDTH: tl.constexpr, SIDE: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One tile of the squared distances of an image."""
    image = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    columns = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    points += image * batch_stride
    products = tl.zeros((SIDE, SIDE), tl.float32)
    row_norms = tl.zeros((SIDE,), tl.float32)
    column_norms = tl.zeros((SIDE,), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        features = start + tl.arange(0, CHUNK)
        a = tl.load(points + rows[:, None] * row_stride + features[None, :],
                    mask=(rows[:, None] < count) & (features[None, :] < WIDTH), other=0.0)  # fmt: skip
        b = tl.load(points + columns[None, :] * row_stride + features[:, None],
                    mask=(columns[None, :] < count) & (features[:, None] < WIDTH), other=0.0)  # fmt: skip
        products = tl.dot(a, b, products, input_precision="ieee")
        row_norms += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
        column_norms += tl.sum(b.to(tl.float32) * b.to(tl.float32), 0)
    squared = tl.maximum(row_norms[:, None] + column_norms[None, :] - 2.0 * products, 0.0)
    squared = tl.where(rows[:, None] == columns[None, :], 0.0, squared)
    tl.store(distances + (image * count + rows[:, None]) * count + columns[None, :], squared,
             mask=(rows[:, None] < count) & (columns[None, :] < count))  # fmt: skip


def _run(
    first: int, last: int, group: Tensor, clusters: int, groups: int, weight: Tensor, sizes: Tensor, *,
    distances: Tensor | None = None, integers: Tensor | None = None, mass: float = 0.0, width: int = 1,
    neighbours: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs phases `first` to `last`: group of each token, coefficients and sizes, as the last two write them."""
    batch, count = group.shape
    plane = batch * count
    floats = torch.empty(4 * plane, dtype=torch.float32, device=group.device)
    if integers is None:
        integers = torch.empty(2 * plane, dtype=torch.int32, device=group.device)
    share = torch.empty((batch, count), dtype=torch.float32, device=group.device)
    ordered = torch.empty((batch, count), dtype=torch.int64, device=group.device)
    leaving = torch.empty((batch, clusters), dtype=torch.float32, device=group.device)
    whole = count <= WHOLE
    own = min(OWN, max(64, triton.next_power_of_2(count)))
    spans = [(first, last)] if whole else [(phase, phase) for phase in range(first, last + 1)]
    for start, end in spans:
        run_phases[1 if whole else triton.cdiv(count, own), batch](
            floats if distances is None else distances, group, weight, sizes, floats, integers, share, ordered, leaving,
            count, plane, clusters, groups, mass, WIDTH=width, NEIGHBOURS=neighbours, SIZED=mass != 0.0,
            OWN=own, OTHERS=OTHERS, FIRST=start, LAST=end, WHOLE=whole, num_warps=8 if whole else 4,
        )  # fmt: skip
    return ordered, share, leaving


def squared_distances(points: Tensor) -> Tensor:
    """Squared distances between all points, `(B, n, F)` in any floating dtype to fp32 `(B, n, n)`."""
    batch, count, width = points.shape
    points = points if points.stride(2) == 1 else points.contiguous()
    distances = torch.empty((batch, count, count), dtype=torch.float32, device=points.device)
    tiles = triton.cdiv(count, SIDE)
    _distances[tiles, tiles, batch](
        points, distances, count, points.stride(0), points.stride(1), WIDTH=width, SIDE=SIDE,
        CHUNK=CHUNK if points.element_size() == 2 else CHUNK // 2,
    )  # fmt: skip
    return distances


def _three_empty(weight: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group of each token, coefficients, and sizes of the groups, in their shapes only."""
    held = weight.new_empty((weight.shape[0], groups))
    return torch.empty_like(weight, dtype=torch.int64), torch.empty_like(weight), held


@opaque(
    "(Tensor points, Tensor weight, Tensor sizes, int clusters, int neighbours, float mass)"
    " -> (Tensor, Tensor, Tensor)",
    lambda points, weight, sizes, clusters, neighbours, mass: _three_empty(weight, clusters),
)
def density_average(
    points: Tensor, weight: Tensor, sizes: Tensor, clusters: int, neighbours: int, mass: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters the points of each image around its density peaks and averages each cluster.

    Args:
        points: `(B, n, F)` in any floating dtype.
        weight: Raw weight of each point, fp32 `(B, n)`, not negative.
        sizes: Patches that each point holds, fp32 `(B, n)`.
        clusters: `C`, at most `n`.
        neighbours: How many nearest count for the density, the point itself among them: 3 or 4, at most `n`.
        mass: Power of its size by which a point is denser.

    Returns:
        Cluster of each point, int64 `(B, n)`, numbered by the smallest member; coefficients, fp32 `(B, n)`; patches
        held by each cluster, fp32 `(B, C)`.
    """
    batch, count, width = points.shape
    joined = torch.empty((batch, count), dtype=torch.int32, device=points.device)
    # Clusters are named by their centre until the last phase: `count` names are possible, and none is for "dropped".
    return _run(0, 5, joined, clusters, count, weight.contiguous(), sizes.contiguous(), mass=float(mass), width=width,
                neighbours=neighbours, distances=squared_distances(points))  # fmt: skip


@opaque(
    "(Tensor points, int clusters, int neighbours, Tensor? sizes, float mass) -> Tensor",
    lambda points, clusters, neighbours, sizes, mass: points.new_empty(points.shape[:2], dtype=torch.int64),
)
def density_clusters(points: Tensor, clusters: int, neighbours: int, sizes: Tensor | None, mass: float) -> Tensor:
    """As `density_average`, without the average.

    Returns:
        Cluster of each point, int64 `(B, n)`, numbered by the order of their centres among the points.
    """
    batch, count, width = points.shape
    joined = torch.empty((batch, count), dtype=torch.int32, device=points.device)
    integers = torch.empty(2 * batch * count, dtype=torch.int32, device=points.device)
    distances = squared_distances(points)
    known = distances if sizes is None else sizes.contiguous()
    _run(0, 3, joined, clusters, count, known, known, mass=0.0 if sizes is None else float(mass), width=width,
         neighbours=neighbours, distances=distances, integers=integers)  # fmt: skip
    centres = integers[: batch * count].view(batch, count)
    return centres.cumsum(1).gather(1, joined.long()) - 1


@opaque(
    "(Tensor group, Tensor weight, Tensor sizes, int count) -> (Tensor, Tensor, Tensor)",
    lambda group, weight, sizes, count: _three_empty(weight, count),
)
def ordered_average(group: Tensor, weight: Tensor, sizes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers groups by their smallest member and turns raw weights into coefficients.

    Args:
        group: Group of each token, int64 `(B, N)`, within `0..M-1` in any numbering, no group empty; `M` for none.
        weight: Raw weight of each token, fp32 `(B, N)`, not negative.
        sizes: Patches held by each token, fp32 `(B, N)`.
        count: `M`, the number of groups.

    Returns:
        Group of each token in that order, int64 `(B, N)`; coefficients, fp32 `(B, N)`; patches held by each group, fp32
        `(B, M)`.
    """
    return _run(4, 5, group.contiguous(), count, count, weight.contiguous(), sizes.contiguous())
