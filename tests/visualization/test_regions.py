"""Pictures of tokens, pixel by pixel: mean colours, borders, numbers, what is dropped, and the heat map, by hand."""

from __future__ import annotations

import numpy as np

from tokencut.visualization.regions import (
    CORE,
    EDGE,
    HATCH,
    PART_COLOURS,
    Grid,
    draw_tokens,
    numbered,
    parts_of,
    patches_held,
)

# Two rows of three patches, each of 16 x 16 px.
GRID = Grid(2, 3, 16, 16)
ALONE = np.arange(6)


def photo() -> np.ndarray:
    """32 x 48 px in which each patch has one colour: 10, 20, 30, 40, 50, 60 in red, and its upper half 2 in blue."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    for patch in range(6):
        row, column = divmod(patch, 3)
        pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16, 0] = 10 * (patch + 1)
        pixels[16 * row : 16 * row + 8, 16 * column : 16 * column + 16, 2] = 2
    return pixels


def at(picture: np.ndarray, patch: int) -> list[int]:
    """The colour near a patch's middle, away from borders, in the lower half."""
    row, column = divmod(patch, 3)
    return picture[16 * row + 13, 16 * column + 12].tolist()


def test_a_patch_has_its_number_at_all_its_pixels() -> None:
    small = Grid(2, 3, 2, 2)
    assert small.spread(ALONE, 4, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


def test_a_rest_that_fills_no_patch_is_not_seen() -> None:
    small = Grid(2, 3, 2, 2)
    assert small.seen(np.zeros((5, 7, 3), np.uint8)).shape == (4, 6, 3)
    # A model that pads has its last patches filled in part.
    padded = small.seen(np.zeros((3, 5, 3), np.uint8))
    assert padded.shape == (3, 5, 3)
    assert small.spread(ALONE, 3, 5)[-1].tolist() == [3, 3, 4, 4, 5]


def test_a_grid_keeps_the_shape_of_its_patches_at_another_size() -> None:
    assert Grid(2, 3, 16, 8).scaled(24) == Grid(2, 3, 24, 12)


def test_tokens_of_one_patch_stay_as_the_photo_is() -> None:
    assert np.array_equal(draw_tokens(photo(), ALONE, GRID), photo())
    # Another numbering of the tokens is no other picture.
    assert np.array_equal(draw_tokens(photo(), ALONE[::-1], GRID), photo())


def test_merged_patches_are_in_their_mean_colour_wherever_they_lie() -> None:
    # Patches 0, 1 and 5 are one token: (10 + 20 + 60) / 3 = 30 in red, half of 2 in blue.
    picture = draw_tokens(photo(), np.array([0, 0, 1, 2, 3, 0]), GRID)
    assert [at(picture, patch) for patch in (0, 1, 5)] == [[30, 0, 1]] * 3
    assert [at(picture, patch) for patch in (2, 3, 4)] == [[30, 0, 0], [40, 0, 0], [50, 0, 0]]


def test_borders_are_inside_merged_tokens_only() -> None:
    picture = draw_tokens(photo(), np.array([0, 0, 1, 2, 3, 4]), GRID)
    # Patches 0 and 1 end at column 32: light inside, dark on either side of it.
    assert picture[4, 30:33].tolist() == [EDGE.tolist(), CORE.tolist(), EDGE.tolist()]
    assert picture[4, 28].tolist() == [15, 0, 1]
    # And at row 16 below; between 0 and 1 there is none, nor between 3 and 4, which are single.
    assert picture[14:17, 4].tolist() == [EDGE.tolist(), CORE.tolist(), EDGE.tolist()]
    assert picture[4, 14:18].tolist() == [[15, 0, 1]] * 4
    assert picture[28, 14:18].tolist() == [[40, 0, 0]] * 2 + [[50, 0, 0]] * 2


def test_two_merged_tokens_have_a_border_each() -> None:
    picture = draw_tokens(photo(), np.array([0, 0, 1, 2, 1, 1]), GRID)
    assert picture[4, 30:34].tolist() == [EDGE.tolist(), CORE.tolist(), CORE.tolist(), EDGE.tolist()]


def test_borders_are_as_wide_as_patches_allow() -> None:
    large = Grid(1, 2, 60, 60)  # a px for each 20
    picture = draw_tokens(np.zeros((60, 120, 3), np.uint8), np.array([0, -1]), large)
    assert not (picture == CORE).all(2).any()
    picture = draw_tokens(np.zeros((120, 120, 3), np.uint8), np.array([0, 1, 0, 2]), Grid(2, 2, 60, 60))
    assert (picture[30] == CORE).all(1).nonzero()[0].tolist() == [57, 58, 59]


def test_parts_are_patches_that_touch_by_a_side() -> None:
    grid = Grid(3, 3, 16, 16)
    # A snake of token 0, and token 1 in two places that touch by a corner only.
    snake = np.array([0, 0, 0, 1, 2, 0, 3, 1, 0])
    assert parts_of(snake, grid).tolist() == [0, 0, 0, 3, 4, 0, 6, 7, 0]
    assert numbered(snake, parts_of(snake, grid)).tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0]
    # Inwards from the first patch, and back upwards: several rounds.
    spiral = np.array([0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    assert parts_of(spiral, Grid(4, 4, 16, 16)).tolist() == [0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]


def test_the_largest_token_in_parts_is_number_one() -> None:
    source = np.array([2, 1, 2, 1, 0, 2])  # 2 lies in 0 and, together, 2 and 5; 1 in 1 and 3; 0 in one place
    assert numbered(source, parts_of(source, GRID)).tolist() == [1, 2, 1, 2, 0, 1]
    # What was dropped is no token, wherever it lies.
    gone = np.array([-1, 0, -1, 1, 2, 3])
    assert not numbered(gone, parts_of(gone, GRID)).any()


def test_parts_of_one_token_have_one_number_and_one_colour() -> None:
    large, grey = GRID.scaled(32), np.full((64, 96, 3), 90, np.uint8)
    apart, together = (draw_tokens(grey, np.array(one), large) for one in ([0, 1, 0, 2, 3, 4], [0, 0, 1, 2, 3, 4]))
    coloured = (apart == PART_COLOURS[0]).all(2)
    assert not coloured[:, 32:64].any()
    assert not coloured[32:].any()
    # Inside the borders the same digit in both.
    one, other = coloured[4:28, 4:28], coloured[4:28, 68:92]
    assert one.any()
    assert np.array_equal(one, other)
    assert coloured[4, 30]
    assert not (together == PART_COLOURS[0]).all(2).any()


def test_small_patches_have_no_room_for_numbers() -> None:
    small = Grid(2, 3, 15, 15)
    coloured = draw_tokens(np.full((30, 45, 3), 90, np.uint8), np.array([0, 1, 0, 2, 3, 4]), small) == PART_COLOURS[0]
    assert coloured.all(2)[:15, :15].any()
    assert not coloured.all(2)[3:12, 3:12].any()


def test_dropped_patches_are_dark_and_hatched() -> None:
    bright = np.full((32, 48, 3), 250, np.uint8)
    picture = draw_tokens(bright, np.array([0, -1, 1, -1, 2, 3]), GRID)
    dropped = picture[:16, 16:32].reshape(-1, 3)
    assert set(map(tuple, dropped.tolist())) == {tuple(HATCH.astype(int)), (60, 61, 66)}  # 250 * 0.15 + dark * 0.85
    assert (picture[:16, :16] == 250).all()
    # A black photo is not taken for dropped patches.
    assert (draw_tokens(bright * 0, np.array([0, -1, 1, -1, 2, 3]), GRID)[:16, 16:32] > 0).all()


def test_heat_lies_over_a_grey_photo_and_under_white_borders() -> None:
    heat = np.zeros((6, 4), np.uint8)
    heat[:, 3] = 50
    heat[4] = (200, 100, 0, 100)
    picture = draw_tokens(np.zeros((32, 48, 3), np.uint8), np.array([0, 0, 1, 2, 3, 1]), GRID, heat)
    assert at(picture, 4) == [200, 100, 0]
    assert at(picture, 0) == [20, 20, 20]  # black is shown as grey of 40, half covered by black
    assert picture[4, 31].tolist() == CORE.tolist()
    apart = draw_tokens(np.zeros((32, 48, 3), np.uint8), np.array([0, 1, 0, 2, 3, 4]), GRID, heat)
    assert apart[4, 15].tolist() == CORE.tolist()  # colour is for the heat alone


def test_how_many_patches_each_patchs_token_holds() -> None:
    assert patches_held(np.array([0, 2, 2, -1, 1, 2])).tolist() == [1, 3, 3, 0, 1, 3]
    assert patches_held(np.array([-1, -1])).tolist() == [0, 0]
