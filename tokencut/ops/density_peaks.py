"""Density-peak clustering (Rodriguez & Laio 2014), the simplified form of arXiv 2204.08680 and 2211.11315."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokencut.ops import kernels
from tokencut.ops.constants import known
from tokencut.ops.exporting import beyond, exporting, itself, lifted, numbers, pick, running, whole
from tokencut.ops.grouping import Grouping, group_average, led_by, ordered_average
from tokencut.ops.ranking import are_highest, marked, not_ahead

# Numbers of nearest that the GPU kernel can count.
KERNEL_NEIGHBOURS = (3, 4, 5)
# Clusters that each window gets on average, at least: with 20 accuracy suffers, see examples/benchmarks/defaults.md.
WINDOW_CLUSTERS = 32
# What counts as no distance, as a share of a point's squared length: below it fp32 has lost the digits, and copies of
# a token would be told apart by rounding. Values up to 0.01 measured the same (examples/benchmarks/defaults.md).
NO_DISTANCE = 1e-5
# Beyond all squared distances of points of length 1, which are 4 at most.
BEYOND_UNIT = 9.0


@dataclass(frozen=True)
class PeakRule:
    """How much each point is a centre.

    Attributes:
        neighbours: How many nearest count for the density, the point itself among them.
        mass: Power of its size by which a point is denser.
        balance: What density counts against separation: the power of the distance to the nearest by which a point is
            less dense. So the score is a ratio of distances, and multiplying all points by a number changes nothing.
            None for the published density, `exp(-mean squared distance / width)`, whose part in the score grows with
            the scale of the points: where that is large it drowns the separation.
        cosine: Whether points are compared as if all were of length 1.
    """

    neighbours: int
    mass: float = 0.0
    balance: float | None = None
    cosine: bool = False


def squared_distances(points: Tensor, cosine: bool = False) -> Tensor:
    """Squared Euclidean distances between all points, by one batched product.

    Args:
        points: `(B, n, F)` in any floating dtype.
        cosine: Whether to compare the points as if all were of length 1.

    Returns:
        fp32 `(B, n, n)`, not negative, exactly 0 on the diagonal.
    """
    return _distances_and_lengths(points, cosine)[0]


def _distances_and_lengths(points: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """Squared distances `(B, n, n)`, and squared lengths `(B, n)` of the points that they lie between."""
    points = points.float()
    products = torch.bmm(points, points.transpose(1, 2))
    # The squared lengths stand on the diagonal: summing squares once more took a tenth as long as the product.
    if cosine:
        shrink = _diagonal(products).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
        twice = products * (2.0 * shrink).unsqueeze(2) * shrink.unsqueeze(1)
        lengths = 0.5 * _diagonal(twice)
    else:
        twice, lengths = 2.0 * products, _diagonal(products)
    distances = lengths.unsqueeze(2) + lengths.unsqueeze(1) - twice
    return distances.clamp(min=0.0), lengths


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.flatten(1)[:, :: matrices.shape[1] + 1]


def peak_scores(
    distances: Tensor, lengths: Tensor, width: int, rule: PeakRule, log_mass: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How much each point is a centre: log density plus log separation.

    Density is `mass / rms distance to the nearest ** balance`, or as published; separation the distance to the nearest
    denser point. Logarithms, since the published density underflows on tokens of large norm.

    Args:
        distances: Squared distances, fp32 `(B, n, n)`.
        lengths: Squared lengths of the points, fp32 `(B, n)`.
        width: `F`, the numbers in a point.
        rule: What counts.
        log_mass: Logarithm of each point's mass, fp32 `(B, n)`; every mass is 1 where None.

    Returns:
        Scores, fp32 `(B, n)`, higher for more of a centre, and what comes before them, likewise: 1 for the densest
        point, whose separation is published as the largest distance and so its score as the highest, -1 for one that
        coincides with a denser one or is no number, 0 for all others. Only of these does the score mean anything.
    """
    tiny = torch.finfo(torch.float32).tiny
    far = _far(distances, rule)
    nearest = _mean_of_nearest(distances, min(rule.neighbours, distances.shape[1]), far)
    if rule.balance is None:
        log_density = -nearest / width
    else:
        none = (NO_DISTANCE * lengths).clamp(min=tiny)
        log_density = -0.5 * rule.balance * torch.maximum(nearest, none).log()
    if log_mass is not None:
        log_density = log_density + log_mass
    to_denser = lifted(distances, not_ahead(log_density), far).amin(2)
    scores = log_density + 0.5 * to_denser.clamp(min=tiny).log()
    # None is denser than the densest: all its distances were lifted.
    densest = to_denser >= (far if isinstance(far, float) else far.flatten(1))
    return scores, densest.to(scores.dtype) + (to_denser > 0).to(scores.dtype) - 1.0


def _far(distances: Tensor, rule: PeakRule) -> Tensor | float:
    """A number above all distances, for each image one or for all."""
    return BEYOND_UNIT if rule.cosine else beyond(distances)


def _in_one(scores: Tensor, before: Tensor) -> Tensor:
    """Scores in the order that `peak_scores` describes, by one number each, `(B, N)`."""
    plain = before == 0
    scores = torch.where(plain, scores, torch.zeros_like(scores))
    beyond_all = 2.0 * scores.abs().amax(1, keepdim=True) + 1.0
    return torch.where(plain, scores, before * beyond_all)


def _mean_of_nearest(distances: Tensor, neighbours: int, far: Tensor | float) -> Tensor:
    """Mean distance to the nearest points, the point itself among them, `(B, n)`; `far` is beyond all distances."""
    if neighbours == 1:
        return distances.amin(2)
    if neighbours > 3 and not exporting():
        return distances.topk(neighbours, dim=2, largest=False).values.mean(2)
    # The point itself is at 0. Minima: finding them by topk took a fifth of a stage on a GPU, and on a CPU more.
    others = lifted(distances, itself(distances, distances.shape[1]), far)
    nearest = others.amin(2)
    if neighbours == 2:
        return nearest / 2
    if neighbours > 3:
        return _in_turn(others, neighbours - 1, far) / neighbours
    as_near = (others - nearest.unsqueeze(2)).le_(0.0)
    second = lifted(others, as_near, far).amin(2)
    return (torch.where(as_near.sum(2) > 1, nearest, second) + nearest) / 3


def _in_turn(others: Tensor, count: int, far: Tensor | float) -> Tensor:
    """The sum of the `count` lowest of each row, `(B, n)`, where no topk is to be had: LiteRT's graphs have none."""
    places = numbers(others, others.shape[2])
    total = others.amin(2)
    for _ in range(count - 1):
        lowest = (places == others.argmin(2, keepdim=True)).to(others.dtype)
        others = lifted(others, lowest, far)
        total = total + others.amin(2)
    return total


def nearest_centre(distances: Tensor, centres: Tensor) -> Tensor:
    """The centre each point is nearest to; a centre joins itself, equal distances go to the earlier centre.

    Args:
        distances: Distances in any monotonic form, not negative, fp32 `(B, n, n)`.
        centres: Numbers of the centres, ascending, int64 `(B, C)`.

    Returns:
        Position in `centres`, int64 `(B, n)`.
    """
    return nearest_marked(distances, marked(centres, distances.shape[1]))


def nearest_marked(distances: Tensor, is_centre: Tensor) -> Tensor:
    """`nearest_centre` of centres that are marked, bool `(B, n)`."""
    return _position(is_centre, _joined(distances, is_centre, beyond(distances)))


def _position(is_centre: Tensor, joined: Tensor) -> Tensor:
    """The position among the centres of each of those that were joined, `(B, n)`."""
    begun = running(is_centre)
    # An image whose features are no numbers may have joined what is no centre: it stays an image with groups.
    return pick(begun - (begun > 0).to(begun.dtype), joined)


def _joined(distances: Tensor, is_centre: Tensor, far: Tensor | float) -> Tensor:
    """The number of the centre that each point joins, int64 `(B, n)`; `far` is beyond all distances."""
    # argmin is documented to return the first of equal minima. Gathering the centres' rows took three times as long.
    others = torch.logical_not(is_centre).unsqueeze(1).to(distances.dtype)
    nearest = (distances + others * far).argmin(2).to(whole())
    return torch.where(is_centre, numbers(distances, distances.shape[1]), nearest)


@known
def windows(count: int, clusters: int, window: int) -> int:
    """Into how many windows the tokens of an image are split, of `ceil(N / windows)` tokens, or fewer in the last.

    As many as hold `window` tokens or a little fewer; fewer and larger ones where each would get less than
    `WINDOW_CLUSTERS` clusters. They are of equal size where the number of tokens divides by something near, so a
    slightly lower keep rate can cost slightly more, where it takes windows away.

    Args:
        count: `N`, the number of tokens.
        clusters: `C`, for the whole image.
        window: The tokens wanted in a window.

    Returns:
        At least 1.
    """
    fewest, most = -(-count // window), max(1, clusters // WINDOW_CLUSTERS)
    dividing = [number for number in range(1, min(2 * fewest, most) + 1) if count % number == 0]
    equal = next((number for number in dividing if number >= fewest), dividing[-1])
    # The 37 x 37 patches of 518 px divide by nothing near: compared all with all, they cost what reducing them saves.
    return equal if count // equal <= 2 * window else min(fewest, most)


def window_pairs(count: int, parts: int) -> int:
    """How many pairs of tokens are compared in windows, ordered ones and each token with itself counted."""
    return sum(number * size**2 for _, number, size in _windows(count, parts))


@known
def _windows(count: int, parts: int) -> tuple[tuple[int, int, int], ...]:
    """The windows of an image, those of a size together: where they begin, how many there are, and their size."""
    size = -(-count // parts)
    full, rest = count // size, count % size
    return ((0, full, size), *(((full * size, 1, rest),) if rest else ()))


def density_clusters(
    points: Tensor, clusters: int, rule: PeakRule, sizes: Tensor | None = None, parts: int = 1
) -> Tensor:
    """Clusters the points of each image around its density peaks.

    Args:
        points: `(B, n, F)` in any floating dtype; compared in fp32.
        clusters: `C`, at most `n`.
        rule: Which points are centres.
        sizes: Patches that each point holds, fp32 `(B, n)`; None where each holds one.
        parts: Windows of `ceil(n / parts)` consecutive points, at most `C`; the last may hold fewer. Points are
            compared within theirs only, so that time and memory grow with `n^2 / parts`. Centres are the best of the
            image, one a window at least.

    Returns:
        Cluster of each point, int64 `(B, n)`, numbered by the order of their centres among the points.
    """
    if _has_kernel(points, rule, parts):
        mass = sizes if rule.mass else None
        return kernels.clusters.density_clusters(points, clusters, mass, parts, *_kernel_rule(rule))
    return _position(*_centres_joined(points, clusters, rule, sizes, parts))


def _centres_joined(
    points: Tensor, clusters: int, rule: PeakRule, sizes: Tensor | None, parts: int
) -> tuple[Tensor, Tensor]:
    """Which points are centres, bool `(B, n)`, and the number of the centre that each joins, int64 `(B, n)`."""
    count, width = points.shape[1:]
    log_mass = None if sizes is None or not rule.mass else rule.mass * sizes.log()
    split = _windows(count, parts)
    apart, scores, before = [], [], []
    for windows_of_a_size in split:
        within = _in_windows(points, windows_of_a_size)
        mass = None if log_mass is None else _in_windows(log_mass, windows_of_a_size)
        distances, lengths = _distances_and_lengths(within, rule.cosine)
        apart.append(distances)
        of_points, before_them = peak_scores(distances, lengths, width, rule, mass)
        scores.append(_per_image(of_points, windows_of_a_size))
        before.append(_per_image(before_them, windows_of_a_size))
    is_centre = are_highest(_in_one(_joined_up(scores), _joined_up(before)), clusters)
    joined = []
    for windows_of_a_size, distances in zip(split, apart, strict=True):
        start, number, size = windows_of_a_size
        of_windows = _in_windows(is_centre, windows_of_a_size)
        nearest = _joined(distances, of_windows, _far(distances, rule)).unflatten(0, (-1, number))
        first = start + size * numbers(nearest, number).unsqueeze(1)
        joined.append((nearest + first).flatten(1))
    return is_centre, _joined_up(joined)


def _in_windows(values: Tensor, windows_of_a_size: tuple[int, int, int]) -> Tensor:
    """What belongs to some windows, `(B, n, ...)` to `(B * windows, tokens of a window, ...)`."""
    start, number, size = windows_of_a_size
    return values[:, start : start + number * size].unflatten(1, (number, size)).flatten(0, 1)


def _per_image(values: Tensor, windows_of_a_size: tuple[int, int, int]) -> Tensor:
    """The way back, `(B * windows, tokens of a window)` to `(B, n)`."""
    return values.unflatten(0, (-1, windows_of_a_size[1])).flatten(1)


def _joined_up(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(values, 1)


def density_average(
    points: Tensor,
    weight: Tensor | None,
    sizes: Tensor | None,
    clusters: int,
    rule: PeakRule,
    parts: int = 1,
    keep_norm: bool = False,
) -> Grouping:
    """The decision to average the clusters of each image.

    Args:
        points: `(B, N, F)` in any floating dtype; compared in fp32.
        weight: Raw weight of each token, fp32 `(B, N)`, not negative; None where all weigh alike.
        sizes: Patches that each token holds, fp32 `(B, N)`; None where each holds one.
        clusters: `C`, at most `N`.
        rule: Which tokens are centres.
        parts: Windows, as in `density_clusters`.
        keep_norm: Whether the averages are as long as their members, see `Grouping`; with `rule.cosine` the points have
            to be the tokens themselves.
    """
    if _has_kernel(points, rule, parts):
        lengthened = keep_norm and rule.cosine  # the products of the points tell how long averages of them are
        group, coefficients, held = kernels.clusters.density_average(
            points, weight, sizes, clusters, parts, *_kernel_rule(rule), lengthened
        )
        return Grouping(group, coefficients, clusters, held, ordered=True, keep_norm=keep_norm and not lengthened)
    ones = torch.ones(points.shape[:2], dtype=torch.float32, device=points.device)
    weight, sizes = ones if weight is None else weight, ones if sizes is None else sizes
    if exporting():  # centres lead to the numbers in order with fewer operators
        group = led_by(_centres_joined(points, clusters, rule, sizes, parts)[1])
        coefficients = group_average(group, weight, sizes, clusters)
        return Grouping(group, coefficients, clusters, ordered=True, keep_norm=keep_norm)
    group = density_clusters(points, clusters, rule, sizes, parts)
    return replace(ordered_average(group, weight, sizes, clusters), keep_norm=keep_norm)


def _kernel_rule(rule: PeakRule) -> tuple[int, float, float, bool]:
    """A rule as the kernels take it: neighbours, mass, balance (negative for the published density), cosine."""
    return rule.neighbours, float(rule.mass), -1.0 if rule.balance is None else float(rule.balance), rule.cosine


def _has_kernel(points: Tensor, rule: PeakRule, parts: int) -> bool:
    """Whether a GPU kernel clusters such points."""
    known = rule.neighbours in KERNEL_NEIGHBOURS and rule.neighbours <= _windows(points.shape[1], parts)[-1][2]
    return points.dtype != torch.float64 and known and kernels.usable(points)
