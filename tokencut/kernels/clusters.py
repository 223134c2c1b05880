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

TILE, CHUNK = 64, 64  # side of a tile of distances, and the features it adds up at once
ALONE = 128  # up to so many tokens one tile holds all distances of a window, and reads each token once
OWN, OTHERS = 256, 8  # tokens that a program owns, and those it compares them with at once
WHOLE = 512  # up to so many tokens one program does all of an image; beyond, one launch a phase fills the GPU better


@triton.jit
def _distances(points, distances, count, parts, batch_stride, row_stride,
               WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """One tile of the squared distances of a window, and its mirror image."""
    window = tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(1), tl.program_id(0)
    if row > column:
        return
    rows = row * TILE + tl.arange(0, TILE)
    columns = column * TILE + tl.arange(0, TILE)
    points += window // parts * batch_stride + window % parts * count * row_stride
    distances += window * count * count
    products = tl.zeros((TILE, TILE), tl.float32)
    row_norms = tl.zeros((TILE,), tl.float32)
    column_norms = tl.zeros((TILE,), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        features = start + tl.arange(0, CHUNK)
        a = tl.load(points + rows[:, None] * row_stride + features[None, :],
                    mask=(rows[:, None] < count) & (features[None, :] < WIDTH), other=0.0)  # fmt: skip
        if ALONE:
            b = tl.trans(a)
        else:
            b = tl.load(points + columns[None, :] * row_stride + features[:, None],
                        mask=(columns[None, :] < count) & (features[:, None] < WIDTH), other=0.0)  # fmt: skip
            row_norms += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
            column_norms += tl.sum(b.to(tl.float32) * b.to(tl.float32), 0)
        products = tl.dot(a, b, products, input_precision="ieee")
    if ALONE:
        diagonal = tl.where(rows[:, None] == columns[None, :], products, 0.0)
        row_norms, column_norms = tl.sum(diagonal, 1), tl.sum(diagonal, 0)
    squared = tl.maximum(row_norms[:, None] + column_norms[None, :] - 2.0 * products, 0.0)
    squared = tl.where(rows[:, None] == columns[None, :], 0.0, squared)
    tl.store(distances + rows[:, None] * count + columns[None, :], squared,
             mask=(rows[:, None] < count) & (columns[None, :] < count))  # fmt: skip
    if row < column:
        tl.store(distances + columns[:, None] * count + rows[None, :], tl.trans(squared),
                 mask=(columns[:, None] < count) & (rows[None, :] < count))  # fmt: skip


def squared_distances(points: Tensor, parts: int = 1) -> Tensor:
    """Squared distances between the points of each window.

    Args:
        points: `(B, n, F)` in any floating dtype.
        parts: Windows of consecutive points, a divisor of `n`.

    Returns:
        fp32 `(B * parts, n / parts, n / parts)`.
    """
    batch, count, width = points.shape
    points = points if points.stride(2) == 1 else points.contiguous()
    window = count // parts
    distances = torch.empty((batch * parts, window, window), dtype=torch.float32, device=points.device)
    alone = window <= ALONE
    tile = max(16, triton.next_power_of_2(window)) if alone else TILE
    tiles = triton.cdiv(window, tile)
    _distances[tiles, tiles, batch * parts](
        points, distances, window, parts, points.stride(0), points.stride(1), WIDTH=width, TILE=tile,
        CHUNK=CHUNK if points.element_size() == 2 else CHUNK // 2, ALONE=alone,
        # Triton 3.6 on an H200: pipelined, a product reads what is already overwritten if a sum reads it too.
        num_stages=3 if alone else 1,
    )  # fmt: skip
    return distances


@dataclass(frozen=True)
class _Work:
    """What the phases of one decision read and write, for all tokens of a batch."""

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
            floats=torch.empty(3 * plane, dtype=torch.float32, device=group.device),
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
        self, first: int, last: int, groups: int,
        distances: Tensor | None = None, mass: float = 0.0, width: int = 1, neighbours: int = 3,
    ) -> None:  # fmt: skip
        """Phases `first` to `last`; a group is named by a number below `groups`, and a token of none by `groups`."""
        batch, count = self.group.shape
        whole = count <= WHOLE
        own = min(OWN, max(64, triton.next_power_of_2(count)))
        for start, end in [(first, last)] if whole else [(phase, phase) for phase in range(first, last + 1)]:
            run_phases[1 if whole else triton.cdiv(count, own), batch](
                self.floats if distances is None else distances, self.group, self.weight, self.sizes, self.floats,
                self.integers, self.share, self.ordered, self.leaving, count,
                count if distances is None else distances.shape[1], self.group.numel(), self.leaving.shape[1], groups,
                mass, WIDTH=width, NEIGHBOURS=neighbours, SIZED=mass != 0.0, OWN=own, OTHERS=OTHERS, FIRST=start,
                LAST=end, WHOLE=whole, num_warps=own // 32 if whole else 8,
            )  # fmt: skip


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
    # Clusters are named by their centre until the last phase: `n` names are possible, and none is for "dropped".
    joined = torch.empty(points.shape[:2], dtype=torch.int32, device=points.device)
    work = _Work.of(joined, weight, sizes, clusters)
    count, width = points.shape[1:]
    work.run(0, 5, count, squared_distances(points, parts), float(mass), width, neighbours)
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
    count, width = points.shape[1:]
    distances = squared_distances(points, parts)
    work.run(0, 3, count, distances, 0.0 if sizes is None else float(mass), width, neighbours)
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
    work.run(4, 5, count)
    return work.results
