"""Decoupling and its ranking: highest first, equal scores by lower number."""

from __future__ import annotations

import torch

from tokencut.ops.ranking import by_attention, ranking, take

SCORES = torch.tensor([[0.1, 0.4, 0.2, 0.4], [0.3, 0.3, 0.3, 0.3]])


def test_ranking_is_from_high_to_low_and_equal_scores_by_number() -> None:
    assert ranking(SCORES).tolist() == [[1, 3, 2, 0], [0, 1, 2, 3]]


def test_ranking_stays_stable_where_the_sort_changes_its_algorithm() -> None:
    scores = torch.zeros(1, 5000)
    scores[0, 4000] = 1.0
    assert ranking(scores)[0].tolist() == [4000, *range(4000), *range(4001, 5000)]


def test_decouple_gives_attentive_by_rank_and_inattentive_by_number() -> None:
    attentive, inattentive = by_attention(SCORES, 3)
    assert attentive.tolist() == [[1, 3, 2], [0, 1, 2]]
    assert inattentive.tolist() == [[0], [3]]


def test_decouple_of_none_and_of_all() -> None:
    attentive, inattentive = by_attention(SCORES, 0)
    assert attentive.shape == (2, 0)
    assert inattentive.tolist() == [[0, 1, 2, 3]] * 2
    attentive, inattentive = by_attention(SCORES, 4)
    assert attentive.shape == (2, 4)
    assert inattentive.shape == (2, 0)


def test_take_entries_and_rows() -> None:
    index = torch.tensor([[3, 0], [1, 1]])
    assert take(SCORES, index).tolist() == [[SCORES[0, 3], SCORES[0, 0]], [SCORES[1, 1], SCORES[1, 1]]]
    rows = torch.arange(24.0).view(2, 4, 3)
    assert take(rows, index).tolist() == [[rows[0, 3].tolist(), rows[0, 0].tolist()], [rows[1, 1].tolist()] * 2]
