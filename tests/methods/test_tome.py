"""tome: the alternation by position, the published order, rounds, and sizes."""

from __future__ import annotations

import pytest
import torch
from given_inputs import given_input, grouping

from tokencut.blocks import Stage
from tokencut.methods import StageShape, make_method
from tokencut.methods.tome import match_round, rounds

# Directions of six keys: 0, 2, 4 point along the axes, 1, 3, 5 nearly so.
KEYS = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.3, 1.0], [-1.0, 0.0], [-1.0, 0.5]]


def test_rounds_merge_at_most_half() -> None:
    assert rounds(64, 32) == [32]
    assert rounds(64, 31) == [32, 31]
    assert rounds(7, 1) == [4, 2, 1]
    assert rounds(2, 1) == [1]
    assert rounds(5, 5) == []


def test_even_positions_with_one_prefix_token_are_the_odd_image_tokens() -> None:
    # Positions are 1 + number. Side A: 1, 3, 5; side B: 0, 2, 4. Cosines 1-0 0.995, 3-2 0.958, 5-4 0.894: 1 joins 0.
    group = match_round(torch.tensor([KEYS]), prefix=1, pairs=1)
    # What leaves: 3, 5 (rest of A), then 0, 2, 4 (B).
    assert group.tolist() == [[2, 2, 3, 0, 4, 1]]


@pytest.mark.parametrize("prefix", [0, 2])
def test_with_an_even_prefix_the_sides_change(prefix: int) -> None:
    # Side A: 0, 2, 4; side B: 1, 3, 5. 0 joins 1; what leaves: 2, 4, then 1, 3, 5.
    group = match_round(torch.tensor([KEYS]), prefix, pairs=1)
    assert group.tolist() == [[2, 2, 0, 3, 1, 4]]


def test_several_may_join_the_same_token() -> None:
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.01], [-1.0, 1.0], [1.0, 0.02]]])
    # Side A: 1, 3; side B: 0, 2; both are most like 0.
    assert match_round(keys, prefix=1, pairs=2).tolist() == [[0, 0, 1, 0]]


def test_one_stage_merges_by_size() -> None:
    image = [[float(number)] for number in range(6)]
    stage_input = given_input(image, keys=KEYS, sizes=[3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    left = Stage(make_method("tome"))(stage_input, 5)
    assert left.features[0, :, 0].tolist() == [9.0, 3.0, 5.0, 0.25, 2.0, 4.0]
    assert left.sizes is not None
    assert left.sizes.tolist() == [[1.0, 1.0, 4.0, 1.0, 1.0]]


def test_second_round_compares_size_averaged_keys() -> None:
    # Side A: 1, 3; side B: 0, 2. First round: 1 joins 0 (cosine 1) and 3 joins 2 (cosine 1), leaving {0, 1}, {2, 3}.
    # Then {2, 3} (position 2, side A) joins {0, 1}.
    image = [[0.0], [4.0], [8.0], [16.0]]
    stage_input = given_input(image, keys=[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]], sizes=[1.0, 1.0, 1.0, 5.0])
    decision = grouping(make_method("tome"), stage_input, 1)
    assert decision.group.tolist() == [[0, 0, 0, 0]]
    assert decision.weight.tolist() == [[0.125, 0.125, 0.125, 0.625]]


def test_keys_of_the_second_round_by_hand() -> None:
    # Side A: 1, 3, 5; side B: 0, 2, 4. All of A merge in the first round: {0, 1}, {2, 3}, {4, 5}, in this order, on
    # positions 1, 2, 3. Keys by size: {0, 1} = (1, 0); {2, 3} = (3 * (-0.5, 1) + (0.5, 1)) / 4 = (-0.25, 1), where the
    # plain mean would be (0, 1); {4, 5} = (-1, 0). Only {2, 3} is on side A: cosine -0.24 to the first and 0.24 to the
    # last, so it joins the last (by plain mean it would tie and join the first).
    keys = [[1.0, 0.0], [1.0, 0.0], [-0.5, 1.0], [0.5, 1.0], [-1.0, 0.0], [-1.0, 0.0]]
    stage_input = given_input([[0.0]] * 6, keys=keys, sizes=[1.0, 1.0, 3.0, 1.0, 1.0, 1.0])
    assert grouping(make_method("tome"), stage_input, 2).group.tolist() == [[0, 0, 1, 1, 1, 1]]


def test_costs_by_hand() -> None:
    shape = StageShape(tokens=7, budget=2, width=64, key_width=32)
    # Rounds 7 -> 4 -> 2: similarities 3 * 4 and 2 * 2, keys averaged once from 7 into 4.
    assert make_method("tome").macs(shape) == (3 * 4 + 4 * 7 + 2 * 2) * 32
