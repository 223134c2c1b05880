"""The method of arXiv 2211.11315: its parts by hand, and each part taken away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokencut.errors import UsageError
from tokencut.reduction import StageShape, make_method
from tokencut.tokens import Grouping, Selection, apply_decision

from scenes import given_scene

# Six image tokens on a line: two attentive look-alikes, two inattentive pairs.
POINTS = [[0.0, 1.0], [5.0, 0.0], [5.1, 0.0], [0.0, 1.2], [9.0, 0.5], [9.1, 0.5]]
ATTENTION = [0.30, 0.05, 0.04, 0.28, 0.03, 0.02]
PAPER = {"preset": "paper", "clusters": 2 / 3, "pairs": 1 / 3, "neighbours": 2}


def test_attentive_are_paired_and_inattentive_clustered() -> None:
    # Of 6 tokens 3 leave: 2 clusters, 1 pair, so 2 attentive (0 and 3), which are the pair.
    scene = given_scene(POINTS, ATTENTION)
    decision = make_method("bat", PAPER).decide(scene, 3)
    assert isinstance(decision, Grouping)
    assert decision.group.tolist() == [[0, 1, 1, 0, 2, 2]]
    left = apply_decision(scene.tokens, decision).image[0]
    # Weighted by class attention: (0.30 * 1.0 + 0.28 * 1.2) / 0.58, (0.05 * 5 + 0.04 * 5.1) / 0.09, (0.03 * 9 + 0.02 * 9.1) / 0.05
    expected = torch.tensor([[0.0, 0.636 / 0.58], [0.454 / 0.09, 0.0], [0.452 / 0.05, 0.5]])
    torch.testing.assert_close(left, expected)


def test_without_matching_attentive_tokens_stay_alone() -> None:
    # No pairs: 2 clusters and 1 attentive token; token 3 must join a cluster.
    decision = make_method("bat", {**PAPER, "pairs": 0}).decide(given_scene(POINTS, ATTENTION), 3)
    assert isinstance(decision, Grouping)
    assert decision.group[0, 0] == 0 and (decision.group[0, 1:] != 0).all()


def test_without_clustering_inattentive_tokens_are_dropped() -> None:
    options = {**PAPER, "inattentive": "drop"}
    decision = make_method("bat", options).decide(given_scene(POINTS, ATTENTION), 3)
    # 3 removed, a third of them by pairing: 4 attentive tokens (0, 3, 1, 2) of which one joins another.
    assert isinstance(decision, Grouping)
    assert decision.group[0, 4:].tolist() == [-1, -1] and decision.group[0].max() == 2


def test_importance_only_is_topk() -> None:
    scene = given_scene(POINTS, ATTENTION)
    decision = make_method("bat", {"inattentive": "drop", "pairs": 0}).decide(scene, 3)
    expected = make_method("topk").decide(scene, 3)
    assert isinstance(decision, Selection) and isinstance(expected, Selection)
    assert decision.index.tolist() == expected.index.tolist() == [[0, 1, 3]]


def test_diversity_only_asks_for_no_class_attention() -> None:
    method = make_method("bat", {"clusters": 1})
    assert not method.reads_attention()
    decision = method.decide(given_scene(POINTS), 3)
    assert isinstance(decision, Grouping) and decision.group.tolist() == [[0, 1, 1, 0, 2, 2]]


def test_a_budget_of_one_is_one_cluster_of_all() -> None:
    for options in ({}, PAPER):
        decision = make_method("bat", options).decide(given_scene(POINTS, ATTENTION), 1)
        assert isinstance(decision, Grouping) and decision.group.tolist() == [[0] * 6]


def test_a_heavy_token_is_denser() -> None:
    # Three tokens, the outer ones equally far from the middle: without mass the middle is densest and a centre, and of
    # the outer ones the first; a mass of 1 makes token 2, of 50 patches, the densest.
    points = [[0.0], [1.0], [2.0]]
    light = make_method("bat", {"mass": 0.0}).decide(given_scene(points, sizes=[1.0, 1.0, 50.0]), 1)
    assert isinstance(light, Grouping)
    heavy = [
        make_method("bat", {"mass": mass, "neighbours": 2}).decide(
            given_scene([[0.0], [1.0], [1.4]], sizes=[1.0, 1.0, 50.0]), 2
        )
        for mass in (0.0, 1.0)
    ]
    # Nearest two: densities are those of distances 1, 0.4, 0.4; the centres are tokens 1 and 0. With its mass token 2 is
    # densest; token 1 is next to it, so the other centre is again 0, and token 1 joins token 2.
    assert [decision.group.tolist() for decision in heavy if isinstance(decision, Grouping)] == [
        [[0, 1, 1]],
        [[0, 1, 1]],
    ]


@pytest.mark.parametrize(
    ("options", "macs"),
    [
        ({"clusters": 1.0, "features": "tokens"}, 10 * 10 * 8),  # all ten tokens against each other
        ({"clusters": 1.0, "features": "keys"}, 10 * 10 * 4),
        # Of the budget of 6 three are clusters; 4 removed, half of them by 2 pairs: 5 attentive tokens, 5 inattentive.
        ({"clusters": 0.5, "pairs": 0.5, "features": "tokens", "match_features": "keys"}, 5 * 5 * 8 + 2 * 3 * 4),
        ({"inattentive": "drop", "pairs": 0.0}, 0),
    ],
)
def test_multiply_adds_by_hand(options: dict[str, Any], macs: int) -> None:
    assert make_method("bat", options).macs(StageShape(10, 6, 8, 4)) == macs


def test_presets() -> None:
    paper = make_method("bat", {"preset": "paper"}).options()
    assert paper["weights"] == "attention" and paper["features"] == "tokens" and paper["mass"] == 0.0
    assert make_method("bat", {"preset": "paper", "weights": "size"}).options()["weights"] == "size"
    with pytest.raises(UsageError, match="method bat has no preset 'papr', did you mean 'paper'"):
        make_method("bat", {"preset": "papr"})
    with pytest.raises(UsageError, match="method topk has no preset 'paper'; it has none"):
        make_method("topk", {"preset": "paper"})
