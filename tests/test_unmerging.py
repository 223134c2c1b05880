"""Un-merging: by hand, for every kind of stage."""

from __future__ import annotations

import pytest
import torch

from tokencut.errors import UsageError
from tokencut.ops.grouping import Grouping
from tokencut.tokens import Tokens, apply_decision
from tokencut.unmerging import Unmerging, successors, unmerge


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


def tokens(values: list[float], source: list[int], dtype: torch.dtype = torch.float32) -> Tokens:
    """One image: a prefix token (90) and image tokens of one number each."""
    features = torch.tensor([[[90.0], *([value] for value in values)]], dtype=dtype)
    return Tokens(features, 1, source=torch.tensor([source]))


def numbers(features: torch.Tensor) -> list[float]:
    return [float(value) for value in features.flatten()]


# Five patches, all the numbers exact in binary. The first stage makes 1, 2, 3, 4, 8 into (1 + 3) / 2 and 4 and (2 + 8)
# / 2; blocks make that 12, 24 and 45; the second stage makes (12 + 24) / 2 and leaves 45; blocks make that 58 and 145.
FIRST = tokens([1, 2, 3, 4, 8], [0, 1, 2, 3, 4]), tokens([2, 4, 5], [0, 2, 0, 1, 2])
SECOND = tokens([12, 24, 45], [0, 2, 0, 1, 2]), tokens([18, 45], [0, 1, 0, 0, 1])
LAST = tokens([58, 145], [0, 1, 0, 0, 1])


def test_changes_through_two_stages() -> None:
    unmerging = Unmerging("change")
    assert unmerging.full(FIRST[0]) is FIRST[0].features
    unmerging.stage(*FIRST)
    # 2 became 12, 4 became 24, 5 became 45: +10, +20, +40.
    assert numbers(unmerging.full(SECOND[0])) == [90, 1 + 10, 2 + 40, 3 + 10, 4 + 20, 8 + 40]
    unmerging.stage(*SECOND)
    # Right behind a stage nothing has changed yet.
    assert numbers(unmerging.patches(SECOND[1])) == [11, 42, 13, 24, 48]
    # 18 became 58, 45 became 145: +40, +100.
    assert numbers(unmerging.patches(LAST)) == [11 + 40, 42 + 100, 13 + 40, 24 + 40, 48 + 100]


def test_copies_through_two_stages() -> None:
    unmerging = Unmerging("copy")
    unmerging.stage(*FIRST)
    assert numbers(unmerging.full(SECOND[0])) == [90, 12, 45, 12, 24, 45]
    unmerging.stage(*SECOND)
    assert numbers(unmerging.patches(LAST)) == [58, 145, 58, 58, 145]


@pytest.mark.parametrize(("rule", "expected"), [("change", [51, 42, 13, 64, 148]), ("copy", [58, 45, 12, 58, 145])])
def test_a_dropped_patch_without_a_similar_token_keeps_its_last_features(rule: str, expected: list[float]) -> None:
    unmerging = Unmerging(rule)
    unmerging.stage(*FIRST)
    # The second stage drops patches 1 and 2, though each went into a token with another in the first.
    unmerging.stage(SECOND[0], tokens([18, 45], [0, -1, -1, 0, 1]))
    assert numbers(unmerging.patches(tokens([58, 145], [0, -1, -1, 0, 1]))) == expected
    # A further stage has nothing more to take from them.
    unmerging.stage(tokens([58, 145], [0, -1, -1, 0, 1]), tokens([145], [-1, -1, -1, -1, 0]))
    last = [*expected[:4], expected[4] + 855 if rule == "change" else 1000]
    assert numbers(unmerging.patches(tokens([1000], [-1, -1, -1, -1, 0]))) == last


def test_a_dropped_patch_changes_as_the_most_similar_token_left_does() -> None:
    unmerging = Unmerging("change", similar=True)
    # Of 1, 2, 10, 4, 8 the third and the fourth stay; the others are nearest to 4, 4 and 10.
    unmerging.stage(tokens([1, 2, 10, 4, 8], [0, 1, 2, 3, 4]), tokens([10, 4], [-1, -1, 0, 1, -1]))
    assert numbers(unmerging.patches(tokens([10, 4], [-1, -1, 0, 1, -1]))) == [1, 2, 10, 4, 8]
    # 10 becomes 15, 4 becomes 64.
    entering = tokens([15, 64], [-1, -1, 0, 1, -1])
    assert numbers(unmerging.full(entering)) == [90, 61, 62, 15, 64, 13]
    # Then what stood for them goes as well: they all follow 15, which becomes 16.
    unmerging.stage(entering, tokens([15], [-1, -1, 0, -1, -1]))
    assert numbers(unmerging.patches(tokens([16], [-1, -1, 0, -1, -1]))) == [62, 63, 16, 65, 14]


def test_tokens_that_stay_alone_follow_themselves_and_others_the_most_similar() -> None:
    # 1 and 50 are fused into 7, which is like neither; 2 and 40 stay. The second image drops its first two tokens.
    before = Tokens(torch.tensor([[0.0], [1], [50], [2], [40]]).expand(2, -1, -1), 1, source=torch.tensor(
        [[0, 1, 2, 3, 3], [3, 2, 1, 0, -1]]))  # fmt: skip
    behind = Tokens(torch.tensor([[[0.0], [7], [2], [40]], [[0], [2], [40], [7]]]), 1, source=torch.tensor(
        [[0, 0, 1, 2, 2], [1, 0, -1, -1, -1]]))  # fmt: skip
    assert successors(before, behind).tolist() == [[1, 2, 1, 2], [0, 1, 0, 1]]


def test_a_token_left_as_it_was_follows_itself_though_another_is_its_equal() -> None:
    before, behind = tokens([3, 3, 9], [0, 1, 2]), tokens([3, 3], [0, 1, -1])
    assert successors(before, behind).tolist() == [[0, 1, 0]]


def test_a_patch_alone_in_its_token_has_its_features_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    source = torch.tensor([[0, 1, 2, 3]]).expand(2, -1)
    unmerging = Unmerging("change")
    # The last two patches of the first image are merged, the first two of the second.
    groups = torch.tensor([[0, 1, 2, 2], [0, 0, 1, 2]])
    left = torch.stack([torch.cat((before[0, :3], before[0, 3:].mean(0, keepdim=True))),
                        torch.cat((before[1, :1], before[1, 1:3].mean(0, keepdim=True), before[1, 3:]))])  # fmt: skip
    unmerging.stage(Tokens(before, 1, source=source), Tokens(left, 1, source=groups))
    full = unmerging.full(Tokens(after[:, :4], 1, source=groups))
    assert torch.equal(full[:, 0], after[:, 0])
    assert torch.equal(full[0, 1:3], after[0, 1:3]) and torch.equal(full[1, 3:], after[1, 2:4])


def test_a_merged_token_that_keeps_its_members_length_is_where_changes_begin() -> None:
    # (6, 8) and (6, -8) average to (6, 0), which is made as long as they are: 10. The third token stays alone.
    before = Tokens(torch.tensor([[[6.0, 8.0], [6, -8], [0.3, 0.7]]]), 0, source=torch.tensor([[0, 1, 2]]))
    weight = torch.tensor([[0.5, 0.5, 1.0]])
    behind = apply_decision(before, Grouping(torch.tensor([[0, 0, 1]]), weight, 2, keep_norm=True))
    assert behind.features.tolist() == [[[10, 0], before.features[0, 2].tolist()]]
    unmerging = Unmerging("change")
    unmerging.stage(before, behind)
    assert torch.equal(unmerging.full(behind), before.features)
    later = behind.with_features(torch.tensor([[[13.0, 1.0], [0.9, 0.1]]]))  # the pair has changed by (3, 1)
    assert unmerging.full(later).tolist() == [[[9, 9], [9, -7], later.features[0, 1].tolist()]]


def test_changes_keep_the_features_precision() -> None:
    unmerging = Unmerging("change")
    unmerging.stage(*FIRST)
    assert unmerging.full(tokens([12, 24, 45], [0, 2, 0, 1, 2], torch.bfloat16)).dtype == torch.bfloat16


def test_a_rule_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        Unmerging("mean")
    assert str(caught.value) == "unmerge 'mean' is not known; give 'change' or 'copy'"
