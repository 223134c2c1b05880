"""Groups: their members, numbers and weights, by hand."""

from __future__ import annotations

import torch

from tokencut.ops.grouping import group_average, in_order, membership


def test_weights_that_sum_to_zero_give_way_to_sizes() -> None:
    group = torch.tensor([[0, 0, 1]])
    weight = group_average(group, torch.tensor([[0.0, 0.0, 0.5]]), torch.tensor([[1.0, 3.0, 1.0]]), 2)
    assert weight.tolist() == [[0.25, 0.75, 1.0]]


def test_groups_are_numbered_by_their_smallest_member() -> None:
    assert in_order(torch.tensor([[2, 0, 2, 1]]), 3).tolist() == [[0, 1, 0, 2]]


def test_membership_is_one_row_a_group() -> None:
    assert membership(torch.tensor([[1, 0, 1]]), 2).tolist() == [[[False, True, False], [True, False, True]]]
