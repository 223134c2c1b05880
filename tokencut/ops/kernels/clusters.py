"""Density-peak clusters, and their averages, on a GPU: `ops.density_peaks` in two launches instead of sixty.

One kernel makes the distances, on tensor cores: the products of half-precision numbers are exact in fp32, and those of
fp32 numbers are put together from three of TF32, so that little but the order of summation differs from an fp32
product. Where a window fits into one tile it goes on to how
much each point is a centre. Another kernel does all the rest (`ops.kernels.phases`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencut.ops.kernels import opaque
from tokencut.ops.kernels.launching import Kernel
from tokencut.ops.kernels.phases import TINY, log_density, run_phases

TILE, CHUNK = 64, 64  # side of a tile of distances, and the features it adds up at once
ALONE = 128  # up to so many tokens one tile holds all distances of a window, and what follows from them is done there
# Two such programs fit into a multiprocessor then; the compiler's own choice leaves room for one. A matter of NVIDIA's.
SHARED_BY_TWO = {"maxnreg": 128} if torch.version.hip is None else {}
OWN, OTHERS = 256, 4  # tokens that a program owns, and those it compares them with at once
LANES = 2  # threads for each token owned
WHOLE = 512  # up to so many tokens one program does all of an image; beyond, one launch a phase fills the GPU better
OWN_OF_MANY = 64  # tokens owned then: one image spreads over more programs


@triton.jit
def _cosine_distances(products, row_lengths, column_lengths):
    """Squared distances of points scaled to length 1, from products and squared lengths of the points as they are."""
    shrink = tl.rsqrt(tl.maximum(row_lengths, TINY))[:, None] * tl.rsqrt(tl.maximum(column_lengths, TINY))[None, :]
    # A point of no length stays where it is, at distance 1 of the others.
    sum_of_lengths = (row_lengths > TINY).to(tl.float32)[:, None] + (column_lengths > TINY).to(tl.float32)[None, :]
    return tl.maximum(sum_of_lengths - 2.0 * products * shrink, 0.0)


@Kernel
@triton.jit
def _peaks(points, sizes, distances, scores, tokens, window, batch_stride, row_stride, mass, balance,
           WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, NEIGHBOURS: tl.constexpr,
           SIZED: tl.constexpr, SCALE_FREE: tl.constexpr, COSINE: tl.constexpr):  # fmt: skip
    """The squared distances of a window that fits into one tile, and how much each of its points is a centre.

    On the diagonal of the distances, where none is looked for, stand the squared lengths of the points.
    """
    image, begin = tl.program_id(1).to(tl.int64), tl.program_id(0) * window
    count = tl.minimum(window, tokens - begin)
    rows = tl.arange(0, TILE)
    points += image * batch_stride + begin * row_stride
    distances += (image * tokens + begin) * window
    sizes += image * tokens + begin
    scores += image * tokens + begin
    products = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        features = start + tl.arange(0, CHUNK)
        a = tl.load(points + rows[:, None] * row_stride + features[None, :],
                    mask=(rows[:, None] < count) & (features[None, :] < WIDTH), other=0.0)  # fmt: skip
        products = tl.dot(a, tl.trans(a), products, input_precision="tf32x3")
    itself = rows[:, None] == rows[None, :]
    norms = tl.where(itself, products, 0.0)
    lengths = tl.sum(norms, 1)
    if COSINE:
        squared = _cosine_distances(products, lengths, tl.sum(norms, 0))
    else:
        squared = tl.maximum(lengths[:, None] + tl.sum(norms, 0)[None, :] - 2.0 * products, 0.0)
    inside = (rows[:, None] < count) & (rows[None, :] < count)
    tl.store(distances + rows[:, None] * window + rows[None, :], tl.where(itself, norms, squared), mask=inside)
    squared = tl.where(inside & (rows[:, None] != rows[None, :]), squared, float("inf"))
    # The nearest, then the nearest of those farther off, each as often as it occurs: no other array in registers.
    total = tl.zeros((TILE,), tl.float32)
    nearest = tl.full((TILE,), -1.0, tl.float32)
    left = tl.full((TILE,), NEIGHBOURS - 1, tl.int32)
    for _ in tl.static_range(NEIGHBOURS - 1):
        nearest = tl.min(tl.where(squared > nearest[:, None], squared, float("inf")), 1)
        taken = tl.minimum(tl.sum((squared == nearest[:, None]).to(tl.int32), 1), left)
        total += tl.where(taken > 0, nearest * taken, 0.0)
        left -= taken
    density = log_density(total / NEIGHBOURS, lengths, balance, WIDTH, SCALE_FREE, COSINE)
    if SIZED:
        density += mass * tl.log(tl.load(sizes + rows, mask=rows < count, other=1.0))
    earlier = (density[None, :] == density[:, None]) & (rows[None, :] < rows[:, None])
    denser = (density[None, :] > density[:, None]) | earlier
    apart = tl.min(tl.where(denser, squared, float("inf")), 1)
    score = tl.where(apart == float("inf"), float("inf"), density + 0.5 * tl.log(apart))
    tl.store(scores + rows, score, mask=rows < count)


@Kernel
@triton.jit
def _distances(points, distances, tokens, window, parts, batch_stride, row_stride,
               WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, COSINE: tl.constexpr):  # fmt: skip
    """One tile of the squared distances of a window, and its mirror image; on the diagonal the squared lengths."""
    image, begin = (tl.program_id(2) // parts).to(tl.int64), tl.program_id(2) % parts * window
    count = tl.minimum(window, tokens - begin)
    row, column = tl.program_id(1), tl.program_id(0)
    if row > column:
        return
    rows = row * TILE + tl.arange(0, TILE)
    columns = column * TILE + tl.arange(0, TILE)
    points += image * batch_stride + begin * row_stride
    distances += (image * tokens + begin) * window
    products = tl.zeros((TILE, TILE), tl.float32)
    row_norms = tl.zeros((TILE,), tl.float32)
    column_norms = tl.zeros((TILE,), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        features = start + tl.arange(0, CHUNK)
        a = tl.load(points + rows[:, None] * row_stride + features[None, :],
                    mask=(rows[:, None] < count) & (features[None, :] < WIDTH), other=0.0)  # fmt: skip
        b = tl.load(points + columns[None, :] * row_stride + features[:, None],
                    mask=(columns[None, :] < count) & (features[:, None] < WIDTH), other=0.0)  # fmt: skip
        row_norms += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
        column_norms += tl.sum(b.to(tl.float32) * b.to(tl.float32), 0)
        products = tl.dot(a, b, products, input_precision="tf32x3")
    if COSINE:
        squared = _cosine_distances(products, row_norms, column_norms)
    else:
        squared = tl.maximum(row_norms[:, None] + column_norms[None, :] - 2.0 * products, 0.0)
    squared = tl.where(rows[:, None] == columns[None, :], row_norms[:, None], squared)
    tl.store(distances + rows[:, None] * window + columns[None, :], squared,
             mask=(rows[:, None] < count) & (columns[None, :] < count))  # fmt: skip
    if row < column:
        tl.store(distances + columns[:, None] * window + rows[None, :], tl.trans(squared),
                 mask=(columns[:, None] < count) & (rows[None, :] < count))  # fmt: skip


def distances_and_lengths(points: Tensor, parts: int = 1, cosine: bool = False) -> Tensor:
    """Squared distances between the points of each window, tile by tile.

    Args:
        points: `(B, n, F)` in any floating dtype, the last dimension contiguous.
        parts: Windows of `ceil(n / parts)` consecutive points; the last may hold fewer.
        cosine: Whether to compare the points as if all were of length 1.

    Returns:
        fp32 `(B, n, ceil(n / parts))`, of each point to those of its window; those to itself are the squared lengths of
        the points as they are. What the last window has no points for is not written.
    """
    batch, count, width = points.shape
    distances = _empty_distances(points, parts)
    window = distances.shape[2]
    tiles, parts = triton.cdiv(window, TILE), triton.cdiv(count, window)
    _distances[tiles, tiles, batch * parts](
        points, distances, count, window, parts, points.stride(0), points.stride(1), WIDTH=width, TILE=TILE,
        CHUNK=_chunk(points), COSINE=cosine,
        # Triton 3.6 on an H200: pipelined, a product reads what is already overwritten if a sum reads it too.
        num_stages=1,
    )  # fmt: skip
    return distances


def _empty_distances(points: Tensor, parts: int) -> Tensor:
    """Room for the distances within each window."""
    batch, count, _ = points.shape
    return torch.empty((batch, count, triton.cdiv(count, parts)), dtype=torch.float32, device=points.device)


def _chunk(points: Tensor) -> int:
    """Features that a product takes at once: as many bytes in any precision."""
    return 2 * CHUNK // points.element_size()


@dataclass(frozen=True)
class _Rule:
    """`ops.density_peaks.PeakRule` as operators take it: the balance is negative for the published density."""

    neighbours: int
    mass: float
    balance: float
    cosine: bool


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

    @property
    def scores(self) -> Tensor:
        """What phase 1 writes, and `_peaks`."""
        return self.floats[self.group.numel() :]

    def run(
        self, first: int, last: int, groups: int,
        distances: Tensor | None = None, rule: _Rule | None = None, width: int = 1, keep_norm: bool = False,
    ) -> None:  # fmt: skip
        """Phases `first` to `last`; a group is named by a number below `groups`, and a token of none by `groups`."""
        rule = rule or _Rule(3, 0.0, 0.0, False)
        batch, count = self.group.shape
        whole = count <= WHOLE
        own = min(OWN, max(64, triton.next_power_of_2(count))) if whole else OWN_OF_MANY
        for start, end in [(first, last)] if whole else [(phase, phase) for phase in range(first, last + 1)]:
            run_phases[1 if whole else triton.cdiv(count, own), batch](
                self.floats if distances is None else distances, self.group, self.weight, self.sizes, self.floats,
                self.integers, self.share, self.ordered, self.leaving, count,
                count if distances is None else distances.shape[2], self.group.numel(), self.leaving.shape[1], groups,
                rule.mass, rule.balance, WIDTH=width, NEIGHBOURS=rule.neighbours, SIZED=rule.mass != 0.0,
                SCALE_FREE=rule.balance >= 0.0, COSINE=rule.cosine, KEEP_NORM=keep_norm, OWN=own, OTHERS=OTHERS,
                FIRST=start, LAST=end, WHOLE=whole, ALL=whole and count <= own, num_warps=LANES * own // 32,
            )  # fmt: skip

    def cluster(self, points: Tensor, rule: _Rule, parts: int, last: int, keep_norm: bool = False) -> None:
        """Phases 0 to `last`, the first two along with the distances where a window fits into one tile."""
        batch, count, width = points.shape
        points = points if points.stride(2) == 1 else points.contiguous()
        window = triton.cdiv(count, parts)
        if window > ALONE:
            distances = distances_and_lengths(points, parts, rule.cosine)
            self.run(0, last, count, distances, rule, width, keep_norm)
            return
        distances = _empty_distances(points, parts)
        _peaks[triton.cdiv(count, window), batch](
            points, self.sizes, distances, self.scores, count, window, points.stride(0), points.stride(1), rule.mass,
            rule.balance, WIDTH=width, TILE=max(16, triton.next_power_of_2(window)), CHUNK=_chunk(points),
            NEIGHBOURS=rule.neighbours, SIZED=rule.mass != 0.0, SCALE_FREE=rule.balance >= 0.0, COSINE=rule.cosine,
            num_warps=8, num_stages=4, **SHARED_BY_TWO,
        )  # fmt: skip
        self.run(2, last, count, distances, keep_norm=keep_norm)


def _three_empty(weight: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group of each token, coefficients, and sizes of the groups, in their shapes only."""
    held = weight.new_empty((weight.shape[0], groups))
    return torch.empty_like(weight, dtype=torch.int64), torch.empty_like(weight), held


@opaque(
    "(Tensor points, Tensor weight, Tensor sizes, int clusters, int parts, int neighbours, float mass, float balance,"
    " bool cosine, bool keep_norm) -> (Tensor, Tensor, Tensor)",
    lambda points, weight, sizes, clusters, *rule: _three_empty(weight, clusters),
)
def density_average(
    points: Tensor, weight: Tensor, sizes: Tensor, clusters: int, parts: int, neighbours: int, mass: float,
    balance: float, cosine: bool, keep_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Clusters the points of each image around its density peaks and averages each cluster.

    Args:
        points: `(B, n, F)` in any floating dtype.
        weight: Raw weight of each point, fp32 `(B, n)`, not negative.
        sizes: Patches that each point holds, fp32 `(B, n)`.
        clusters: `C`, at most `n`.
        parts: Windows of `ceil(n / parts)` points within which they are compared, at most `C`; the last may hold fewer.
        neighbours: How many nearest count for the density, the point itself among them: 3 to 5, and no more than the
            last window holds.
        mass: Power of its size by which a point is denser.
        balance: What density counts against separation; negative for the published density.
        cosine: Whether points are compared as if all were of length 1.
        keep_norm: Whether coefficients make averages of the points as long as their members; with `cosine` only.

    Returns:
        Cluster of each point, int64 `(B, n)`, numbered by the smallest member; coefficients, fp32 `(B, n)`; patches
        held by each cluster, fp32 `(B, C)`.
    """
    # Clusters are named by their centre until the last phase: `n` names are possible, and none is for "dropped".
    joined = torch.empty(points.shape[:2], dtype=torch.int32, device=points.device)
    work = _Work.of(joined, weight, sizes, clusters)
    work.cluster(points, _Rule(neighbours, mass, balance, cosine), parts, 5, keep_norm)
    return work.results


@opaque(
    "(Tensor points, int clusters, Tensor? sizes, int parts, int neighbours, float mass, float balance, bool cosine)"
    " -> Tensor",
    lambda points, *rest: points.new_empty(points.shape[:2], dtype=torch.int64),
)
def density_clusters(
    points: Tensor, clusters: int, sizes: Tensor | None, parts: int, neighbours: int, mass: float, balance: float,
    cosine: bool,
) -> Tensor:  # fmt: skip
    """As `density_average`, without the average.

    Returns:
        Cluster of each point, int64 `(B, n)`, numbered by the order of their centres among the points.
    """
    joined = torch.empty(points.shape[:2], dtype=torch.int32, device=points.device)
    known = torch.empty(0, device=points.device) if sizes is None else sizes
    work = _Work.of(joined, known, known, clusters)
    work.cluster(points, _Rule(neighbours, 0.0 if sizes is None else mass, balance, cosine), parts, 3)
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
