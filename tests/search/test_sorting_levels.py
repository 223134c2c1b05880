"""Images sorted into levels: the best of all ways to do it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tokencut.search import sorting


@pytest.mark.parametrize("most", [1, 2, 3])
def test_levels_are_the_best_of_all_that_rise(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(sorting, "BINS", 5)
    costs, lost = np.array([1.0, 2.0, 3.0]), np.random.default_rng(most).random((3, 5))
    sizes = np.array([2, 1, 1, 3, 1])
    found = sorting._least(lost, costs, 2.2, most, sizes)
    rising = [list(chosen) for chosen in itertools.combinations_with_replacement(range(3), 5)]
    allowed = [each for each in rising if len(set(each)) <= most and costs[each] @ sizes <= 2.2 * sizes.sum()]
    assert found.tolist() == min(allowed, key=lambda each: lost[each, range(5)].sum())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_rule_gives_the_cheap_level_to_those_that_lose_nothing(sign: int) -> None:
    signal = sign * np.arange(64.0)
    loss = np.stack([np.where(np.arange(64) < 32, 0.0, 1.0), np.zeros(64)])
    rule = sorting.calibrated(signal, loss, np.array([1.0, 3.0]), 2.0, 2)
    assert rule.loss == 0
    assert rule(signal).tolist() == [0] * 32 + [1] * 32
