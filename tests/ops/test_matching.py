"""The most similar pairs between two sides."""

from __future__ import annotations

import torch

from tokencut.ops.matching import match_pairs

# Directions in the plane; lengths differ, since similarity is the cosine.
POINTS = torch.tensor([[[1.0, 0.0], [0.0, 5.0], [2.0, 0.2], [0.1, 3.0], [-1.0, 0.0], [7.0, 0.0]]])
SIDE, PARTNER = torch.tensor([[0, 1, 4]]), torch.tensor([[2, 3, 5]])


def test_the_most_similar_pairs_win() -> None:
    # 0 -> 5 (cosine 1), 1 -> 3 (0.9994), 4 -> 3 (-0.033, the least unlike).
    away, joined = match_pairs(POINTS, SIDE, PARTNER, 1)
    assert (away.tolist(), joined.tolist()) == ([[0]], [[5]])
    away, joined = match_pairs(POINTS, SIDE, PARTNER, 3)
    assert (away.tolist(), joined.tolist()) == ([[0, 1, 4]], [[5, 3, 3]])


def test_no_pair() -> None:
    away, joined = match_pairs(POINTS, SIDE, PARTNER, 0)
    assert away.shape == joined.shape == (1, 0)


def test_ties_go_to_the_lower_place() -> None:
    same = torch.ones(1, 6, 2)
    away, joined = match_pairs(same, SIDE, PARTNER, 2)
    assert (away.tolist(), joined.tolist()) == ([[0, 1]], [[2, 2]])


def test_a_zero_point_is_similar_to_none_and_gives_no_nan() -> None:
    points = POINTS.clone()
    points[0, 1] = 0.0
    away, joined = match_pairs(points, SIDE, PARTNER, 2)
    # 1 is now at cosine 0 to all, still more alike than 4 at -0.033.
    assert (away.tolist(), joined.tolist()) == ([[0, 1]], [[5, 2]])
