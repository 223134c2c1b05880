"""The clustering kernels against the plain PyTorch functions they stand in for."""

from __future__ import annotations

import pytest
import torch

from tokencut.ops import density_peaks, grouping
from tokencut.ops.density_peaks import PeakRule
from tokencut.ops.grouping import group_average, group_sum, in_order
from tokencut.tokens import Tokens, apply_decision

pytest.importorskip("triton")

from tokencut.ops.kernels import clusters, phases

# The interpreter computes lanes beyond the last token too, and numpy warns of what is thrown away there.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


@pytest.fixture(params=["whole", "phases"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of launching: all of an image by one program, and one launch a phase."""
    if request.param == "phases":
        monkeypatch.setattr(clusters, "WHOLE", 0)


# Every way of a kernel: the published rule, and the scale-free one with and without lengths.
RULES = [
    PeakRule(neighbours, mass, balance, cosine)
    for neighbours in density_peaks.KERNEL_NEIGHBOURS
    for mass, balance, cosine in ((0.5, None, False), (0.125, 0.5, True), (0.0, 0.5, False), (0.5, 1.0, True))
]


def as_arguments(rule: PeakRule) -> tuple[int, float, float, bool]:
    """A rule as the kernels take it."""
    return density_peaks._kernel_rule(rule)


def test_constants_are_those_of_the_plain_functions() -> None:
    assert phases.NO_DISTANCE.value == density_peaks.NO_DISTANCE
    assert phases.LONGEST.value == grouping.LONGEST
    assert phases.TINY.value == torch.finfo(torch.float32).tiny


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("count", "parts"), [(24, 1), (24, 4), (23, 4)])
def test_clusters_and_their_averages(rule: PeakRule, count: int, parts: int, device: str) -> None:
    points, weight = torch.randn(2, count, 20), torch.rand(2, count)
    sizes = torch.randint(1, 5, (2, count)).float()
    on_device = [tensor.to(device) for tensor in (points, weight, sizes)]
    group = density_peaks.density_clusters(points, 9, rule, sizes, parts)
    got = clusters.density_clusters(on_device[0], 9, on_device[2], parts, *as_arguments(rule))
    assert torch.equal(got.cpu(), group)

    expected = density_peaks.density_average(points, weight, sizes, 9, rule, parts)
    ordered, coefficients, held = clusters.density_average(*on_device, 9, parts, *as_arguments(rule), False)
    assert torch.equal(ordered.cpu(), expected.group)
    torch.testing.assert_close(coefficients.cpu(), expected.weight)
    assert torch.equal(held.cpu(), group_sum(expected.group, sizes, 9))


@pytest.mark.slow
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_tokens_that_weigh_alike_or_hold_one_patch_each(sized: bool, weighted: bool, cosine: bool, device: str) -> None:
    """To the bit as with ones."""
    points, ones = torch.randn(2, 24, 20, device=device), torch.ones(2, 24, device=device)
    weight, sizes = (torch.rand(2, 24, device=device) if there else None for there in (weighted, sized))
    rule = (9, 2, 3, 0.5, 0.5, cosine, cosine)
    got = clusters.density_average(points, weight, sizes, *rule)
    known = (ones if values is None else values for values in (weight, sizes))
    for found, expected in zip(got, clusters.density_average(points, *known, *rule), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_averages_as_long_as_their_members(parts: int, device: str) -> None:
    """The kernel scales coefficients, the plain function what they sum up to."""
    tokens = Tokens(3 * torch.randn(2, 24, 20), 0)
    sizes, rule = torch.randint(1, 5, (2, 24)).float(), PeakRule(3, 0.125, 0.5, cosine=True)
    points = tokens.image.to(device)
    group, coefficients, _ = clusters.density_average(
        points, sizes.to(device), sizes.to(device), 9, parts, *as_arguments(rule), True
    )
    got = grouping.Grouping(group.cpu(), coefficients.cpu(), 9)
    expected = density_peaks.density_average(tokens.image, sizes, sizes, 9, rule, parts, keep_norm=True)
    assert torch.equal(got.group, expected.group)
    torch.testing.assert_close(apply_decision(tokens, got).features, apply_decision(tokens, expected).features)
    alone = group_sum(got.group, torch.ones_like(sizes), 9).gather(1, got.group) == 1
    assert alone.any()
    assert (got.weight[alone] == 1).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_points_that_coincide(rule: PeakRule, device: str) -> None:
    """Several neighbours at the same distance, 0 among them, count as often as there are."""
    line = torch.tensor([[[0.0], [0.0], [0.0], [3.0], [4.0], [4.0], [9.0], [9.0], [9.0], [9.0]]])
    points = torch.cat((line, 5 - line), 2)
    got = clusters.density_clusters(points.to(device), 4, None, 1, *as_arguments(rule))
    assert torch.equal(got.cpu(), density_peaks.density_clusters(points, 4, rule))


@pytest.mark.slow
@pytest.mark.parametrize("balance", [None, 0.5])
@pytest.mark.parametrize(("count", "parts"), [(70, 1), (140, 1), (140, 2), (390, 3), (391, 4), (391, 3)])
def test_without_sizes_and_from_a_view(count: int, parts: int, balance: float | None, device: str) -> None:
    """One tile of distances or several, in one window or several, equal or not, of one program's tokens or more."""
    points, rule = torch.randn(1, count + 1, 8, device=device)[:, 1:], PeakRule(3, 0.0, balance, balance is not None)
    got = clusters.density_clusters(points, 30, None, parts, *as_arguments(rule))
    assert torch.equal(got.cpu(), density_peaks.density_clusters(points.cpu(), 30, rule, parts=parts))


@pytest.mark.parametrize("cosine", [False, True])
def test_distances_and_on_the_diagonal_lengths(cosine: bool, device: str) -> None:
    points = torch.randn(1, 66, 5, device=device) + 3
    points[0, 7] = 0
    distances = clusters.distances_and_lengths(points, cosine=cosine)
    lengths = points.square().sum(2)
    torch.testing.assert_close(distances.diagonal(dim1=1, dim2=2), lengths)
    compared = torch.nn.functional.normalize(points, dim=2) if cosine else points
    others = ~torch.eye(66, dtype=torch.bool, device=device)
    torch.testing.assert_close(distances[0, others], torch.cdist(compared, compared)[0, others].square(),
                               rtol=1e-3, atol=1e-4)  # fmt: skip


def test_groups_in_order_with_dropped_tokens_and_weights_of_nothing(device: str) -> None:
    group = torch.tensor([[2, 3, 0, 2, 1, 3, 0]])  # 3 is dropped
    weight = torch.tensor([[3.0, 1.0, 0.0, 1.0, 2.0, 1.0, 0.0]])
    sizes = torch.tensor([[1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 4.0]])
    ordered, coefficients, held = clusters.ordered_average(group.to(device), weight.to(device), sizes.to(device), 3)
    assert ordered.tolist() == [[0, 3, 1, 0, 2, 3, 1]] == in_order(group, 3).tolist()
    # Group 0 by weight; group 1 has none, so by size; group 2 alone.
    kept = [0, 2, 3, 4, 6]
    assert coefficients[0, kept].tolist() == pytest.approx([0.75, 0.2, 0.25, 1.0, 0.8])
    assert held.tolist() == [[3.0, 5.0, 1.0]]
    torch.testing.assert_close(coefficients[0, kept].cpu(), group_average(ordered.cpu(), weight, sizes, 3)[0, kept])


def test_features_that_are_no_numbers_stay_inside_their_memory(device: str) -> None:
    points = torch.full((1, 9, 4), torch.nan, device=device)
    ones = torch.ones(1, 9, device=device)
    group, _, held = clusters.density_average(points, ones, ones, 3, 1, 3, 0.5, 0.5, True, True)
    assert held.shape == (1, 3)
    assert int(group.min()) >= 0
    assert int(group.max()) <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [PeakRule(5), PeakRule(3, 0.125, 0.5, cosine=True)], ids=str)
@pytest.mark.parametrize(("count", "parts"), [(196, 1), (196, 2), (138, 2), (97, 1), (1369, 11)])
def test_clusters_of_many_images(count: int, parts: int, rule: PeakRule) -> None:
    """At full load, but for what the order of summation decides: half of a hundred is within an image or two."""
    points = torch.randn(256, count + 1, 384, device="cuda", dtype=torch.bfloat16)[:, 1:]
    expected = density_peaks.density_clusters(points.cpu(), count // 2, rule, parts=parts)
    for _ in range(3):
        got = clusters.density_clusters(points, count // 2, None, parts, *as_arguments(rule)).cpu()
        assert (got == expected).float().mean() > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2])
def test_distances_of_many_images(parts: int) -> None:
    """At full load, where a product that reads what is being overwritten shows."""
    points = torch.randn(256, 197, 384, device="cuda", dtype=torch.bfloat16)[:, 1:]
    expected = density_peaks.squared_distances(points.unflatten(1, (parts, -1)).flatten(0, 1))
    others = ~torch.eye(expected.shape[1], dtype=torch.bool, device="cuda")
    for _ in range(3):
        got = clusters.distances_and_lengths(points, parts).view(expected.shape)
        torch.testing.assert_close(got[:, others], expected[:, others], rtol=1e-4, atol=1e-2)
