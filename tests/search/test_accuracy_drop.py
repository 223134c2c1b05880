"""The rule behind `max_drop`, on outcomes whose answer can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tokencut.search.accuracy_drop import DropRate, fit_rate, lost, metric_of
from tokencut.search.probe import Outcome

RIGHT = torch.tensor([True] * 8 + [False] * 2)
DENSE = Outcome(torch.zeros(10).double(), RIGHT, torch.ones(10, dtype=torch.bool))


def outcome(divergence: float, wrong: int, *, labels: bool = True, head: bool = True) -> Outcome:
    """One that is wrong about so many of the images that the dense model has right, and agrees on the others."""
    turned = torch.arange(10) < wrong
    every = torch.full((10,), divergence).double()
    return Outcome(every, (RIGHT & ~turned) if labels else None, ~turned if head else None)


def test_what_is_counted_depends_on_what_is_known() -> None:
    assert metric_of(DENSE) == "top1"
    assert metric_of(Outcome(DENSE.divergence, None, DENSE.agrees)) == "agreement"
    assert metric_of(Outcome(DENSE.divergence, None, None)) == "cosine"


def test_points_are_percent_of_images() -> None:
    assert lost(outcome(0.1, 3), DENSE).mean() == 30
    unlabelled = Outcome(DENSE.divergence, None, DENSE.agrees)
    assert lost(outcome(0.1, 9, labels=False), unlabelled).mean() == 90
    features = Outcome(DENSE.divergence, None, None)
    assert lost(outcome(0.25, 0, labels=False, head=False), features).mean() == 25


def test_the_rate_is_a_ratio_of_sums() -> None:
    # 1 and 3 of 10 images lost, 10 and 30 points, for a damage of 0.1 and 0.3: 40 points for 0.4.
    rate = fit_rate([outcome(0.1, 1), outcome(0.3, 3)], DENSE)
    assert rate.metric == "top1"
    assert rate.rate == pytest.approx(100)
    # By image: 200 once, 100 twice, else 0, over 0.4; their deviation (n - 1 = 9) over the root of 10.
    by_image = [200 / 0.4, 100 / 0.4, 100 / 0.4, *[0.0] * 7]
    deviation = math.sqrt(sum((value - 100) ** 2 for value in by_image) / 9)
    assert rate.error == pytest.approx(deviation / math.sqrt(10))
    assert rate.expected(0.05) == pytest.approx(5)
    assert rate.bound(rate.divergence_at(2.0)) == pytest.approx(2.0)


def test_agreement_goes_with_the_root_of_the_damage() -> None:
    unlabelled = Outcome(DENSE.divergence, None, DENSE.agrees)
    rate = fit_rate([outcome(0.04, 2, labels=False)], unlabelled)
    assert rate.rate == pytest.approx(20 / 0.2)
    assert rate.expected(0.01) == pytest.approx(10)


def test_a_gain_counts_as_no_loss() -> None:
    better = Outcome(torch.full((10,), 0.1).double(), torch.ones(10, dtype=torch.bool), DENSE.agrees)
    rate = fit_rate([better], DENSE)
    assert rate.rate == 0
    assert rate.error > 0


def test_nothing_lost_says_no_more_than_the_images_can() -> None:
    # None of 10 images lost: the error is one image, 10 points, for a damage of 0.1.
    rate = fit_rate([outcome(0.1, 0)], DENSE)
    assert (rate.rate, rate.error) == (0, pytest.approx(100))


def test_no_damage_has_no_rate() -> None:
    rate = fit_rate([outcome(0.0, 0)], DENSE)
    assert rate == DropRate("top1", 0.0, 0.0)
    assert rate.divergence_at(0.5) == math.inf


def test_top1_is_judged_by_margins_where_they_are_known() -> None:
    turned = torch.tensor([0.2, 0.1] + [0.0] * 8).double()
    two = Outcome(torch.full((10,), 0.1).double(), RIGHT, turned == 0, turned)
    # 20 and 10 points in 10 images are 3 on average, for a damage of 0.1; by labels nothing was lost.
    assert fit_rate([two], DENSE).rate == pytest.approx(30)
    assert lost(two, DENSE).sum() == 0
