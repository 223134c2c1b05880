"""Density-peak clusters, and their averages, on a GPU: `ops.density_peaks` in two launches instead of sixty.

One kernel makes the distances, on tensor cores: the products of half-precision numbers are exact in fp32, and those of
fp32 numbers are put together from three of TF32, so that little but the order of summation differs from an fp32
product. Where a window fits into one tile it goes on to how
much each point is a centre. Another kernel does all the rest (`ops.kernels.phases`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencut.ops.kernels import opaque
from tokencut.ops.kernels.launching import Kernel, Launch, by_shape
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
def _peaks(points, sizes, distances, tokens, window, behind, batch_stride, row_stride, mass, balance,
           WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, NEIGHBOURS: tl.constexpr,
           MASS: tl.constexpr, SCALE_FREE: tl.constexpr, COSINE: tl.constexpr):  # fmt: skip
    """The squared distances of a window that fits into one tile, and, `behind` them, how much its points are centres.

    On the diagonal of the distances, where none is looked for, stand the squared lengths of the points.
    """
    image, begin = tl.program_id(1).to(tl.int64), tl.program_id(0) * window
    count = tl.minimum(window, tokens - begin)
    rows = tl.arange(0, TILE)
    points += image * batch_stride + begin * row_stride
    sizes += image * tokens + begin
    scores = distances + behind + image * tokens + begin
    distances += (image * tokens + begin) * window
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
    if MASS:
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
    batch, count, _ = points.shape
    distances = torch.empty((batch, count, triton.cdiv(count, parts)), dtype=torch.float32, device=points.device)
    _measuring(points.shape, points.stride(), points.dtype, distances.shape[2], cosine)(points, distances)
    return distances


@by_shape
def _measuring(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, window: int, cosine: bool
) -> Launch:
    """Measures distances within windows of so many points, for `distances_and_lengths`."""
    batch, count, width = shape
    tiles, parts = triton.cdiv(window, TILE), triton.cdiv(count, window)
    return _distances.prepare(
        (tiles, tiles, batch * parts), count, window, parts, *strides[:2], WIDTH=width, TILE=TILE, CHUNK=_chunk(dtype),
        COSINE=cosine,
        # Triton 3.6 on an H200: pipelined, a product reads what is already overwritten if a sum reads it too.
        num_stages=1,
    )  # fmt: skip


def _chunk(dtype: torch.dtype) -> int:
    """Features that a product takes at once: as many bytes in any precision."""
    return 2 * CHUNK // dtype.itemsize


class _Rule(NamedTuple):
    """`ops.density_peaks.PeakRule` as operators take it: the balance is negative for the published density."""

    neighbours: int = 3
    mass: float = 0.0
    balance: float = 0.0
    cosine: bool = False

    def settings(self) -> dict[str, Any]:
        """The constants of a kernel."""
        return {"NEIGHBOURS": self.neighbours, "MASS": self.mass != 0.0, "SCALE_FREE": self.balance >= 0.0,
                "COSINE": self.cosine}  # fmt: skip


def _clustered(
    points: Tensor, weight: Tensor | None, sizes: Tensor | None, clusters: int, rule: _Rule, parts: int, last: int,
    keep_norm: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Phases 0 to `last`, the first two along with the distances where a window fits into one tile.

    Returns:
        Whether each point is a centre, and which centre it has joined, int32 `(2, B, n)`; and what `_empty` made.
    """
    points = points if points.stride(2) == 1 else points.contiguous()
    batch, count, width = points.shape
    window = -(-count // parts)
    # Behind the distances come three numbers for each point, see `phases`.
    floats = torch.empty(batch * count * (window + 3), dtype=torch.float32, device=points.device)
    # Clusters are named by their centre until the last phase: `n` names are possible, and none is for "dropped".
    integers = torch.empty((3, batch, count), dtype=torch.int32, device=points.device)
    results = _empty(points, clusters)
    first, known = 0, (weight is not None, sizes is not None)
    weight = floats if weight is None else weight.contiguous()
    sizes = floats if sizes is None else sizes.contiguous()
    if window > ALONE:
        _measuring(points.shape, points.stride(), points.dtype, window, rule.cosine)(points, floats)
    else:
        _peaking(points.shape, points.stride(), points.dtype, window, rule)(points, sizes, floats)
        first, rule, width = 2, _Rule(), 1  # no phase asks for them then
    for launch in _phases(batch, count, width, window, clusters, rule, keep_norm, known, first, last, count <= WHOLE):
        launch(floats, integers, integers, weight, sizes, *results)
    return integers, results


@by_shape
def _peaking(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, window: int, rule: _Rule) -> Launch:
    """Measures distances within windows that fit into a tile, and scores their points."""
    batch, count, width = shape
    return _peaks.prepare(
        (triton.cdiv(count, window), batch), count, window, batch * count * (window + 1), *strides[:2], rule.mass,
        rule.balance, WIDTH=width, TILE=max(16, triton.next_power_of_2(window)), CHUNK=_chunk(dtype),
        **rule.settings(), num_warps=8, num_stages=4, **SHARED_BY_TWO,
    )  # fmt: skip


@by_shape
def _phases(
    batch: int, count: int, width: int, window: int, groups: int, rule: _Rule, keep_norm: bool,
    known: tuple[bool, bool], first: int, last: int, at_once: bool,
) -> tuple[Launch, ...]:  # fmt: skip
    """Phases `first` to `last`.

    Args:
        batch: `B`.
        count: `n`, the points of an image.
        width: `F`, the numbers in a point.
        window: The points of a window; 0 where there are no distances.
        groups: How many groups there are.
        rule: As in `density_average`.
        keep_norm: Likewise.
        known: Whether there are weights, and sizes; else all points weigh 1, and hold 1.
        first: The first phase: 4 where groups are given, of which number `groups` is none.
        last: The last phase.
        at_once: Whether one program does all of an image, in one launch.
    """
    own = min(OWN, max(64, triton.next_power_of_2(count))) if at_once else OWN_OF_MANY
    plane = batch * count
    joined, none = (0, groups) if first == 4 else (2 * plane, count)
    return tuple(
        run_phases.prepare(
            (1 if at_once else triton.cdiv(count, own), batch), count, window or count, plane, plane * window, joined,
            groups, none, rule.mass, rule.balance, WIDTH=width, **rule.settings(), KEEP_NORM=keep_norm,
            WEIGHTED=known[0], SIZED=known[1], OWN=own, OTHERS=OTHERS, FIRST=start, LAST=end,
            WHOLE=at_once, ALL=at_once and count <= own, num_warps=LANES * own // 32,
        )
        for start, end in ([(first, last)] if at_once else [(phase, phase) for phase in range(first, last + 1)])
    )  # fmt: skip


def _empty(like: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the group of each token, its coefficient, and the sizes of the groups."""
    shape = batch, _ = like.shape[:2]
    coefficients = torch.empty(shape, dtype=torch.float32, device=like.device)
    ordered = torch.empty(shape, dtype=torch.int64, device=like.device)
    return ordered, coefficients, coefficients.new_empty((batch, groups))


@opaque(
    "(Tensor points, Tensor? weight, Tensor? sizes, int clusters, int parts, int neighbours, float mass, float balance,"
    " bool cosine, bool keep_norm) -> (Tensor, Tensor, Tensor)",
    lambda points, weight, sizes, clusters, *rule: _empty(points, clusters),
)
def density_average(
    points: Tensor, weight: Tensor | None, sizes: Tensor | None, clusters: int, parts: int, neighbours: int,
    mass: float, balance: float, cosine: bool, keep_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Clusters the points of each image around its density peaks and averages each cluster.

    Args:
        points: `(B, n, F)` in any floating dtype.
        weight: Raw weight of each point, fp32 `(B, n)`, not negative; None where all weigh alike.
        sizes: Patches that each point holds, fp32 `(B, n)`; None where each holds one.
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
    rule = _Rule(neighbours, 0.0 if sizes is None else mass, balance, cosine)
    return _clustered(points, weight, sizes, clusters, rule, parts, 5, keep_norm)[1]


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
    rule = _Rule(neighbours, 0.0 if sizes is None else mass, balance, cosine)
    centres, _, joined = _clustered(points, None, sizes, clusters, rule, parts, 3, False)[0]
    return centres.cumsum(1).gather(1, joined.long()) - 1


@opaque(
    "(Tensor group, Tensor weight, Tensor sizes, int count) -> (Tensor, Tensor, Tensor)",
    lambda group, weight, sizes, count: _empty(group, count),
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
    batch, tokens = group.shape
    group, results = group.contiguous(), _empty(group, count)
    floats = torch.empty(3 * batch * tokens, dtype=torch.float32, device=group.device)
    integers = torch.empty(2 * batch * tokens, dtype=torch.int32, device=group.device)
    for launch in _phases(batch, tokens, 1, 0, count, _Rule(), False, (True, True), 4, 5, tokens <= WHOLE):
        launch(floats, integers, group, weight.contiguous(), sizes.contiguous(), *results)
    return results
