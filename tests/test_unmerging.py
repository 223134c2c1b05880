"""Un-merging by hand: every patch gets the features of the token that its source map names."""

from __future__ import annotations

import pytest
import torch

from tokencut.errors import UsageError
from tokencut.tokens import Tokens
from tokencut.unmerging import unmerge


def merged(source: list[list[int]]) -> Tokens:
    """Two images; a prefix token, and image tokens 1 and 2 (11 and 12 in the second image), of two numbers."""
    features = torch.tensor([[[9.0, 9], [1, -1], [2, -2]], [[9, 9], [11, -11], [12, -12]]])
    return Tokens(features, 1, source=torch.tensor(source))


def test_every_patch_gets_its_tokens_features() -> None:
    full = unmerge(merged([[1, 0, 0, 1], [0, 1, 1, 1]]))
    assert full.tolist() == [[[2, -2], [1, -1], [1, -1], [2, -2]], [[11, -11], [12, -12], [12, -12], [12, -12]]]


def test_a_dropped_patch_is_zero_or_what_is_given_for_it() -> None:
    tokens = merged([[1, -1, 0, -1], [0, 1, -1, -1]])
    last = torch.arange(100.0, 116.0).view(2, 4, 2)
    assert unmerge(tokens).tolist() == [[[2, -2], [0, 0], [1, -1], [0, 0]], [[11, -11], [12, -12], [0, 0], [0, 0]]]
    assert unmerge(tokens, last).tolist() == [
        [[2, -2], [102, 103], [1, -1], [106, 107]],
        [[11, -11], [12, -12], [112, 113], [114, 115]],
    ]


def test_what_is_given_for_dropped_patches_takes_the_features_precision() -> None:
    tokens = merged([[1, -1], [0, 1]])
    assert unmerge(tokens.with_features(tokens.features.bfloat16()), torch.ones(2, 2, 2)).dtype == torch.bfloat16


def test_gradients_go_to_the_tokens_and_to_what_stands_for_the_dropped() -> None:
    tokens = merged([[1, 1, 1, -1], [0, 0, 1, -1]])
    features, last = tokens.features.requires_grad_(), torch.zeros(2, 4, 2, requires_grad=True)
    unmerge(tokens.with_features(features), last).sum().backward()
    assert features.grad is not None and features.grad[:, :, 0].tolist() == [[0, 0, 3], [0, 2, 1]]
    assert last.grad is not None and last.grad[:, :, 0].tolist() == [[0, 0, 0, 1]] * 2


def test_tokens_without_a_source_map_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        unmerge(Tokens(torch.zeros(1, 3, 2), 1))
    assert str(caught.value) == "the tokens have no source map to go back by; type model.trace(images, source=True)"
