"""Paired differences and the Pareto front, against figures worked out by hand."""

from __future__ import annotations

import math
from operator import itemgetter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokencut.evaluation.statistics import Difference, if_known, mean_and_error, paired_difference, pareto_front

X, Y = itemgetter(0), itemgetter(1)


def test_mean_and_error_by_hand() -> None:
    # Of 1, 2, 3, 6 the mean is 3 and the variance (4 + 1 + 0 + 9) / 3.
    assert mean_and_error([1, 2, 3, 6]) == (3.0, pytest.approx(math.sqrt(14 / 3 / 4)))
    assert mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0])) == mean_and_error(np.array([1, 2, 3, 6]))
    assert mean_and_error([2.5, 2.5]) == (2.5, 0.0)


def test_of_one_image_the_error_is_not_known() -> None:
    assert mean_and_error([2.5]) == (2.5, math.inf)
    assert (if_known(math.inf), if_known(0.5)) == (None, 0.5)


def test_difference_and_standard_error_by_hand() -> None:
    # By image: +1, 0, -1, +1, so the mean is 1/4 and the variance (3 - 4/16) / 3 = 11/12.
    found = paired_difference([True, True, False, True], [False, True, True, False])
    assert found.points == 25.0
    assert found.standard_error == pytest.approx(100 * math.sqrt(11 / 12 / 4))


def test_images_on_which_both_agree_count_as_well() -> None:
    few = paired_difference([True] * 2 + [True] * 8, [False] * 2 + [True] * 8)
    many = paired_difference([True] * 2 + [True] * 98, [False] * 2 + [True] * 98)
    assert (few.points, many.points) == (20.0, 2.0)
    assert many.standard_error < few.standard_error


def test_several_budgets_are_averaged_image_by_image_first() -> None:
    # By image and budget: (+1, 0), (0, 0), (-1, +1), (0, +1); averaged 0.5, 0, 0, 0.5: mean 1/4, variance 1/12.
    first = [[True, True, False, False], [True, True, True, True]]
    second = [[False, True, True, False], [True, True, False, False]]
    found = paired_difference(first, second)
    assert found.points == 25.0
    assert found.standard_error == pytest.approx(100 * math.sqrt(1 / 12 / 4))


def test_the_same_results_at_every_budget_tell_no_more_than_once() -> None:
    first, second = [True, False, True, True], [False, False, True, False]
    once, often = paired_difference(first, second), paired_difference([first] * 5, [second] * 5)
    assert often.points == pytest.approx(once.points)
    assert often.standard_error == pytest.approx(once.standard_error)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_the_other_way_round_is_the_negative(results: list[tuple[bool, bool]]) -> None:
    first, second = zip(*results, strict=True)
    forth, back = paired_difference(first, second), paired_difference(second, first)
    assert forth.points == -back.points
    assert forth.standard_error == pytest.approx(back.standard_error)
    assert forth.points == pytest.approx(100 * (sum(first) - sum(second)) / len(first))


def test_one_image_tells_nothing() -> None:
    found = paired_difference([True], [False])
    assert (found.points, found.standard_error, found.is_clear) == (100.0, math.inf, False)


@pytest.mark.parametrize(
    ("points", "error", "text"),
    [
        (1.0, 0.25, "+1.00 ± 0.25"),
        (-1.0, 0.49, "-1.00 ± 0.49"),
        (1.0, 0.5, "none beyond chance (+1.00 ± 0.50)"),
        (-0.0, 0.0, "none beyond chance (+0.00 ± 0.00)"),
        (0.01, 0.0, "+0.01 ± 0.00"),
        (100.0, math.inf, "none beyond chance (+100.00 ± unknown)"),
    ],
)
def test_within_two_standard_errors_there_is_none(points: float, error: float, text: str) -> None:
    assert Difference(points, error).verdict() == text


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) and \(1, 1\): expected the same images"):
        paired_difference([True, True], [True])
    with pytest.raises(ValueError, match="expected the same images"):
        paired_difference([], [])


def test_front_of_costs() -> None:
    points = [(4.0, 80.0), (3.0, 79.0), (2.0, 79.0), (1.0, 70.0), (5.0, 80.0), (1.0, 71.0)]
    assert pareto_front(points, cost=X, gain=Y) == [(1.0, 71.0), (2.0, 79.0), (4.0, 80.0)]


def test_front_of_speeds() -> None:
    points = [(100.0, 80.0), (200.0, 79.0), (150.0, 78.0), (300.0, 70.0), (300.0, 69.0), (90.0, 80.0)]
    assert pareto_front(points, cost=lambda point: -point[0], gain=Y) == [(300.0, 70.0), (200.0, 79.0), (100.0, 80.0)]


def test_of_equals_the_first_is_on_the_front() -> None:
    items = [("late", 2.0, 5.0), ("first", 1.0, 5.0), ("second", 1.0, 5.0), ("best", 3.0, 6.0)]
    found = pareto_front(items, cost=itemgetter(1), gain=itemgetter(2))
    assert [name for name, *_ in found] == ["first", "best"]
    assert pareto_front([], cost=X, gain=Y) == []
