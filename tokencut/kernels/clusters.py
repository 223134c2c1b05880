"""Density-peak clusters, and their averages, on a GPU: `reduction.density_peaks` in two launches instead of sixty.

One kernel makes the distances, on tensor cores in half precision: the products of half-precision numbers are exact in
fp32, so only the order of summation differs from an fp32 product. Another does all the rest (`kernels.phases`).
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Work:
    """What the phases of one decision read and write; `plane` numbers for each kind of scratch."""

    group: Tensor
    weight: Tensor
    sizes: Tensor
    floats: Tensor
    integers: Tensor
    share: Tensor
    ordered: Tensor
    leaving: Tensor

    @classmethod
    def of(cls, group: Tensor, weight: Tensor, sizes: Tensor, clusters: int) -> _Work:
        """Allocates scratch and results for a grouping of `clusters` groups."""
        plane = group.numel()
        return cls(
            group, weight.contiguous(), sizes.contiguous(),
            floats=torch.empty(4 * plane, dtype=torch.float32, device=group.device),
            integers=torch.empty(2 * plane, dtype=torch.int32, device=group.device),
            share=torch.empty(group.shape, dtype=torch.float32, device=group.device),
            ordered=torch.empty(group.shape, dtype=torch.int64, device=group.device),
            leaving=torch.empty((group.shape[0], clusters), dtype=torch.float32, device=group.device),
        )  # fmt: skip

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Group of each token in order, coefficients, and sizes of the groups."""
        return self.ordered, self.share, self.leaving

    def run(
        self, first: int, last: int, shape: tuple[int, int], clusters: int, groups: int,
        distances: Tensor | None = None, mass: float = 0.0, width: int = 1, neighbours: int = 3,
    ) -> None:  # fmt: skip
        """Phases `first` to `last` for `shape[0]` images, or windows, of `shape[1]` tokens."""
        batch, count = shape
        whole = count <= WHOLE
        own = min(OWN, max(64, triton.next_power_of_2(count)))
        for start, end in [(first, last)] if whole else [(phase, phase) for phase in range(first, last + 1)]:
            run_phases[1 if whole else triton.cdiv(count, own), batch](
                self.floats if distances is None else distances, self.group, self.weight, self.sizes, self.floats,
                self.integers, self.share, self.ordered, self.leaving, count, self.group.numel(), clusters, groups,
                mass, WIDTH=width, NEIGHBOURS=neighbours, SIZED=mass != 0.0, OWN=own, OTHERS=OTHERS, FIRST=start,
                LAST=end, WHOLE=whole, num_warps=8 if whole else 4,
            )  # fmt: skip

    def cluster(self, points: Tensor, clusters: int, neighbours: int, mass: float, parts: int) -> None:
        """Phases 0 to 3: names each token's cluster by its centre's number, in `group`."""
        batch, count, width = points.shape
        window = (batch * parts, count // parts)
        distances = squared_distances(points.reshape(*window, width))
        if parts == 1:
            self.run(0, 3, window, clusters, count, distances, mass, width, neighbours)
            return
        self.run(0, 1, window, clusters, count, distances, mass, width, neighbours)
        scores = self.floats[2 * self.group.numel() : 3 * self.group.numel()].view(window)
        scores.scatter_(1, scores.argmax(1, keepdim=True), torch.inf)  # one centre a window at least
        self.run(2, 2, (batch, count), clusters, count)
        self.run(3, 3, window, clusters, count, distances)
        self.group.view(batch, parts, -1).add_(
            torch.arange(0, count, window[1], dtype=torch.int32, device=points.device).unsqueeze(1)
        )


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
    "(Tensor points, Tensor weight, Tensor sizes, int clusters, int neighbours, float mass, int parts)"
    " -> (Tensor, Tensor, Tensor)",
    lambda points, weight, sizes, clusters, neighbours, mass, parts: _three_empty(weight, clusters),
)
def density_average(
    points: Tensor, weight: Tensor, sizes: Tensor, clusters: int, neighbours: int, mass: float, parts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters the points of each image around its density peaks and averages each cluster.

    Args:
        points: `(B, n, F)` in any floating dtype.
        weight: Raw weight of each point, fp32 `(B, n)`, not negative.
        sizes: Patches that each point holds, fp32 `(B, n)`.
        clusters: `C`, at most `n`.
        neighbours: How many nearest count for the density, the point itself among them: 3 or 4, at most `n / parts`.
        mass: Power of its size by which a point is denser.
        parts: Windows within which points are compared, a divisor of `n`, at most `C`.

    Returns:
        Cluster of each point, int64 `(B, n)`, numbered by the smallest member; coefficients, fp32 `(B, n)`; patches
        held by each cluster, fp32 `(B, C)`.
    """
    batch, count, width = points.shape
    joined = torch.empty((batch, count), dtype=torch.int32, device=points.device)
    work = _Work.of(joined, weight, sizes, clusters)
    # Clusters are named by their centre until the last phase: `count` names are possible, and none is for "dropped".
    if parts == 1:
        distances = squared_distances(points)
        work.run(0, 5, (batch, count), clusters, count, distances, float(mass), width, neighbours)
    else:
        work.cluster(points, clusters, neighbours, float(mass), parts)
        work.run(4, 5, (batch, count), clusters, count)
    return work.results


@opaque(
    "(Tensor points, int clusters, int neighbours, Tensor? sizes, float mass, int parts) -> Tensor",
    lambda points, clusters, neighbours, sizes, mass, parts: points.new_empty(points.shape[:2], dtype=torch.int64),
)
def density_clusters(
    points: Tensor, clusters: int, neighbours: int, sizes: Tensor | None, mass: float, parts: int
) -> Tensor:
    """As `density_average`, without the average.

    Returns:
        Cluster of each point, int64 `(B, n)`, numbered by the order of their centres among the points.
    """
    joined = torch.empty(points.shape[:2], dtype=torch.int32, device=points.device)
    known = torch.empty(0, device=points.device) if sizes is None else sizes
    work = _Work.of(joined, known, known, clusters)
    work.cluster(points, clusters, neighbours, 0.0 if sizes is None else float(mass), parts)
    centres = work.integers[: joined.numel()].view(joined.shape)
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
    work = _Work.of(group.contiguous(), weight, sizes, count)
    work.run(4, 5, (group.shape[0], group.shape[1]), count, count)
    return work.results
