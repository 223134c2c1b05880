"""Differences in accuracy, paired over the images that both models judged, with standard errors; and the Pareto front.

Two models err on much the same images. What differs is how the few others fall, so a difference taken image by image is
known far better than the two accuracies themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# A difference of fewer standard errors is taken for chance: beyond 2, chance alone gives one in 22.
CLEAR = 2.0

# For each image, whether a model is right; or one such row for each of several budgets.
Correct = Sequence[bool] | Sequence[Sequence[bool]]

Point = tuple[float, float]


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
        return f"{self.points + 0.0:+.2f} ± {self.standard_error:.2f}"

    def verdict(self) -> str:
        """The difference in words: `none` where it may be chance."""
        return str(self) if self.is_clear else f"none ({self})"


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
    by_image = 100 * (ahead - behind).mean(axis=0)
    images = len(by_image)
    error = float(by_image.std(ddof=1)) / math.sqrt(images) if images > 1 else math.inf
    return Difference(float(by_image.mean()), error)


def pareto_front(points: Iterable[Point], *, less_is_better: bool) -> list[Point]:
    """The points that no other is at least as good as in both, from the cheapest on.

    Args:
        points: `(x, y)`, of which y is better the higher.
        less_is_better: Whether x is a cost rather than a speed.
    """
    sign = 1 if less_is_better else -1
    front: list[Point] = []
    for point in sorted(set(points), key=lambda point: (sign * point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front
