"""The method of arXiv 2211.11315: its parts by hand, and each part taken away."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from given_inputs import given_input, grouping

from tokencut.errors import UsageError
from tokencut.methods import StageShape, make_method
from tokencut.ops.grouping import Grouping, Selection
from tokencut.tokens import apply_decision

# Six image tokens on a line: two attentive look-alikes, two inattentive pairs.
POINTS = [[0.0, 1.0], [5.0, 0.0], [5.1, 0.0], [0.0, 1.2], [9.0, 0.5], [9.1, 0.5]]
ATTENTION = [0.30, 0.05, 0.04, 0.28, 0.03, 0.02]
PAPER = {"preset": "paper", "clusters": 2 / 3, "pairs": 1 / 3, "neighbours": 2}


def test_attentive_are_paired_and_inattentive_clustered() -> None:
    # Of 6 tokens 3 leave: 2 clusters, 1 pair, so 2 attentive (0 and 3), which are the pair.
    stage_input = given_input(POINTS, ATTENTION)
    decision = make_method("bat", PAPER).decide(stage_input, 3)
    assert isinstance(decision, Grouping)
    assert decision.group.tolist() == [[0, 1, 1, 0, 2, 2]]
    left = apply_decision(stage_input.tokens, decision).image[0]
    # Weighted by class attention: (0.30 * 1.0 + 0.28 * 1.2) / 0.58, (0.05 * 5 + 0.04 * 5.1) / 0.09,
    # (0.03 * 9 + 0.02 * 9.1) / 0.05
    expected = torch.tensor([[0.0, 0.636 / 0.58], [0.454 / 0.09, 0.0], [0.452 / 0.05, 0.5]])
    torch.testing.assert_close(left, expected)


def test_without_matching_attentive_tokens_stay_alone() -> None:
    # No pairs: 2 clusters and 1 attentive token; token 3 must join a cluster.
    decision = make_method("bat", {**PAPER, "pairs": 0}).decide(given_input(POINTS, ATTENTION), 3)
    assert isinstance(decision, Grouping)
    assert decision.group[0, 0] == 0 and (decision.group[0, 1:] != 0).all()


def test_without_clustering_inattentive_tokens_are_dropped() -> None:
    options = {**PAPER, "inattentive": "drop"}
    decision = make_method("bat", options).decide(given_input(POINTS, ATTENTION), 3)
    # 3 removed, a third of them by pairing: 4 attentive tokens (0, 3, 1, 2) of which one joins another.
    assert isinstance(decision, Grouping)
    assert decision.group[0, 4:].tolist() == [3, 3] and decision.group[0, :4].max() == 2


def test_of_a_pair_the_less_attentive_side_is_merged_away() -> None:
    # By rank of attention 0, 1, 2, 3: the paper's sides are {1, 3}, which are merged away, into {0, 2}. 1 and 3 are
    # both nearest to 0, so that 2 stays alone; were {0, 2} merged away, 2 would have to join one of them.
    points = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, -0.1]]
    stage_input = given_input(points, [0.4, 0.3, 0.2, 0.1])
    options = {"preset": "paper", "inattentive": "drop", "pairs": 1}
    assert grouping(make_method("bat", options), stage_input, 2).group.tolist() == [[0, 0, 1, 0]]


def test_importance_only_is_topk() -> None:
    stage_input = given_input(POINTS, ATTENTION)
    decision = make_method("bat", {"inattentive": "drop", "pairs": 0}).decide(stage_input, 3)
    expected = make_method("topk").decide(stage_input, 3)
    assert isinstance(decision, Selection) and isinstance(expected, Selection)
    assert decision.index.tolist() == expected.index.tolist() == [[0, 1, 3]]


def test_diversity_only_asks_for_no_class_attention() -> None:
    method = make_method("bat", {"clusters": 1})
    assert not method.reads_attention()
    decision = method.decide(given_input(POINTS), 3)
    assert isinstance(decision, Grouping) and decision.group.tolist() == [[0, 1, 1, 0, 2, 2]]


def test_a_budget_of_one_is_one_cluster_of_all() -> None:
    for options in ({}, PAPER):
        decision = make_method("bat", options).decide(given_input(POINTS, ATTENTION), 1)
        assert isinstance(decision, Grouping) and decision.group.tolist() == [[0] * 6]


def test_a_heavy_token_is_denser() -> None:
    # One neighbour, itself: every published density is its mass. Without mass the order is that of the tokens, the
    # separations are 10, 1, 1, 8, and the centres tokens 0 and 3. With sizes squared, log densities are 0, 4.4, 4.4, 0,
    # and so the scores 0, 6.7, 4.4, 2.1: the centres are tokens 1 and 2.
    stage_input = given_input([[0.0], [1.0], [2.0], [10.0]], sizes=[1.0, 9.0, 9.0, 1.0])
    groups = []
    for mass in (0.0, 2.0):
        options = {"mass": mass, "neighbours": 1, "features": "tokens", "density": "published"}
        decision = make_method("bat", options).decide(stage_input, 2)
        assert isinstance(decision, Grouping)
        groups.append(decision.group.tolist())
    assert groups == [[[0, 0, 0, 1]], [[0, 0, 1, 1]]]


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


def test_merged_tokens_stay_as_long_as_their_members() -> None:
    # Two pairs at right angles: of the lengths 3 and 5 (sizes 1 and 3) and of 2 and 2. The averages lie in between.
    stage_input = given_input([[3.0, 0.3], [0.0, 2.0], [5.0, 0.0], [0.1, 2.0]], sizes=[1.0, 1.0, 3.0, 1.0])
    decision = grouping(make_method("bat"), stage_input, 2)
    assert decision.group.tolist() == [[0, 1, 0, 1]]
    left = apply_decision(stage_input.tokens, decision).image[0]
    lengths = torch.tensor([(math.hypot(3, 0.3) + 3 * 5) / 4, (2 + math.hypot(0.1, 2)) / 2])
    torch.testing.assert_close(left.norm(dim=1), lengths)
    plain = apply_decision(
        stage_input.tokens, grouping(make_method("bat", {"keep_norm": False}), stage_input, 2)
    ).image[0]
    torch.testing.assert_close(plain, torch.tensor([[(3 + 3 * 5) / 4, 0.3 / 4], [0.05, 2.0]]))
    torch.testing.assert_close(torch.nn.functional.normalize(left), torch.nn.functional.normalize(plain))


def test_members_that_cancel_out_are_not_blown_up() -> None:
    stage_input = given_input([[1.0, 1e-4], [-1.0, 1e-4]])
    left = apply_decision(stage_input.tokens, grouping(make_method("bat"), stage_input, 1)).image[0]
    torch.testing.assert_close(left, torch.tensor([[0.0, 1e-3]]))  # 10 times the average, not 10,000


def test_presets() -> None:
    paper = make_method("bat", {"preset": "paper"}).options()
    assert paper["weights"] == "attention" and paper["features"] == "tokens" and paper["mass"] == 0.0
    assert paper["density"] == "published" and paper["keep_norm"] is False
    assert make_method("bat", {"preset": "paper", "weights": "size"}).options()["weights"] == "size"
    with pytest.raises(UsageError, match="method bat has no preset 'papr', did you mean paper"):
        make_method("bat", {"preset": "papr"})
    with pytest.raises(UsageError, match="method topk has no preset 'paper'; it has none"):
        make_method("topk", {"preset": "paper"})


def test_tokens_of_different_windows_are_never_joined() -> None:
    # 128 tokens of which each stands twice, in the first half and in the second: 64 clusters join the copies, unless
    # they stand in different windows. Windows of 64 need 32 clusters each.
    angles = torch.linspace(0, 1.5, 64)
    points = torch.stack((angles.cos(), angles.sin()), 1).repeat(2, 1).tolist()
    stage_input = given_input(points)
    everywhere = grouping(make_method("bat"), stage_input, 64).group[0]
    assert torch.equal(everywhere[:64], everywhere[64:])
    apart = grouping(make_method("bat", {"window": 64}), stage_input, 64).group[0]
    assert not set(apart[:64].tolist()) & set(apart[64:].tolist())
    too_few = grouping(make_method("bat", {"window": 64}), stage_input, 63).group[0]
    assert set(too_few[:64].tolist()) & set(too_few[64:].tolist())
