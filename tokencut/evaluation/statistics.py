"""Means over images with their standard errors, differences in accuracy, paired image by image; and the Pareto front.

Two models err on much the same images. What differs is how the few others fall, so a difference taken image by image is
known far better than the two accuracies themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

# A difference of fewer standard errors is taken for chance: beyond 2, chance alone gives one in 22.
CLEAR = 2.0

# For each image, whether a model is right; or one such row for each of several budgets.
Correct = Sequence[bool] | Sequence[Sequence[bool]]

Item = TypeVar("Item")


def mean_and_error(values: ArrayLike) -> tuple[float, float]:
    """A mean over images and its standard error, which is infinite for one image: it says nothing of others.

    Args:
        values: One of each image, `(images,)`.
    """
    known = np.asarray(values, dtype=float)
    error = float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.inf
    return float(known.mean()), error


def if_known(value: float) -> float | None:
    """A figure for JSON, which has no infinity: None where there are too few images to tell."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Difference:
    """How far one model is ahead of another.

    Attributes:
        points: Top-1 of the first less top-1 of the second, in percent points.
        standard_error: Of that, in percent points; infinite where there are too few images to tell.
    """

    points: float
    standard_error: float

    @property
    def is_clear(self) -> bool:
        """Whether it is more than two standard errors from none."""
        return abs(self.points) > CLEAR * self.standard_error

    def __str__(self) -> str:
        error = f"{self.standard_error:.2f}" if math.isfinite(self.standard_error) else "unknown"
        return f"{self.points + 0.0:+.2f} ± {error}"

    def verdict(self) -> str:
        """The difference in words, which say so where it may be chance."""
        return str(self) if self.is_clear else f"none beyond chance ({self})"


def paired_difference(first: Correct, second: Correct) -> Difference:
    """How far the first model is ahead of the second, on the same images in the same order.

    Given several rows, one a budget, each image's differences are averaged over the budgets first: what one image says
    at different budgets is not independent, so only the images are counted.

    Args:
        first: Whether the first model is right, by image, `(images,)` or `(budgets, images)`.
        second: The same of the second.

    Raises:
        ValueError: They are not of the same shape, or there are no images.
    """
    ahead, behind = np.atleast_2d(np.asarray(first, dtype=float)), np.atleast_2d(np.asarray(second, dtype=float))
    if ahead.shape != behind.shape or not ahead.size:
        raise ValueError(f"cannot pair results of shapes {ahead.shape} and {behind.shape}: expected the same images")
    return Difference(*mean_and_error(100 * (ahead - behind).mean(axis=0)))


def pareto_front(items: Iterable[Item], *, cost: Callable[[Item], float], gain: Callable[[Item], float]) -> list[Item]:
    """The items than which no other gains as much for as little, the cheapest first; of equals the first.

    Args:
        items: What there is to choose from.
        cost: Of an item, better the less it is.
        gain: Of an item, better the more it is.
    """
    front: list[Item] = []
    for item in sorted(items, key=lambda item: (cost(item), -gain(item))):
        if not front or gain(item) > gain(front[-1]):
            front.append(item)
    return front
