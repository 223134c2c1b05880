"""Groups of tokens around one of each cell of a grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokencut.ops.grid_groups import grid_groups, grid_groups_macs, spacing
from tokencut.ops.grouping import GridGroups
from tokencut.profiling.counting import count_macs
from tokencut.tokens import group_means

# Rows, columns and groups: whole cells; cells that don't fit; four tiles, of unequal size; fewer groups than tiles.
GRIDS = [(4, 6, 10), (7, 5, 9), (14, 14, 36), (17, 20, 90), (20, 33, 3), (3, 3, 1)]
EVERY_GRID = pytest.mark.parametrize(("rows", "columns", "count"), GRIDS)


def tokens(rows: int, columns: int) -> Tensor:
    return torch.randn(3, rows * columns, 8, generator=torch.Generator().manual_seed(0))


def staying(rows: int, columns: int, count: int, turn: int) -> set[int]:
    """Those that stay whatever they are like: where all are alike, and so none is left to stay for itself but these."""
    alike = torch.ones(1, rows * columns, 4)
    fewest = next(few for few in range(1, count + 1) if spacing(rows, columns, few) == spacing(rows, columns, count))
    return set(grid_groups(alike, rows, columns, fewest, turn).stays[0].tolist())


@EVERY_GRID
def test_each_group_is_around_a_token_that_stays(rows: int, columns: int, count: int) -> None:
    x = tokens(rows, columns)
    for turn in (0, 1, 7):
        groups = grid_groups(x, rows, columns, count, turn)
        assert groups.stays.shape == (3, count) and groups.count == count
        assert (groups.stays.diff(dim=1) > 0).all()
        own = groups.group.gather(1, groups.stays)
        assert torch.equal(own, torch.arange(count).expand(3, -1))
        # What they average, and give back.
        assert torch.equal(groups.taken(x), x.gather(1, groups.stays.unsqueeze(2).expand(-1, -1, 8)))
        means = groups.given_back(group_means(x, groups))
        for image in range(3):
            for group in range(count):
                members = groups.group[image] == group
                expected = x[image, members].mean(0).expand(int(members.sum()), -1)
                torch.testing.assert_close(means[image, members], expected)


def test_the_most_similar_go_and_into_the_most_similar() -> None:
    rows, columns, count, x = 4, 6, 14, tokens(4, 6)
    cosine = torch.cosine_similarity(x.unsqueeze(2), x.unsqueeze(1), dim=3)
    groups = grid_groups(x, rows, columns, count, 0)
    for image in range(3):
        stay = [row * columns + column for row in (0, 2) for column in (0, 2, 4)]  # the first of each 2 x 2
        others = [place for place in range(24) if place not in stay]
        nearest = {place: max(stay, key=lambda each: float(cosine[image, place, each])) for place in others}
        by_likeness = sorted(others, key=lambda place: -float(cosine[image, place, nearest[place]]))
        gone = by_likeness[: 24 - count]
        assert set(groups.stays[image].tolist()) == set(range(24)) - set(gone)
        joined = groups.stays[image][groups.group[image]]
        assert [int(joined[place]) for place in gone] == [nearest[place] for place in gone]


def test_another_token_of_each_cell_stays_in_each_turn() -> None:
    first, *others = (staying(4, 6, 10, turn) for turn in range(5))
    assert first == {0, 2, 4, 12, 14, 16}
    assert set().union(first, *others[:3]) == set(range(24)) and others[3] == first
    assert set().union(*(staying(6, 6, 6, turn) for turn in range(9))) == set(range(36))


@EVERY_GRID
def test_equal_tokens_lose_nothing_and_no_scale_matters(rows: int, columns: int, count: int) -> None:
    x = tokens(rows, columns)
    flat = x[:, :1].expand(-1, rows * columns, -1)
    groups = grid_groups(flat, rows, columns, count, 1)
    torch.testing.assert_close(groups.given_back(group_means(flat, groups)), flat, rtol=1e-4, atol=1e-4)
    groups = grid_groups(x, rows, columns, count, 1)
    for other in (1024 * x, x / 1024):
        assert torch.equal(grid_groups(other, rows, columns, count, 1).group, groups.group)
    assert torch.equal(grid_groups(x[1:2], rows, columns, count, 1).group, groups.group[1:2])


@EVERY_GRID
def test_what_it_costs_is_what_fvcore_counts(rows: int, columns: int, count: int) -> None:
    class Grouped(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            groups: GridGroups = grid_groups(images.flatten(2).transpose(1, 2), rows, columns, count, 2)
            return groups.given_back(group_means(images.flatten(2).transpose(1, 2), groups))

    assert count_macs(Grouped(), (3, rows, columns)).total == grid_groups_macs(rows, columns, count, 3)


def test_work_grows_with_the_grid_and_not_with_its_square() -> None:
    assert grid_groups_macs(64, 64, 1024, 8) == 16 * grid_groups_macs(16, 16, 64, 8)
