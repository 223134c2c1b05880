"""Tokens in flight: what a selection and a grouping do to features, sizes and source map."""

from __future__ import annotations

import pytest
import torch

from tokencut.ops.grouping import Grouping, Selection, group_average, in_order
from tokencut.tokens import Tokens, apply_decision


def small_tokens() -> Tokens:
    """One prefix token and four image tokens of two numbers; five patches, the last two in token 3."""
    features = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [2.0, 0.0], [0.0, 4.0], [0.0, 8.0]]])
    return Tokens(features, 1, torch.tensor([[1.0, 1.0, 1.0, 2.0]]), torch.tensor([[0, 1, 2, 3, 3]]))


def test_a_selection_keeps_rows_and_forgets_the_rest() -> None:
    left = apply_decision(small_tokens(), Selection(torch.tensor([[1, 3]])))
    assert left.features.tolist() == [[[9.0, 9.0], [2.0, 0.0], [0.0, 8.0]]]
    assert left.sizes is not None and left.sizes.tolist() == [[1.0, 2.0]]
    assert left.source is not None and left.source.tolist() == [[-1, 0, -1, 1, 1]]


def test_a_selection_of_unmerged_tokens_needs_no_sizes() -> None:
    tokens = Tokens(small_tokens().features, 1)
    left = apply_decision(tokens, Selection(torch.tensor([[0]])))
    assert left.sizes is None and left.source is None and left.known_sizes().tolist() == [[1.0]]


def test_a_grouping_averages_adds_sizes_and_follows_patches() -> None:
    tokens = small_tokens()
    group = torch.tensor([[0, 0, 1, 1]])
    weight = group_average(group, torch.tensor([[1.0, 3.0, 1.0, 1.0]]), tokens.known_sizes(), 2)
    left = apply_decision(tokens, Grouping(group, weight, 2))
    # (1 * 1 + 3 * 2) / 4 = 1.75 and (4 + 8) / 2 = 6
    assert left.features.tolist() == [[[9.0, 9.0], [1.75, 0.0], [0.0, 6.0]]]
    assert left.sizes is not None and left.sizes.tolist() == [[2.0, 3.0]]
    assert left.source is not None and left.source.tolist() == [[0, 0, 1, 1, 1]]


def test_a_grouping_may_drop_tokens() -> None:
    tokens = small_tokens()
    group = in_order(torch.tensor([[1, 2, 0, 0]]), 2)
    assert group.tolist() == [[0, 2, 1, 1]]
    weight = group_average(group, torch.ones(1, 4), tokens.known_sizes(), 2)
    left = apply_decision(tokens, Grouping(group, weight, 2))
    assert left.features.tolist() == [[[9.0, 9.0], [1.0, 0.0], [0.0, 6.0]]]
    assert left.source is not None and left.source.tolist() == [[0, -1, 1, 1, 1]]


def test_a_token_alone_in_its_group_passes_unchanged_in_half_precision() -> None:
    features = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tokens = Tokens(features, 1)
    group = torch.tensor([[0, 1, 2, 3, 3]]).expand(2, -1)
    weight = group_average(group, torch.rand(2, 5), torch.ones(2, 5), 4)
    left = apply_decision(tokens, Grouping(group, weight, 4))
    assert torch.equal(left.features[:, :4], features[:, :4])


def placed(positions: list[list[float]], sizes: list[float] | None = None) -> Tokens:
    """One image with a prefix token; each token is a number of ones, where and as large as told."""
    return Tokens(torch.ones(1, 1 + len(positions), 2), 1, None if sizes is None else torch.tensor([sizes]),
                  positions=torch.tensor([positions]))  # fmt: skip


def test_tokens_that_stay_bring_their_positions() -> None:
    left = apply_decision(placed([[0, 0], [0, 1], [1, 0], [1.5, 1]]), Selection(torch.tensor([[1, 3]])))
    assert left.positions is not None and left.positions.tolist() == [[[0, 1], [1.5, 1]]]


@pytest.mark.parametrize("compiling", [False, True])
def test_a_merged_token_is_where_its_patches_are_on_average(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # where sums must be in one order
    tokens = placed([[0, 8], [4, 0], [0.3, 0.7], [50, 50]], [1, 3, 2, 1])
    # The first two become one, whatever weights their features take; the last one is dropped.
    group, weight = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0.9, 0.1, 1.0, 1.0]])
    left = apply_decision(tokens, Grouping(group, weight, 2))
    assert left.positions is not None and tokens.positions is not None
    assert left.positions[0, 0].tolist() == [3, 2]  # (0 + 3 * 4) / 4 and (8 + 3 * 0) / 4
    assert torch.equal(left.positions[0, 1], tokens.positions[0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_by_adding_and_by_a_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 2 + 9, 4).to(dtype)
    group = [[4, 0, 1, 1, 2, 3, 0, 4, 0], [0, 1, 2, 3, 0, 0, 0, 4, 4], [3, 2, 1, 0, 4, 4, 4, 4, 4]]  # 4 is dropped
    group = in_order(torch.tensor(group), 4)
    weight = group_average(group, torch.rand(3, 9), torch.ones(3, 9), 4)
    decision, tokens = Grouping(group, weight, 4), Tokens(features, num_prefix_tokens=2)
    added = apply_decision(tokens, decision).features
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # where sums must be products
    product = apply_decision(tokens, decision).features
    assert added.dtype == product.dtype == dtype
    torch.testing.assert_close(added, product, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-2)
    assert torch.equal(added[:, :2], features[:, :2])
    assert torch.equal(added[2, 2:], features[2, 2:6])  # alone in their groups, in order of their first patch
