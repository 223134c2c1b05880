"""The clustering kernels against the plain PyTorch functions they stand in for."""

from __future__ import annotations

import pytest
import torch

from tokencut.ops import density_peaks
from tokencut.ops.grouping import group_average, group_sum, in_order

pytest.importorskip("triton")

from tokencut.ops.kernels import clusters

# The interpreter computes lanes beyond the last token too, and numpy warns of what is thrown away there.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


@pytest.fixture(params=["whole", "phases"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of launching: all of an image by one program, and one launch a phase."""
    if request.param == "phases":
        monkeypatch.setattr(clusters, "WHOLE", 0)


@pytest.mark.parametrize("neighbours", density_peaks.KERNEL_NEIGHBOURS)
def test_clusters_and_their_averages(neighbours: int, device: str) -> None:
    points = torch.randn(2, 19, 24)
    sizes = torch.randint(1, 5, (2, 19)).float()
    weight = torch.rand(2, 19)
    group = density_peaks.density_clusters(points, 6, neighbours, sizes, 0.5)
    got = clusters.density_clusters(points.to(device), 6, neighbours, sizes.to(device), 0.5, 1)
    assert torch.equal(got.cpu(), group)

    expected = density_peaks.density_average(points, weight, sizes, 6, neighbours, 0.5)
    ordered, coefficients, held = clusters.density_average(
        points.to(device), weight.to(device), sizes.to(device), 6, neighbours, 0.5, 1
    )
    assert torch.equal(ordered.cpu(), expected.group)
    torch.testing.assert_close(coefficients.cpu(), expected.weight)
    assert torch.equal(held.cpu(), group_sum(expected.group, sizes, 6))


@pytest.mark.parametrize("neighbours", density_peaks.KERNEL_NEIGHBOURS)
def test_points_that_coincide(neighbours: int, device: str) -> None:
    """Several neighbours at the same distance, 0 among them, count as often as there are."""
    points = torch.tensor([[[0.0], [0.0], [0.0], [3.0], [4.0], [4.0], [9.0], [9.0], [9.0], [9.0]]])
    got = clusters.density_clusters(points.to(device), 4, neighbours, None, 0.0, 1)
    assert torch.equal(got.cpu(), density_peaks.density_clusters(points, 4, neighbours))


@pytest.mark.parametrize(("count", "parts"), [(70, 1), (140, 1), (140, 2), (390, 3)])
def test_without_sizes_and_from_a_view(count: int, parts: int, device: str) -> None:
    """One tile of distances or several, in one window or several, of one program's tokens or more."""
    points = torch.randn(1, count + 1, 8, device=device)[:, 1:]
    got = clusters.density_clusters(points, 30, 3, None, 0.0, parts)
    assert torch.equal(got.cpu(), density_peaks.density_clusters(points.cpu(), 30, 3, parts=parts))


def test_windows(device: str) -> None:
    points, weight, sizes = torch.randn(2, 24, 8), torch.rand(2, 24), torch.randint(1, 5, (2, 24)).float()
    on_device = [tensor.to(device) for tensor in (points, weight, sizes)]
    expected = density_peaks.density_average(points, weight, sizes, 9, 3, 0.5, 4)
    group, coefficients, held = clusters.density_average(*on_device, 9, 3, 0.5, 4)
    assert torch.equal(group.cpu(), expected.group)
    torch.testing.assert_close(coefficients.cpu(), expected.weight)
    assert torch.equal(held.cpu(), group_sum(expected.group, sizes, 9))
    got = clusters.density_clusters(on_device[0], 9, 3, on_device[2], 0.5, 4)
    assert torch.equal(got.cpu(), density_peaks.density_clusters(points, 9, 3, sizes, 0.5, 4))


def test_distances_are_zero_on_the_diagonal(device: str) -> None:
    points = torch.randn(1, 66, 5, device=device) + 100
    distances = clusters.squared_distances(points)
    assert torch.equal(distances.diagonal(dim1=1, dim2=2), torch.zeros(1, 66, device=device))
    torch.testing.assert_close(distances, torch.cdist(points, points).square(), rtol=1e-2, atol=2e-2)


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
    group, _, held = clusters.density_average(points, ones, ones, 3, 3, 0.5, 1)
    assert held.shape == (1, 3)
    assert int(group.min()) >= 0
    assert int(group.max()) <= 3


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "parts"), [(196, 1), (196, 2), (138, 2), (97, 1)])
def test_clusters_of_many_images(count: int, parts: int) -> None:
    """At full load, but for what the order of summation decides: half of a hundred is within an image or two."""
    points = torch.randn(256, count + 1, 384, device="cuda", dtype=torch.bfloat16)[:, 1:]
    expected = density_peaks.density_clusters(points.cpu(), count // 2, 3, parts=parts)
    for _ in range(3):
        got = clusters.density_clusters(points, count // 2, 3, None, 0.0, parts).cpu()
        assert (got == expected).float().mean() > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2])
def test_distances_of_many_images(parts: int) -> None:
    """At full load, where a product that reads what is being overwritten shows."""
    points = torch.randn(256, 197, 384, device="cuda", dtype=torch.bfloat16)[:, 1:]
    expected = density_peaks.squared_distances(points.unflatten(1, (parts, -1)).flatten(0, 1))
    for _ in range(3):
        torch.testing.assert_close(clusters.squared_distances(points, parts), expected, rtol=1e-4, atol=1e-2)
