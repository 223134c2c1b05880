"""The merging kernel against a batched product."""

from __future__ import annotations

import pytest
import torch

from tokencut.ops.grouping import Grouping, group_average, in_order
from tokencut.tokens import Tokens, apply_decision

pytest.importorskip("triton")

from tokencut.ops.kernels import merging


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("prefix", [0, 2])
def test_groups_behind_the_prefix_tokens(prefix: int, ordered: bool, device: str) -> None:
    features = torch.randn(2, prefix + 110, 20)
    group = torch.cat((torch.randint(0, 71, (40,)), torch.arange(70))).expand(2, -1)  # 70 is dropped
    group = in_order(group, 70) if ordered else group
    weight = group_average(group, torch.rand(2, 110), torch.ones(2, 110), 70)
    got = merging.merge(features.to(device), prefix, group.to(device), weight.to(device), 70, ordered).cpu()
    expected = apply_decision(Tokens(features, prefix), Grouping(group, weight, 70)).features
    torch.testing.assert_close(got, expected)
    assert torch.equal(got[:, :prefix], features[:, :prefix])


def test_a_token_alone_in_its_group_passes_unchanged(device: str) -> None:
    features = torch.randn(1, 9, 24, device=device, dtype=torch.float16)
    group = torch.arange(8, device=device).unsqueeze(0)
    got = merging.merge(features, 1, group, torch.ones(1, 8, device=device), 8, True)
    assert torch.equal(got, features)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_stay_behind_the_prefix_tokens(prefix: int, dtype: torch.dtype, device: str) -> None:
    features = torch.randn(2, prefix + 50, 140).to(dtype)[:, :, :132]  # rows that do not follow each other
    every = torch.stack([torch.randperm(50)[:37].sort().values for _ in range(2)])
    for index in (every, every[:1].expand(2, -1), every.repeat_interleave(2, 1)[:, ::2]):
        got = merging.take(features.to(device), prefix, index.to(device)).cpu()
        expected = torch.stack([part[prefix:][kept] for part, kept in zip(features, index, strict=True)])
        assert torch.equal(got, torch.cat((features[:, :prefix], expected), 1))


@pytest.mark.gpu
@pytest.mark.parametrize("ordered", [True, False])
def test_many_images(ordered: bool) -> None:
    features = torch.randn(256, 197, 384, device="cuda", dtype=torch.bfloat16)
    group = in_order(torch.cat((torch.arange(138), torch.randint(0, 138, (58,)))).expand(256, -1), 138).cuda()
    weight = group_average(group, torch.rand(256, 196, device="cuda"), torch.ones(256, 196, device="cuda"), 138)
    expected = apply_decision(Tokens(features.float(), 1), Grouping(group, weight, 138)).features
    for _ in range(3):
        got = merging.merge(features, 1, group, weight, 138, ordered)
        torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("prefix", [0, 2])
def test_gradients_are_those_of_the_product(prefix: int, device: str) -> None:
    features = torch.randn(2, prefix + 30, 20)
    group = in_order(torch.cat((torch.randint(0, 21, (10,)), torch.arange(20))).expand(2, -1), 20)  # 20 is dropped
    weight, direction = group_average(group, torch.rand(2, 30), torch.ones(2, 30), 20), torch.randn(2, prefix + 20, 20)
    leaf = features.clone().requires_grad_()
    (apply_decision(Tokens(leaf, prefix), Grouping(group, weight, 20)).features * direction).sum().backward()
    ours = features.to(device).requires_grad_()
    merged = merging.merge(ours, prefix, group.to(device), weight.to(device), 20, True)
    (merged * direction.to(device)).sum().backward()
    assert leaf.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.cpu(), leaf.grad)
