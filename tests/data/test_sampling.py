"""Samples: every class gets its share, and an even spread is known beforehand."""

from __future__ import annotations

from collections import Counter

import pytest

from tokencut.data.sampling import stratified, strided_subset
from tokencut.errors import UsageError


def test_stratified_gives_every_class_its_share() -> None:
    # 10 of 20 from classes of 9, 7, 4: shares 4.5, 3.5, 2. The one left over goes to the lower class of equals.
    labels = [0] * 9 + [1] * 7 + [2] * 4
    drawn = stratified(labels, 10, seed=0)
    assert Counter(labels[index] for index in drawn) == {0: 5, 1: 3, 2: 2}
    assert drawn == sorted(set(drawn))
    assert drawn == stratified(labels, 10, seed=0)
    assert drawn != stratified(labels, 10, seed=1)


@pytest.mark.parametrize("count", [0, 20])
def test_stratified_draws_none_or_all(count: int) -> None:
    assert stratified([0] * 9 + [1] * 7 + [2] * 4, count, seed=0) == list(range(count))


def test_a_sample_is_spread_evenly() -> None:
    assert strided_subset(10, None) == list(range(10))
    assert strided_subset(10, 10) == strided_subset(10, 99) == list(range(10))
    assert strided_subset(10, 4) == [0, 2, 5, 7]
    assert strided_subset(5000, 10) == list(range(0, 5000, 500))


@pytest.mark.parametrize("limit", [0, -3])
def test_a_sample_of_nothing_is_refused(limit: int) -> None:
    with pytest.raises(UsageError) as caught:
        strided_subset(10, limit)
    assert str(caught.value) == f"`limit={limit}` is not a whole number from 1 to 1000000000; type `limit=1000`"
