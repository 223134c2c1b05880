"""Pictures of tokens, pixel by pixel: mean colours, borders, what is dropped, and the heat map, worked out by hand."""

from __future__ import annotations

import numpy as np

from tokencut.visualization.regions import CORE, EDGE, HATCH, Grid, draw_tokens, enlarge, patches_held

# Two rows of three patches, each of 2 x 2 px.
GRID = Grid(2, 3, 2, 2)
SCALE = 8
ALONE = np.arange(6)


def photo() -> np.ndarray:
    """4 x 6 px in which each patch has one colour: 10, 20, 30, 40, 50, 60 in red, and its upper row 2 in blue."""
    pixels = np.zeros((4, 6, 3), np.uint8)
    for patch in range(6):
        row, column = divmod(patch, 3)
        pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2, 0] = 10 * (patch + 1)
        pixels[2 * row, 2 * column : 2 * column + 2, 2] = 2
    return pixels


def at(picture: np.ndarray, patch: int) -> list[int]:
    """The colour near a patch's middle, away from borders, in the lower half."""
    row, column = divmod(patch, 3)
    return picture[(2 * row + 1) * SCALE + 4, (2 * column + 1) * SCALE + 4].tolist()


def test_a_patch_has_its_number_at_all_its_pixels() -> None:
    assert GRID.spread(ALONE, 4, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


def test_a_rest_that_fills_no_patch_is_not_seen() -> None:
    assert GRID.seen(np.zeros((5, 7, 3), np.uint8)).shape == (4, 6, 3)
    # A model that pads has its last patches filled in part.
    padded = GRID.seen(np.zeros((3, 5, 3), np.uint8))
    assert padded.shape == (3, 5, 3)
    assert GRID.spread(ALONE, 3, 5)[-1].tolist() == [3, 3, 4, 4, 5]


def test_tokens_of_one_patch_stay_as_the_photo_is() -> None:
    assert np.array_equal(draw_tokens(photo(), ALONE, GRID, SCALE), enlarge(photo(), SCALE))
    # Another numbering of the tokens is no other picture.
    assert np.array_equal(draw_tokens(photo(), ALONE[::-1], GRID, SCALE), enlarge(photo(), SCALE))


def test_merged_patches_are_in_their_mean_colour_wherever_they_lie() -> None:
    # Patches 0, 1 and 5 are one token: (10 + 20 + 60) / 3 = 30 in red, half of 2 in blue.
    picture = draw_tokens(photo(), np.array([0, 0, 1, 2, 3, 0]), GRID, SCALE)
    assert [at(picture, patch) for patch in (0, 1, 5)] == [[30, 0, 1]] * 3
    assert [at(picture, patch) for patch in (2, 3, 4)] == [[30, 0, 0], [40, 0, 0], [50, 0, 0]]


def test_borders_are_around_merged_tokens_only() -> None:
    picture = draw_tokens(photo(), np.array([0, 0, 1, 2, 3, 4]), GRID, SCALE)
    # Patches 0 and 1 end at column 32: two light pixels, one dark on either side.
    across = picture[4, 28:36].tolist()
    assert across[3:5] == [CORE.tolist()] * 2
    assert (across[2], across[5]) == (EDGE.tolist(), EDGE.tolist())
    assert across[0] == across[1] == [15, 0, 1]
    # And at row 16 below; between 0 and 1 there is none, nor between 3 and 4, which are single.
    assert picture[15:17, 4].tolist() == [CORE.tolist()] * 2
    assert picture[4, 14:18].tolist() == [[15, 0, 1]] * 4
    assert picture[28, 14:18].tolist() == [[40, 0, 0]] * 2 + [[50, 0, 0]] * 2


def test_two_merged_tokens_have_one_border_between_them() -> None:
    picture = draw_tokens(photo(), np.array([0, 0, 1, 2, 2, 1]), GRID, SCALE)
    assert picture[4, 31:33].tolist() == [CORE.tolist()] * 2
    assert picture[28, 31:33].tolist() == [CORE.tolist()] * 2


def test_dropped_patches_are_dark_and_hatched() -> None:
    bright = np.full((4, 6, 3), 250, np.uint8)
    picture = draw_tokens(bright, np.array([0, -1, 1, -1, 2, 3]), GRID, SCALE)
    dropped = picture[:16, 16:32].reshape(-1, 3)
    assert set(map(tuple, dropped.tolist())) == {tuple(HATCH.astype(int)), (60, 61, 66)}  # 250 * 0.15 + dark * 0.85
    assert (picture[:16, :16] == 250).all()
    # A black photo is not taken for dropped patches.
    assert (draw_tokens(bright * 0, np.array([0, -1, 1, -1, 2, 3]), GRID, SCALE)[:16, 16:32] > 0).all()


def test_heat_lies_over_a_grey_photo_and_under_the_borders() -> None:
    heat = np.zeros((6, 4), np.uint8)
    heat[:, 3] = 50
    heat[4] = (200, 100, 0, 100)
    picture = draw_tokens(np.zeros((4, 6, 3), np.uint8), np.array([0, 0, 1, 2, 3, 4]), GRID, SCALE, heat)
    assert at(picture, 4) == [200, 100, 0]
    assert at(picture, 0) == [20, 20, 20]  # black is shown as grey of 40, half covered by black
    assert picture[4, 31:33].tolist() == [CORE.tolist()] * 2


def test_how_many_patches_each_patchs_token_holds() -> None:
    assert patches_held(np.array([0, 2, 2, -1, 1, 2])).tolist() == [1, 3, 3, 0, 1, 3]
    assert patches_held(np.array([-1, -1])).tolist() == [0, 0]
