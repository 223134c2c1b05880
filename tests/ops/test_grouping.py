"""Groups: their members, numbers and weights, by hand."""

from __future__ import annotations

import torch

from tokencut.ops.grouping import group_average, in_order, led_by, membership


def test_weights_that_sum_to_zero_give_way_to_sizes() -> None:
    group = torch.tensor([[0, 0, 1]])
    weight = group_average(group, torch.tensor([[0.0, 0.0, 0.5]]), torch.tensor([[1.0, 3.0, 1.0]]), 2)
    assert weight.tolist() == [[0.25, 0.75, 1.0]]


def test_groups_are_numbered_by_their_smallest_member() -> None:
    assert in_order(torch.tensor([[2, 0, 2, 1]]), 3).tolist() == [[0, 1, 0, 2]]


def test_groups_that_are_told_by_any_member_are_numbered_likewise() -> None:
    leaders = torch.tensor([[5, 3, 3, 3, 0, 5], [1, 1, 2, 3, 4, 5]])
    assert led_by(leaders).tolist() == [[0, 1, 1, 1, 2, 0], [0, 0, 1, 2, 3, 4]]
    counted = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    assert led_by(leaders, counted)[1, 2:].tolist() == [0, 1, 2, 3]


def test_membership_is_one_row_a_group() -> None:
    assert membership(torch.tensor([[1, 0, 1]]), 2).tolist() == [[[False, True, False], [True, False, True]]]
