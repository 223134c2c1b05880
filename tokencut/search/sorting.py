"""Which keep rate an image gets by one number, so that all of them together lose least at a mean cost. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

# Calibration images are sorted by their signal into so many bins of a size, each of which gets one level.
BINS = 32
# Costs are added up in this share of the budget of one bin.
UNIT = 0.01


@dataclass(frozen=True)
class Rule:
    """Which level an image gets.

    Attributes:
        limits: Ascending values of the signal; an image between two of them is in that place of `levels`.
        levels: Numbers of levels.
        loss: Mean loss on the calibration images.
    """

    limits: Floats
    levels: Whole
    loss: float

    def __call__(self, signal: Floats) -> Whole:
        """The level of each image."""
        return self.levels[np.searchsorted(self.limits, signal, side="right")]


def calibrated(signal: Floats, loss: Floats, costs: Floats, budget: float, most: int) -> Rule:
    """Of the rules by which levels rise or fall with a signal, the one that loses least on calibration images.

    One level for all images is among them, where it costs no more than the budget.

    Args:
        signal: Of each image.
        loss: What it loses at each level.
        costs: What each level costs, ascending.
        budget: The mean cost.
        most: How many levels there may be.
    """
    order = np.argsort(signal, kind="stable")
    bins = np.array_split(order, BINS)
    lost = np.stack([loss[:, members].sum(1) for members in bins], 1) / len(signal)
    sizes = np.array([len(members) for members in bins])
    rising = _least(lost, costs, budget, most, sizes)
    falling = _least(lost[:, ::-1], costs, budget, most, sizes[::-1])[::-1]
    levels = min((rising, falling), key=lambda levels: lost[levels, np.arange(BINS)].sum())
    starts = np.array([signal[members[0]] for members in bins[1:]])
    return Rule(starts, levels, float(lost[levels, np.arange(BINS)].sum()))


def _least(lost: Floats, costs: Floats, budget: float, most: int, sizes: Whole) -> Whole:
    """The level of each bin, not falling, that loses least in all: exact but for costs, which are rounded up to units.

    `lost` is `(levels, bins)`, `sizes` the images of each bin.
    """
    share = sizes / sizes.mean()
    units = np.ceil(np.outer(costs, share) / (UNIT * budget) - 1e-6).astype(int)
    total = round(BINS / UNIT)
    # By the last bin's level, how many levels were used, and what was spent.
    best = np.full((len(costs), most, total + 1), np.inf)
    came = np.zeros((BINS, *best.shape), dtype=np.int64)
    for level, spent in enumerate(units[:, 0]):
        if spent <= total:
            best[level, 0, spent] = lost[level, 0]
    for place in range(1, BINS):
        entered = np.full_like(best, np.inf)
        below = np.full((most, total + 1), np.inf)  # the best of all cheaper levels, and which that is
        which = np.zeros((most, total + 1), dtype=np.int64)
        for level, spent in enumerate(units[:, place]):
            stays = best[level]
            changed = np.vstack((np.full((1, total + 1), np.inf), below[:-1]))
            from_level = np.vstack((np.zeros((1, total + 1), dtype=np.int64), which[:-1]))
            taken = np.where(changed < stays, changed, stays)
            source = np.where(changed < stays, from_level, level)
            entered[level, :, spent:] = taken[:, : total + 1 - spent] + lost[level, place]
            came[place, level, :, spent:] = source[:, : total + 1 - spent]
            better = stays < below
            below, which = np.where(better, stays, below), np.where(better, level, which)
        best = entered
    level, used, spent = map(int, np.unravel_index(np.argmin(best), best.shape))
    levels = [level]
    for place in range(BINS - 1, 0, -1):
        before = int(came[place, level, used, spent])
        spent, used, level = spent - int(units[level, place]), used - int(before != level), before
        levels.append(before)
    return np.array(levels[::-1])
