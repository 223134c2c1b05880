"""What each target asks of a search: multiply-adds, points that may be lost, or what `clock_target` has: seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tokencut.errors import TokencutError, UsageError
from tokencut.evaluation.statistics import pareto_front
from tokencut.limits import check_number
from tokencut.search.accuracy_drop import DropRate, fit_rate
from tokencut.search.local_search import LocalSearch
from tokencut.search.space import Counts

# Prices around the target at which the result is scaled and measured too, so that the front has other points to offer.
AROUND = (0.8, 0.9, 1.12, 1.25)
# Prices at which the rate of loss is fitted before one is chosen, as shares of what lies between the least and dense.
LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
# Further down only while the last is sure to lose little enough: damage far beyond the limit would govern the fit.
DEEPER = (0.3, 0.2, 0.1, 0.05)
MIDDLE = 0.6
# The share of the effort that goes to the last price, behind which nothing may be left for measuring.
CLIMBING = 0.88


@dataclass(frozen=True)
class Target:
    """What is asked for: exactly one of the four.

    Attributes:
        gmacs: Multiply-adds of an image at most, in units of 1e9.
        speedup: Dense time over compressed time, on this machine.
        max_drop: Points (percent) against the dense model at most.
        latency_ms: Milliseconds for a batch, on this machine.
    """

    gmacs: float | None = None
    speedup: float | None = None
    max_drop: float | None = None
    latency_ms: float | None = None

    @property
    def by_clock(self) -> bool:
        """Whether it is one of seconds."""
        return self.speedup is not None or self.latency_ms is not None

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            UsageError: None or several are given, or one is out of range.
        """
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            what = (
                f"{' and '.join(f'`{name}`' for name in given)} exclude each other" if given else "no target is given"
            )
            raise UsageError(f"{what}; type one of `gmacs=2.6`, `speedup=1.6`, `latency_ms=20`, `max_drop=0.5`")
        check_number(given[0], getattr(self, given[0]))

    def __str__(self) -> str:
        """What is asked for, such as `gmacs=2.6`."""
        return ", ".join(f"{name}={value:g}" for name, value in vars(self).items() if value is not None)


def search_gmacs(searcher: LocalSearch, target: float, effort: float) -> Counts:
    """The schedule of least damage within so many multiply-adds.

    Args:
        searcher: Whose space is priced in multiply-adds, in units of 1e9.
        target: The most.
        effort: The multiply-adds that the search may take, in units of 1e9.

    Raises:
        TokencutError: The target is below what can be reached, or the dense model is within it.
    """
    space = searcher.space
    dense, least = space.price(space.dense), space.price(space.cheapest)
    if target >= dense:
        raise TokencutError(f"`gmacs={target:g}` is met by the dense model, which has {dense:.4g} GMACs; type "
                            f"less, such as `gmacs={0.65 * dense:.3g}`")  # fmt: skip
    start = searcher.begin(target)
    if start is None:
        raise TokencutError(f"`gmacs={target:g}` cannot be met: {least:.4g} GMACs is the least that these "
                            f"blocks can reach; type `gmacs={rounded_up(least)}`")  # fmt: skip
    best = searcher.climb(start, target, CLIMBING * effort)
    measure_around(searcher, best, target)
    return best


def search_drop(searcher: LocalSearch, most: float, effort: float) -> Counts:
    """The cheapest schedule that loses no more than so many points, one standard error on top.

    Args:
        searcher: Whose space is priced in multiply-adds, in units of 1e9.
        most: The points.
        effort: The multiply-adds that the search may take, in units of 1e9.

    Raises:
        TokencutError: Even the mildest schedule loses more, or there is only one image.
    """
    space, probe = searcher.space, searcher.probe
    if probe.images < 2:
        raise TokencutError(f"`max_drop={most:g}` cannot be told from a single image, which says nothing of others; "
                            "give more by `calibration` or `images=512`")  # fmt: skip
    dense, least = space.price(space.dense), space.price(space.cheapest)
    best = searcher.begin(least + MIDDLE * (dense - least)) if least < dense else None
    if best is None:
        raise TokencutError(f"`max_drop={most:g}` cannot be met cheaper than by the dense model, since stages in these "
                            "blocks take what they save; type `layers='all'`, or another `method`")  # fmt: skip
    for share in (*LADDER, *DEEPER):
        if share in DEEPER and not _cheapest_is_sure(searcher, most):
            break
        counts = space.scaled(best, least + share * (dense - least))
        if counts is not None:
            searcher.measured(counts)
    for until in (0.55, CLIMBING):
        price = _price_at(searcher, _rate(searcher), most)
        start = space.scaled(best, price)
        if start is None:
            break
        best = searcher.climb(start, space.price(start), until * effort)
    _close_in(searcher, best, most)
    chosen = cheapest(searcher, most)
    if chosen is None:
        rate = _rate(searcher)
        mildest = min(rate.bound(outcome.mean) for outcome in searcher.tried.values())
        raise TokencutError(f"`max_drop={most:g}` cannot be met: {mildest:.2g} is the least that any schedule tried is "
                            f"sure to stay within on {probe.images} images; type `max_drop={rounded_up(mildest)}`, or "
                            "give more images")  # fmt: skip
    return chosen


def cheapest(searcher: LocalSearch, most: float) -> Counts | None:
    """The cheapest schedule tried whose loss, one standard error on top, is within so many points."""
    rate = _rate(searcher)
    sure = [counts for counts, outcome in searcher.tried.items() if rate.bound(outcome.mean) <= most]
    return min(sure, key=searcher.space.price, default=None)


def within(searcher: LocalSearch, target: float) -> Counts | None:
    """The schedule tried that does the least damage at a price."""
    known = [counts for counts in searcher.tried if searcher.space.price(counts) <= target]
    return min(known, key=lambda counts: searcher.tried[counts].mean, default=None)


def measure_around(searcher: LocalSearch, best: Counts, target: float) -> None:
    """Runs the schedule scaled to prices around the target too, for the front."""
    space = searcher.space
    for factor in AROUND:
        if factor * target < space.price(space.dense):
            counts = space.scaled(best, factor * target)
            if counts is not None:
                searcher.measured(counts)


def _rate(searcher: LocalSearch) -> DropRate:
    """The rate fitted to the front of what was tried: what lies behind it is nothing to choose from."""
    front = _front(searcher)
    return fit_rate([searcher.tried[counts] for counts in front], searcher.probe.dense)


def _front(searcher: LocalSearch) -> list[Counts]:
    return pareto_front(searcher.tried, cost=searcher.space.price, gain=lambda counts: -searcher.tried[counts].mean)


def _cheapest_is_sure(searcher: LocalSearch, most: float) -> bool:
    """Whether even the cheapest schedule tried is sure to lose no more than so many points."""
    counts = _front(searcher)[0]
    return _rate(searcher).bound(searcher.tried[counts].mean) <= most


def _price_at(searcher: LocalSearch, rate: DropRate, most: float) -> float:
    """The price at which the front does the damage that loses `most` points: a line through it, both in logarithms."""
    front = _front(searcher)
    points = [(searcher.tried[counts].mean, searcher.space.price(counts)) for counts in reversed(front)]
    points = [(divergence, price) for divergence, price in points if divergence > 0]
    if not points:  # nothing tried changes the outputs
        return searcher.space.price(front[0])
    divergences, prices = zip(*points, strict=True)
    wanted = min(max(rate.divergence_at(most), divergences[0]), divergences[-1])
    return float(math.exp(np.interp(math.log(wanted), np.log(divergences), np.log(prices))))


def _close_in(searcher: LocalSearch, best: Counts, most: float) -> None:
    """Scales the best schedule up until it is sure, and down again for as long as it is."""
    space, price = searcher.space, searcher.space.price(best)
    sure = _rate(searcher).bound(searcher.tried[best].mean) <= most
    for _ in range(5):
        price *= 0.985 if sure else 1.015
        counts = space.scaled(best, price)
        if counts is None or price >= space.price(space.dense):
            break
        if (_rate(searcher).bound(searcher.measured(counts).mean) <= most) != sure:
            break


def rounded_up(value: float) -> str:
    """A number of three digits that is not smaller."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2) if value > 0 else 1.0
    return f"{math.ceil(value / step * (1 - 1e-12)) * step:.3g}"
