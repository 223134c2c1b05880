"""The kernels of bipartite soft matching against ToMe's decision in plain operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokencut.methods.tome import match_round, merged_by_kernels, rounds
from tokencut.ops.grouping import group_average, group_sum

pytest.importorskip("triton")

from tokencut.ops.kernels.matching import alternating_average

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")


def _plain(points: Tensor, sizes: Tensor, prefix: int, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    group, count = match_round(points, prefix, pairs), sizes.shape[1] - pairs
    return group, group_average(group, sizes, sizes, count), group_sum(group, sizes, count)


@pytest.mark.parametrize(("count", "prefix", "pairs"), [(70, 1, 30), (70, 1, 35), (33, 0, 5), (33, 1, 16), (7, 2, 0)])
def test_one_round(count: int, prefix: int, pairs: int, device: str) -> None:
    points, sizes = torch.randn(2, count, 20), torch.randint(1, 5, (2, count)).float()
    got = alternating_average(points.to(device), sizes.to(device), prefix, pairs)
    for ours, expected in zip(got, _plain(points, sizes, prefix, pairs), strict=True):
        torch.testing.assert_close(ours.cpu(), expected)


def test_ties_go_to_the_earlier_token(device: str) -> None:
    points = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    sizes = torch.ones(1, 6)
    for pairs in (1, 2):
        got = alternating_average(points.to(device), sizes.to(device), 1, pairs)
        assert torch.equal(got[0].cpu(), _plain(points, sizes, 1, pairs)[0])


@pytest.mark.parametrize("budget", [40, 20, 3])
def test_several_rounds(budget: int, device: str) -> None:
    keys, sizes = torch.randn(2, 61, 16), torch.randint(1, 4, (2, 61)).float()
    group, now = torch.arange(61).expand(2, -1), 61
    for leaving in rounds(61, budget):
        matrix = (
            torch.nn.functional.one_hot(group, now).transpose(1, 2) * group_average(group, sizes, sizes, now)[:, None]
        )
        group = match_round(matrix @ keys, 1, now - leaving).gather(1, group)
        now = leaving
    got = merged_by_kernels(keys.to(device), sizes.to(device), 1, budget)
    assert torch.equal(got.group.cpu(), group)
    torch.testing.assert_close(got.weight.cpu(), group_average(group, sizes, sizes, budget))
    assert got.sizes is not None
    torch.testing.assert_close(got.sizes.cpu(), group_sum(group, sizes, budget))


def test_keys_that_are_no_numbers_stay_inside_their_memory(device: str) -> None:
    points = torch.full((1, 9, 4), torch.nan, device=device)
    group, _, _ = alternating_average(points, torch.ones(1, 9, device=device), 1, 3)
    assert int(group.min()) >= 0
    assert int(group.max()) < 6


@pytest.mark.gpu
@pytest.mark.parametrize("count", [196, 1369])
def test_many_images(count: int) -> None:
    """At full load, but for what the order of summation decides."""
    points = torch.randn(64, count, 64, device="cuda")
    sizes = torch.randint(1, 5, (64, count), device="cuda").float()
    expected = _plain(points.double(), sizes, 1, count // 3)
    for _ in range(3):
        group, weight, held = alternating_average(points, sizes, 1, count // 3)
        same = group == expected[0]
        assert same.float().mean() > 0.98
        torch.testing.assert_close(held.sum(1), sizes.sum(1))
        total = torch.zeros_like(held).scatter_add(1, group, weight)
        torch.testing.assert_close(total, torch.ones_like(total))
