"""kmedoids: first medoids by class attention, clusters and new medoids in turn, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from given_inputs import given_input, grouping

from tokencut.blocks import Stage
from tokencut.methods import StageShape, make_method
from tokencut.ops.medoids import medoid_clusters

# On a line, the first two points being the first medoids: 0, 1, 2 and 9, 10, 12.
LINE = torch.tensor([[[0.0], [1.0], [2.0], [9.0], [10.0], [12.0]]])
ONES = torch.ones(1, 6)


def clusters(points: list[float], iterations: int, weight: torch.Tensor = ONES) -> list[int]:
    line = torch.tensor(points, dtype=torch.float32)[None, :, None]
    group: list[int] = medoid_clusters(line, weight, 2, iterations)[0].tolist()
    return group


def test_without_iterations_points_join_the_nearest_first_medoid() -> None:
    assert clusters([0, 1, 2, 9, 10, 12], 0) == [0, 1, 1, 1, 1, 1]


def test_first_iteration_by_hand() -> None:
    # First medoids 0 and 1: clusters {0} and {1, 2, 9, 10, 12}. Total squared distances within the second:
    # 1: 1+64+81+121 = 267, 2: 1+49+64+100 = 214, 9: 64+49+1+9 = 123, 10: 81+64+1+4 = 150, 12: 121+100+9+4 = 234.
    # Its medoid becomes 9, so that 1 and 2 go to medoid 0.
    assert clusters([0, 1, 2, 9, 10, 12], 1) == [0, 0, 0, 1, 1, 1]


def test_further_iterations_settle() -> None:
    assert clusters([0, 1, 2, 9, 10, 12], 2) == clusters([0, 1, 2, 9, 10, 12], 10) == [0, 0, 0, 1, 1, 1]


def test_weights_move_the_medoid() -> None:
    # First medoids 1 and 12; 6.75 joins 12 (5.25 away, against 5.75). Medoids of {1, 0, 2} and {12, 6.75, 12} stay.
    points = [1, 12, 0, 2, 6.75, 12]
    assert clusters(points, 1) == [0, 1, 0, 0, 1, 1]
    # With a weight of 100 the point 2 is the medoid: 4 + 1 = 5 against 100 + 1 and 400 + 1. Then 6.75 is 4.75 away from
    # it, nearer than 12. Its cluster now has the higher number, as 2 stands behind 12.
    heavy = ONES.clone()
    heavy[0, 3] = 100.0
    assert clusters(points, 1, heavy) == [1, 0, 1, 1, 1, 0]


def test_ties_go_to_the_earlier_point_and_no_cluster_is_empty() -> None:
    assert clusters([3, 3, 3, 3, 3], 3, torch.ones(1, 5)) == [0, 1, 0, 0, 0]


def test_a_tie_in_a_pair_goes_to_the_more_attentive() -> None:
    # First medoids are the tokens at 0 and 10; 6 joins 10, and 4 joins 0. Either of {6, 10} may be their medoid. The
    # more attentive 10 stays it; were it 6, which stands first, 4 would go over.
    stage_input = given_input([[6.0], [0.0], [10.0], [4.0]], attention=[0.1, 0.3, 0.2, 0.1])
    assert grouping(make_method("kmedoids", {"weights": "equal"}), stage_input, 2).group.tolist() == [[0, 1, 0, 1]]


def test_method_starts_from_the_attentive_and_merges_to_averages() -> None:
    stage_input = given_input(
        LINE[0].tolist(), attention=[0.3, 0.2, 0.1, 0.1, 0.1, 0.1], sizes=[1.0, 1.0, 2.0, 1.0, 1.0, 1.0]
    )
    start = Stage(make_method("kmedoids", {"iterations": 0, "weights": "equal"}))(stage_input, 2)
    assert start.image[0, :, 0].tolist() == pytest.approx([0.0, 34 / 5])
    settled = Stage(make_method("kmedoids", {"weights": "size"}))(stage_input, 2)
    assert settled.image[0, :, 0].tolist() == pytest.approx([5 / 4, 31 / 3])
    assert settled.sizes is not None
    assert settled.sizes.tolist() == [[4.0, 3.0]]


def test_costs_all_pairs_of_tokens_once() -> None:
    shape = StageShape(tokens=16, budget=8, width=64, key_width=32)
    for iterations in (0, 5):
        method = make_method("kmedoids", {"iterations": iterations, "features": "tokens"})
        assert method.macs(shape) == 16 * 16 * 64
