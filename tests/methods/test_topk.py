"""topk: the attentive stay, in their places."""

from __future__ import annotations

from given_inputs import given_input, kept

from tokencut.blocks import Stage
from tokencut.methods import StageShape, make_method


def test_keeps_the_most_attentive_in_order_of_place() -> None:
    stage_input = given_input([[0.0], [1.0], [2.0], [3.0]], attention=[0.1, 0.2, 0.3, 0.25])
    left = Stage(make_method("topk"))(stage_input, 2)
    assert left.features[0, :, 0].tolist() == [9.0, 2.0, 3.0]
    assert left.sizes is None


def test_equal_attention_keeps_the_lower_numbers() -> None:
    stage_input = given_input([[0.0], [1.0], [2.0]], attention=[0.2, 0.2, 0.2])
    assert kept(make_method("topk"), stage_input, 2) == [[0, 1]]


def test_costs_nothing_of_its_own() -> None:
    assert make_method("topk").macs(StageShape(16, 8, 64, 32)) == 0
