"""The kernel of k-medoids against the plain function it stands in for."""

from __future__ import annotations

import pytest
import torch

from tokencut.ops import medoids as plain

pytest.importorskip("triton")

from tokencut.ops.kernels import medoids

# The interpreter computes lanes beyond the last token too.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize(("count", "clusters"), [(24, 9), (70, 30), (5, 1)])
def test_clusters(count: int, clusters: int, iterations: int, device: str) -> None:
    points, weight = torch.randn(2, count + 1, 20)[:, 1:], torch.randint(1, 5, (2, count)).float()
    got = medoids.medoid_clusters(points.to(device), weight.to(device), clusters, iterations)
    assert torch.equal(got.cpu(), plain.medoid_clusters(points, weight, clusters, iterations))


def test_ties_go_to_the_earlier_point(device: str) -> None:
    line = torch.tensor([[[0.0], [0.0], [3.0], [3.0], [4.0], [9.0], [9.0], [9.0]]])
    points, weight = torch.cat((line, 5 - line), 2), torch.ones(1, 8)
    for clusters in (2, 3):
        got = medoids.medoid_clusters(points.to(device), weight.to(device), clusters, 2)
        assert torch.equal(got.cpu(), plain.medoid_clusters(points, weight, clusters, 2))


def test_features_that_are_no_numbers_stay_inside_their_memory(device: str) -> None:
    points = torch.full((1, 9, 4), torch.nan, device=device)
    group = medoids.medoid_clusters(points, torch.ones(1, 9, device=device), 3, 2)
    assert int(group.min()) >= 0
    assert int(group.max()) < 3


@pytest.mark.gpu
def test_clusters_of_many_images() -> None:
    """At full load, but for what the order of summation decides."""
    points = torch.randn(256, 197, 384, device="cuda", dtype=torch.bfloat16)[:, 1:]
    weight = torch.ones(256, 196, device="cuda")
    expected = plain.medoid_clusters(points.cpu(), weight.cpu(), 98, 3)
    for _ in range(3):
        assert (medoids.medoid_clusters(points, weight, 98, 3).cpu() == expected).float().mean() > 0.98
