"""Density peaks on points whose densities and separations are worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tokencut.ops.density_peaks import (
    NO_DISTANCE,
    PeakRule,
    density_average,
    density_clusters,
    nearest_centre,
    peak_scores,
    squared_distances,
    window_pairs,
    windows,
)

# Two heaps on a line, {0, 1, 2} and {10, 11}: squared distances are small whole numbers, exact in fp32.
LINE = torch.tensor([[[0.0], [1.0], [2.0], [10.0], [11.0]]])


def scores_of(points: torch.Tensor, rule: PeakRule, width: int = 1) -> torch.Tensor:
    """Scores, the densest point's as infinite and those of points that come last as infinitely low."""
    return as_published(peak_scores(squared_distances(points, rule.cosine), points.square().sum(2), width, rule))


def as_published(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    scores, before = found
    return torch.where(before == 0, scores, before * math.inf)


def test_squared_distances_by_hand() -> None:
    points = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]]])
    assert squared_distances(points).tolist() == [[[0, 25, 9], [25, 0, 16], [9, 16, 0]]]


def test_squared_distances_are_never_negative_and_zero_to_itself() -> None:
    points = 1000.0 + torch.rand(2, 20, 8, generator=torch.Generator().manual_seed(0))
    distances = squared_distances(points)
    assert (distances >= 0).all()
    assert (distances.diagonal(dim1=1, dim2=2) == 0).all()


def test_scores_by_hand() -> None:
    # Two nearest count, the point itself among them: mean squared distance is 1/2 for every point, so all are equally
    # dense and the lower number is the denser one. Separation: 0 is densest, so the largest squared distance, 121; then
    # 1 from 0, 1 from 1, 64 from 2, 1 from 3.
    scores = scores_of(LINE, PeakRule(2))
    expected = [-0.5 + 0.5 * math.log(square) for square in (math.inf, 1, 1, 64, 1)]
    assert scores[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_density_counts_the_nearest_and_divides_by_the_width() -> None:
    # Three nearest: mean squared distances are 5/3, 2/3, 5/3, (0+1+64)/3, (0+1+81)/3; the point 1 is densest.
    scores = scores_of(LINE, PeakRule(3))
    means = (5 / 3, 2 / 3, 5 / 3, 65 / 3, 82 / 3)
    separations = (1, math.inf, 1, 64, 1)
    expected = [-mean + 0.5 * math.log(square) for mean, square in zip(means, separations, strict=True)]
    assert scores[0].tolist() == pytest.approx(expected, abs=1e-5)
    wide = scores_of(LINE, PeakRule(3), width=10)
    expected = [-mean / 10 + 0.5 * math.log(square) for mean, square in zip(means, separations, strict=True)]
    assert wide[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_scale_free_score_is_a_ratio_of_distances() -> None:
    # The same separations; the density is the rms distance to the nearest three to the power of -1/2.
    means, separations = (5 / 3, 2 / 3, 5 / 3, 65 / 3, 82 / 3), (1, math.inf, 1, 64, 1)
    scores = scores_of(LINE, PeakRule(3, balance=0.5))
    expected = [math.log(math.sqrt(square) / mean**0.25) for mean, square in zip(means, separations, strict=True)]
    assert scores[0].tolist() == pytest.approx(expected, abs=1e-5)
    larger = scores_of(1000 * LINE, PeakRule(3, balance=0.5))[0] - 0.5 * math.log(1000)
    assert larger.tolist() == pytest.approx(expected, abs=1e-5)


def test_by_cosine_lengths_do_not_count() -> None:
    points = torch.tensor([[[3.0, 0.0], [0.0, 0.5], [4.0, 4.0], [0.0, 0.0]]])
    # Directions are right angles or halves of them apart; a point of no length is at distance 1 of all others.
    half = 2 - math.sqrt(2)
    expected = [[0, 2, half, 1], [2, 0, half, 1], [half, half, 0, 1], [1, 1, 1, 0]]
    torch.testing.assert_close(squared_distances(points, cosine=True), torch.tensor([expected]), rtol=0, atol=1e-6)


def test_copies_are_equally_dense_however_products_are_rounded() -> None:
    # Distances below NO_DISTANCE of the squared length, here 1, are rounding.
    distances = torch.tensor([[[0.0, 1e-7, 4.0], [1e-7, 0.0, 4.0], [4.0, 4.0, 0.0]]])
    scores = as_published(peak_scores(distances, torch.ones(1, 3), 1, PeakRule(2, balance=0.5)))
    density = -0.25 * math.log(NO_DISTANCE)
    assert scores[0].tolist() == [math.inf, pytest.approx(density + 0.5 * math.log(1e-7)), pytest.approx(
        -0.25 * math.log(2) + 0.5 * math.log(4))]  # fmt: skip


def test_averages_that_keep_their_length_are_marked() -> None:
    ones = torch.ones(1, 5)
    assert density_average(LINE, ones, ones, 2, PeakRule(2), keep_norm=True).keep_norm
    assert not density_average(LINE, ones, ones, 2, PeakRule(2)).keep_norm


def test_a_point_on_a_denser_one_comes_last_and_no_number_goes_beyond_the_data() -> None:
    points = torch.tensor([[[0.0], [0.0], [1.0], [10.0]]])
    scores, before = peak_scores(squared_distances(points), points.square().sum(2), 1, PeakRule(2))
    assert before.tolist() == [[1, -1, 0, 0]]
    assert scores.abs().max() < 100
    assert scores_of(points, PeakRule(2))[0, 1] == -math.inf


@pytest.mark.parametrize("neighbours", [2, 3, 4])
def test_the_nearest_by_minima_are_the_nearest_by_sorting(neighbours: int) -> None:
    # Whole numbers, with many equal distances.
    points = torch.randint(0, 4, (3, 20, 2), generator=torch.Generator().manual_seed(neighbours)).float()
    distances = squared_distances(points)
    scores, before = peak_scores(distances, points.square().sum(2), 1, PeakRule(neighbours))
    density = -distances.sort(2).values[:, :, :neighbours].sum(2) / neighbours
    for image in range(3):
        for i in (before[image] == 0).nonzero()[:, 0]:
            ahead = (density[image] > density[image, i]) | (
                (density[image] == density[image, i]) & (torch.arange(20) < i)
            )
            expected = density[image, i] + 0.5 * distances[image, i][ahead].min().log()
            torch.testing.assert_close(scores[image, i], expected)


def test_more_neighbours_than_points_counts_all() -> None:
    assert torch.equal(scores_of(LINE, PeakRule(5)), scores_of(LINE, PeakRule(50)))


def test_clusters_by_hand() -> None:
    assert density_clusters(LINE, clusters=2, rule=PeakRule(2)).tolist() == [[0, 0, 0, 1, 1]]
    assert density_clusters(LINE, clusters=1, rule=PeakRule(2)).tolist() == [[0] * 5]
    assert density_clusters(LINE, clusters=5, rule=PeakRule(2)).tolist() == [[0, 1, 2, 3, 4]]


def test_clusters_are_numbered_by_their_centres_order() -> None:
    assert density_clusters(LINE.flip(1), clusters=2, rule=PeakRule(2)).tolist() == [[0, 0, 1, 1, 1]]


def test_tokens_of_large_norm_keep_their_densities_apart() -> None:
    # exp(-squared distance) underflows to 0 for all of these, and centres would fall by number: 0 and 1.
    assert density_clusters(LINE * 1000, clusters=2, rule=PeakRule(2)).tolist() == [[0, 0, 0, 1, 1]]


def test_equal_points_give_the_lowest_numbers_as_centres() -> None:
    same = torch.ones(1, 6, 4)
    assert density_clusters(same, clusters=3, rule=PeakRule(5)).tolist() == [[0, 1, 2, 0, 0, 0]]


def test_a_centre_joins_itself_and_equal_distances_go_to_the_earlier_centre() -> None:
    # Point 1 is as near to centre 0 as to centre 2; centre 3 lies on centre 2 and still has a cluster of its own.
    points = torch.tensor([[[0.0], [1.0], [2.0], [2.0]]])
    centres = torch.tensor([[0, 2, 3]])
    assert nearest_centre(squared_distances(points), centres).tolist() == [[0, 0, 1, 2]]


@pytest.mark.parametrize(
    ("count", "clusters", "window", "parts"),
    [
        (196, 98, 1024, 1),
        (1024, 512, 1024, 1),
        (4096, 2048, 1024, 4),
        (2868, 1434, 1024, 3),
        (1026, 500, 1024, 2),
        (1031, 500, 1024, 1),  # a prime
        (1366, 683, 512, 2),  # twice a prime: two larger ones
        (2062, 1031, 512, 5),  # likewise, but they would be more than twice as large: the last is smaller
        (1369, 684, 128, 11),  # the patches of 518 px
        (1369, 68, 128, 2),  # likewise, with few clusters
        (196, 64, 98, 2),
        (196, 63, 98, 1),  # too few clusters for each
        (4096, 740, 128, 16),  # room for 23 windows, which do not divide
    ],
)
def test_windows_are_about_equal_and_leave_clusters_to_each(count: int, clusters: int, window: int, parts: int) -> None:
    assert windows(count, clusters, window) == parts


def test_tokens_are_clustered_within_their_window() -> None:
    # Two windows. In the first 0 and 1, and 10 and 10.5 are near; in the second 0 and 0.1, and 50: the 0s of both
    # windows would be one cluster without windows.
    points = torch.tensor([[[0.0], [1.0], [10.0], [10.5], [0.0], [0.1], [50.0], [50.2]]])
    assert density_clusters(points, 4, PeakRule(2), parts=2).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    assert density_clusters(points, 3, PeakRule(2)).tolist() == [[0, 0, 1, 1, 0, 0, 2, 2]]


def test_the_last_window_may_be_smaller_than_the_others() -> None:
    points, rule = torch.randn(2, 13, 4, generator=torch.Generator().manual_seed(0)), PeakRule(3, 0.5, 0.5)
    sizes = torch.randint(1, 5, (2, 13), generator=torch.Generator().manual_seed(1)).float()
    found = density_clusters(points, 3, rule, sizes, parts=3)
    # With one centre a window, each window is a cluster: 5, 5 and 3 tokens.
    assert found.tolist() == [[0] * 5 + [1] * 5 + [2] * 3] * 2
    found = density_clusters(points, 13, rule, sizes, parts=3)
    assert found.tolist() == [list(range(13))] * 2
    assert window_pairs(13, 3) == 25 + 25 + 9
    assert window_pairs(12, 3) == 3 * 16


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_an_image_with_features_that_are_no_numbers_leaves_the_others_alone(odd: float, parts: int) -> None:
    points = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    sound = density_clusters(points, 6, PeakRule(3), parts=parts)
    points[0, 3, 1] = odd
    found = density_clusters(points, 6, PeakRule(3), parts=parts)
    assert torch.equal(found[1], sound[1])
    assert found[0].unique().tolist() == list(range(6))


def test_each_window_has_a_centre_and_the_rest_go_where_tokens_are_far_apart() -> None:
    # The first window's points lie close together; the second's far apart: it gets all centres but one.
    near, far = torch.linspace(0, 0.1, 6), torch.tensor([0.0, 1.0, 2.2, 3.5, 5.0, 7.0])
    points = torch.cat((near, far)).view(1, 12, 1)
    assert density_clusters(points, 4, PeakRule(2), parts=2)[0, :6].tolist() == [0] * 6
    assert set(density_clusters(points, 4, PeakRule(2), parts=2)[0, 6:].tolist()) == {1, 2, 3}
