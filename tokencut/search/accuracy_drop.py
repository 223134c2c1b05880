"""How much is lost, and how much will be on other images: the rule behind `max_drop`.

What a few hundred labels say of a schedule's top-1 is known to a point or so, more than most people want to lose; and
of images that the model was trained on they say too much, since it has learned some by heart. So top-1 is judged by
margins: a decision that turns from one class to another loses, on average, what the dense model held the first for
likelier than the second, its probabilities being sharpened to fit the labels. On the CIFAR-10 ViT, five schedules lost
0.10, 0.16, 0.84, 1.34 and 1.82 points on 5,000 test images; by the margins on 1,024 training images 0.14, 0.27, 0.76,
1.78 and 1.49, by their labels 0.78, 0.88, 1.86, 2.34 and 2.73.

The rate at which points are lost with growing damage is fitted to many schedules at once: a change of the logits by `e`
has a KL divergence of order `e^2`, turns over a share `e` of the decisions, and each of them had a margin of order `e`.
Top-1 therefore falls with the damage itself, agreement with its square root.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokencut.evaluation.statistics import mean_and_error
from tokencut.search.probe import Outcome

Metric = Literal["top1", "agreement", "cosine"]

METRIC_NAMES: dict[Metric, str] = {
    "top1": "points of top-1 on labels",
    "agreement": "points of agreement with the dense model",
    "cosine": "points of cosine similarity of pooled features",
}
_POWERS: dict[Metric, float] = {"top1": 1.0, "agreement": 0.5, "cosine": 1.0}


def metric_of(dense: Outcome) -> Metric:
    """What a drop is counted in, given what is known of the dense model."""
    if dense.agrees is None:
        return "cosine"
    return "agreement" if dense.right is None else "top1"


def lost(outcome: Outcome, dense: Outcome) -> Tensor:
    """What each image loses against the dense model, in points (percent), `(images,)`; of top-1, by its label."""
    if outcome.agrees is None:
        return 100 * outcome.divergence
    if outcome.right is None or dense.right is None:
        return 100 * (~outcome.agrees).double()
    return 100 * (dense.right.double() - outcome.right.double())


def lost_on_average(outcome: Outcome, dense: Outcome) -> Tensor:
    """The same; of top-1, by its margin."""
    return lost(outcome, dense) if outcome.margin is None else 100 * outcome.margin


@dataclass(frozen=True)
class DropRate:
    """Points lost for damage: `rate * divergence ** power`.

    Attributes:
        metric: What is lost.
        rate: Its estimate, not negative.
        error: Its standard error over images; infinite for one image.
    """

    metric: Metric
    rate: float
    error: float

    def expected(self, divergence: float) -> float:
        """Points that a schedule of this damage loses."""
        return self.rate * self._grown(divergence)

    def bound(self, divergence: float) -> float:
        """The same with one standard error on top: what `max_drop` holds against its limit."""
        grown = self._grown(divergence)
        return (self.rate + self.error) * grown if grown else 0.0

    def divergence_at(self, points: float) -> float:
        """The damage whose bound is `points`."""
        slope = self.rate + self.error
        return math.inf if slope == 0 else float((points / slope) ** (1 / _POWERS[self.metric]))

    def _grown(self, divergence: float) -> float:
        return float(max(divergence, 0.0) ** _POWERS[self.metric])


def fit_rate(outcomes: Sequence[Outcome], dense: Outcome) -> DropRate:
    """Fits the rate to several schedules on the same images.

    A ratio of sums: schedules count by how much they lose. The error is taken over images, each with all its schedules,
    since what one image says of several is not independent.

    Args:
        outcomes: What the schedules did.
        dense: The dense model's own outcome.
    """
    metric = metric_of(dense)
    grown = math.fsum(max(outcome.mean, 0.0) ** _POWERS[metric] for outcome in outcomes)
    if not grown:
        return DropRate(metric, 0.0, 0.0)
    by_image = torch.stack([lost_on_average(outcome, dense) for outcome in outcomes]).sum(0) / grown
    mean, error = mean_and_error(by_image)
    if metric != "cosine":  # images none of which is lost do not say that less than one in so many is
        error = max(error, 100 / len(by_image) / grown)
    return DropRate(metric, max(0.0, mean), error)
