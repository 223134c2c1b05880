"""evit: the attentive stay, the rest become one token."""

from __future__ import annotations

import pytest
from given_inputs import given_input

from tokencut.blocks import Stage
from tokencut.methods import StageShape, make_method
from tokencut.schedule import make_schedule

IMAGE = [[1.0], [2.0], [4.0], [8.0]]
ATTENTION = [0.25, 0.0625, 0.5, 0.125]


def test_fused_token_is_the_attention_weighted_sum() -> None:
    # Budget 3: tokens 2 and 0 stay; 1 and 3 are fused to 2/16 + 8/8 = 1.125, and stand at the place of token 1.
    left = Stage(make_method("evit"))(given_input(IMAGE, ATTENTION), 3)
    assert left.features[0, :, 0].tolist() == [9.0, 1.0, 1.125, 4.0]
    assert left.sizes is not None
    assert left.sizes.tolist() == [[1.0, 2.0, 1.0]]


def test_normalized_divides_by_the_weights() -> None:
    # (2/16 + 8/8) / (3/16) = 6
    left = Stage(make_method("evit", {"normalized": True}))(given_input(IMAGE, ATTENTION), 3)
    assert left.features[0, :, 0].tolist() == [9.0, 1.0, 6.0, 4.0]


def test_normalized_without_any_attention_left_weighs_by_size() -> None:
    stage_input = given_input(IMAGE, [0.0, 0.0, 1.0, 0.0], sizes=[1.0, 1.0, 1.0, 2.0])
    left = Stage(make_method("evit", {"normalized": True}))(stage_input, 2)
    assert left.features[0, :, 0].tolist() == [9.0, (1.0 + 2.0 + 16.0) / 4.0, 4.0]


def test_without_any_attention_left_the_published_sum_is_zero() -> None:
    left = Stage(make_method("evit"))(given_input(IMAGE, [0.0, 0.0, 1.0, 0.0]), 2)
    assert left.features[0, :, 0].tolist() == [9.0, 0.0, 4.0]


def test_budget_of_one_fuses_everything() -> None:
    left = Stage(make_method("evit"))(given_input(IMAGE, ATTENTION), 1)
    assert left.features[0, :, 0].tolist() == [9.0, 0.25 + 0.125 + 2.0 + 1.0]


def test_extra_token_leaves_one_more_and_the_next_stage_counts_it() -> None:
    schedule, extra = make_schedule(12, 0.7, None, None), make_method("evit", {"extra_token": True})
    plans = [(plan.tokens_in, plan.tokens_out) for plan in schedule.resolve(196, extra.tokens_out)]
    # ceil(0.7 * 196) = 138, and the fused one; ceil(0.7 * 139) = 98; ceil(0.7 * 99) = 70.
    assert plans == [(196, 139), (139, 99), (99, 71)]
    plans = [(plan.tokens_in, plan.tokens_out) for plan in schedule.resolve(196, make_method("evit").tokens_out)]
    assert plans == [(196, 138), (138, 97), (97, 68)]


def test_extra_token_where_the_fused_one_would_stand_for_one_token_makes_no_stage() -> None:
    extra = make_method("evit", {"extra_token": True})
    assert make_schedule(12, None, [1, 2], 1).resolve(10, extra.tokens_out) == ()


@pytest.mark.parametrize("options", [{}, {"normalized": True}])
def test_costs_no_product_of_its_own(options: dict[str, object]) -> None:
    assert make_method("evit", options).macs(StageShape(16, 8, 64, 32)) == 0
