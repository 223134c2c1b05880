"""Schedules: every way of writing one, and the one clamp."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencut.errors import UsageError
from tokencut.schedule import (
    Split,
    StagePlan,
    default_layers,
    kept_tokens,
    make_schedule,
    named_layers,
    split_budget,
)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(12, (4, 7, 10)), (24, (8, 14, 20)), (6, (2, 4, 5)), (32, (11, 19, 27)), (2, (1, 2)), (1, (1,))],
)
def test_default_layers_scale_with_depth(depth: int, layers: tuple[int, ...]) -> None:
    assert default_layers(depth) == layers


@pytest.mark.parametrize(
    ("keep", "tokens", "kept"),
    [(0.7, 196, 138), (0.07, 100, 7), (0.5, 49, 25), (1.0, 196, 196), (0.001, 196, 1), (0.3, 10, 3)],
)
def test_kept_tokens_is_the_ceiling_of_the_decimal_typed(keep: float, tokens: int, kept: int) -> None:
    assert kept_tokens(keep, tokens) == kept


@pytest.mark.parametrize(
    ("name", "depth", "layers"),
    [
        ("late", 12, (6, 8, 10)),
        ("late", 24, (12, 16, 20)),
        ("late", 2, (1, 2)),
        ("gradual", 12, (4, 5, 6, 7, 8, 9, 10)),
        ("gradual", 24, (8, 10, 12, 14, 16, 18, 20)),
        ("gradual", 6, (2, 3, 4, 5)),
        ("all", 3, (1, 2, 3)),
    ],
)
def test_placements_with_a_name_scale_with_depth(name: str, depth: int, layers: tuple[int, ...]) -> None:
    assert named_layers(name, depth) == layers
    assert make_schedule(depth, 0.9, name, None).layers == layers


def test_one_keep_for_the_papers_layers() -> None:
    plans = make_schedule(12, 0.7, None, None).resolve(196)
    assert plans == (StagePlan(4, 196, 138), StagePlan(7, 138, 97), StagePlan(10, 97, 68))


def test_a_keep_for_each_layer_and_no_stage_where_nothing_goes() -> None:
    plans = make_schedule(12, (0.9, 1.0, 0.5), (3, 6, 9), None).resolve(100)
    assert plans == (StagePlan(3, 100, 90), StagePlan(9, 90, 45))


def test_reduce_by_takes_all_layers_and_at_most_half() -> None:
    plans = make_schedule(4, None, None, 40).resolve(100)
    assert [plan.tokens_out for plan in plans] == [60, 30, 15, 8]
    assert make_schedule(4, None, (2,), 40).resolve(100) == (StagePlan(2, 100, 60),)


def test_a_method_may_let_more_leave_as_published() -> None:
    plans = make_schedule(12, 0.5, None, None).resolve(64, lambda tokens, budget: budget + 1)
    assert [plan.tokens_out for plan in plans] == [33, 18, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 0.0, None, None), "keep 0.0 is not in (0, 1]; it is the fraction of tokens that stay, such as `keep=0."),
        ((12, 1.2, None, None), "keep 1.2 is not in (0, 1]"),
        ((12, float("nan"), None, None), "keep nan is not in (0, 1]"),
        ((12, True, None, None), "keep True is not in (0, 1]"),
        ((12, (0.5, -1.0), (1, 2), None), "keep -1.0 is not in (0, 1]"),
        ((12, (0.5, 0.6, 0.7), (4, 7), None),
         "3 keep rates for 2 layers; give one number for all, or one per layer, such as `keep=[0.7, 0.7]`"),
        ((12, 0.5, (0,), None), "layer 0 does not exist: this model has blocks 1 to 12, such as `layers=[4, 7, 10]`"),
        ((12, 0.5, (13,), None), "layer 13 does not exist: this model has blocks 1 to 12, such as `layers=[4, 7, 10]`"),
        ((12, 0.5, (4, 4, 7), None), "layer 4 is given twice; name each block once, such as `layers=[4, 7]`"),
        ((12, 0.5, (7, 4), None), "layers 7,4 are not in ascending order; write `layers=[4, 7]`"),
        ((12, 0.5, (), None), "no layer given; name blocks from 1 on, such as `layers=[4, 7, 10]`"),
        ((12, None, None, 0), "`reduce_by=0` is not a whole number from 1 to 65536; type `reduce_by=13`"),
        ((12, 0.5, None, 3), "give either a keep rate (`keep=0.7`) or `reduce_by`, not both and not neither"),
        ((12, None, None, None), "give either a keep rate (`keep=0.7`) or `reduce_by`, not both and not neither"),
    ],
)  # fmt: skip
def test_wrong_schedules_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_schedule(*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_splits_by_hand() -> None:
    # Of 100 tokens 70 leave: 20 clusters, and of the 30 removed a third by 10 pairs; so 60 attentive, 40 inattentive.
    assert split_budget(100, 70, 20 / 70, 1 / 3) == Split(60, 10, 20)
    assert split_budget(100, 50, 1.0, 0.5) == Split(0, 0, 50)
    assert split_budget(100, 50, None, 0.0) == Split(50, 0, 0)
    assert split_budget(2, 1, 0.3, 0.3) == Split(0, 0, 1)


@given(
    tokens=st.integers(2, 300),
    share=st.floats(0, 1),
    clusters=st.one_of(st.none(), st.floats(0, 1)),
    pairs=st.floats(0, 1),
)
def test_every_split_is_possible(tokens: int, share: float, clusters: float | None, pairs: float) -> None:
    budget = max(1, min(tokens - 1, round(tokens * share)))
    split = split_budget(tokens, budget, clusters, pairs)
    assert split.attentive - split.pairs + split.clusters == budget
    assert 0 <= split.pairs <= split.attentive / 2
    if clusters is None:
        assert split.clusters == 0 and split.attentive <= tokens
    else:
        assert 1 <= split.clusters <= tokens - split.attentive
