"""Grids cut into windows, and clusters that keep a grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.ops.grid_clusters import ClusterRule, Windows, grid_clusters, grid_pool

RULE = ClusterRule(rounds=5, reach=2, sharpness=4.0, nearest=10)
GRIDS = [Windows(8, 8, 4, 4), Windows(6, 9, 4, 4), Windows(5, 7, 3, 5), Windows(7, 7, 7, 7), Windows(3, 3, 7, 7)]


def tokens(windows: Windows, batch: int = 2, width: int = 6) -> Tensor:
    return torch.randn(batch, windows.count, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("windows", GRIDS, ids=str)
def test_windows_are_cut_in_raster_order_and_joined_again(windows: Windows) -> None:
    numbers = torch.arange(1.0, windows.count + 1).view(1, -1, 1)
    cut = windows.cut(numbers)[0, ..., 0].view(windows.down, windows.across, windows.height, windows.width)
    for row in range(windows.rows):
        for column in range(windows.columns):
            window = cut[row // windows.height, column // windows.width]
            assert window[row % windows.height, column % windows.width] == row * windows.columns + column + 1
    assert int((cut == 0).sum()) == windows.number * windows.places - windows.count  # padding
    assert torch.equal(windows.joined(windows.cut(numbers)), numbers)


def test_smaller_windows_leave_no_cell_of_padding_alone() -> None:
    # 6 x 9 in windows of 4 x 4: 4 + 2 rows, 4 + 4 + 1 columns. Of 3 cells for 4, 2 rows touch 2 and 1 column 1.
    assert Windows(6, 9, 4, 4).shrunk(3, 3) == Windows(5, 7, 3, 3)
    assert [each.count for each in Windows(6, 9, 4, 4).smaller()] == [2 * 3, 3 * 5, 5 * 7]
    assert [(each.height, each.width) for each in Windows(9, 15, 3, 5).smaller()] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert [each.height for each in Windows(14, 14, 14, 14, multiple=2).smaller()] == [2, 4, 6, 8, 10, 12]
    assert Windows(1, 1, 1, 1).smaller() == ()
    with pytest.raises(ValueError, match="no smaller windows leave 10 tokens"):
        Windows(8, 8, 4, 4).with_count(10)


def test_pooling_is_torchs_where_nothing_is_padded() -> None:
    windows = Windows(7, 7, 7, 7)
    x = tokens(windows)
    pooled = grid_pool(x, windows, windows.shrunk(5, 5), nearest=9, change=False)
    image = x.transpose(1, 2).unflatten(2, (7, 7))
    expected = F.adaptive_avg_pool2d(image, 5)
    torch.testing.assert_close(pooled.merged(x), expected.flatten(2).transpose(1, 2))
    spread = F.interpolate(expected, (7, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(pooled.given_back(pooled.merged(x)), spread.flatten(2).transpose(1, 2))
    own = grid_pool(x, windows, windows.shrunk(5, 5), nearest=1, change=False).spread
    # The middle of place i lies in cell floor((i + 0.5) * 5 / 7).
    assert [int(row.argmax()) for row in own[0, 0, :7]] == [0, 1, 1, 2, 3, 3, 4]


def test_strides_take_one_token_of_each_cell() -> None:
    windows = Windows(7, 7, 7, 7)
    x = tokens(windows)
    strided = grid_pool(x, windows, windows.shrunk(3, 3), nearest=1, change=False, strided=True)
    # The middles of three cells of 7 / 3 lie in places 1, 3 and 5.
    assert torch.equal(strided.merged(x), x.unflatten(1, (7, 7))[:, 1:6:2, 1:6:2].flatten(1, 2))
    # 4 + 1 tokens in windows of 4 x 4, two cells each: what is left of the last window stands for itself.
    padded = Windows(1, 5, 1, 4)
    x = tokens(padded)
    assert torch.equal(grid_pool(x, padded, padded.shrunk(1, 2), 1, False, strided=True).merged(x), x[:, [1, 3, 4]])


@pytest.mark.parametrize("way", ["soft", "pool", "stride"])
@pytest.mark.parametrize("windows", GRIDS, ids=str)
def test_shares_add_up_and_padding_has_none(windows: Windows, way: str) -> None:
    x = tokens(windows)
    for smaller in windows.smaller():
        if way == "soft":
            found = grid_clusters(x, windows, smaller, RULE, True)
        else:
            found = grid_pool(x, windows, smaller, 10, True, strided=way == "stride")
        ones = torch.ones(2, windows.count, 1)
        torch.testing.assert_close(found.merged(ones), torch.ones(2, smaller.count, 1))
        torch.testing.assert_close(found.given_back(found.merged(ones)), ones)
        assert found.merged(x).shape == (2, smaller.count, 6)
        assert ((found.source() >= 0) & (found.source() < smaller.count)).all()


def test_clusters_follow_the_features_where_pooling_follows_the_place() -> None:
    """A window of two plain halves, with an edge that no cell's border meets."""
    windows = Windows(6, 6, 6, 6)
    x = torch.zeros(1, 36, 4)
    x.view(6, 6, 4)[:, 2:] = 1.0
    x = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    for found in (
        grid_clusters(x, windows, windows.shrunk(4, 4), RULE, False),
        grid_pool(x, windows, windows.shrunk(4, 4), 1, False),
    ):
        errors.append(float((found.given_back(found.merged(x)) - x).abs().max()))
    assert errors[0] < 0.05 < 0.3 < errors[1]


def test_what_has_changed_comes_on_top() -> None:
    windows = Windows(4, 4, 4, 4)
    x = tokens(windows)
    found = grid_clusters(x, windows, windows.shrunk(2, 2), RULE, True)
    # What all clusters change by alike, all tokens do.
    change = found.given_back(torch.ones(2, 4, 6))
    torch.testing.assert_close(change, torch.ones(2, 16, 6))


def test_tokens_that_are_all_alike_are_shared_out() -> None:
    windows = Windows(6, 9, 4, 4)
    for value in (0.0, 3.0, 1e4):
        x = torch.full((1, 54, 5), value)
        found = grid_clusters(x, windows, windows.shrunk(3, 3), RULE, False)
        torch.testing.assert_close(found.given_back(found.merged(x)), x)


def test_an_image_is_measured_by_itself() -> None:
    windows = Windows(8, 8, 4, 4)
    x = torch.cat((tokens(windows, 1), 5 * tokens(windows, 1)))
    found = grid_clusters(x, windows, windows.shrunk(3, 3), RULE, False)
    torch.testing.assert_close(found.spread[0], found.spread[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.average[0], found.average[1], rtol=1e-4, atol=1e-4)
