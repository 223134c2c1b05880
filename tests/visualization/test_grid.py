"""Where panels stand: in no two places at once, in line, and within the picture."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from tokencut.errors import UsageError
from tokencut.visualization import grid
from tokencut.visualization.grid import Canvas, Layout, Panel, Strip, fit


def boxes(layout: Layout) -> list[tuple[int, int, int, int]]:
    """Top, left, bottom and right of every panel with its caption, and of every title."""
    groups = range(layout.groups)
    places = [
        (*layout.panel_at(group, strip, panel), layout.height + layout.line, layout.width)
        for group in groups
        for strip in range(layout.strips)
        for panel in range(1 + layout.stages)
    ]
    titles = [layout.strip_at(group, strip) for group in groups for strip in range(layout.strips)]
    titles += [layout.group_at(group) for group in groups if layout.titled]
    places += [(top, left, layout.line, layout.group_width) for top, left in titles]
    return [(top, left, top + height, left + width) for top, left, height, width in places]


@pytest.mark.parametrize("across", [1, 2])
@pytest.mark.parametrize(("strips", "stages"), [(1, 3), (3, 3), (2, 12), (1, 0)])
@pytest.mark.parametrize(("height", "width"), [(400, 400), (448, 128)])
def test_panels_and_titles_lie_apart_and_inside(strips: int, stages: int, height: int, width: int, across: int) -> None:
    layout = Layout(3, strips, stages, height, width, across)
    lines, length = layout.size
    found = boxes(layout)
    assert len(found) == 3 * (strips * (2 + stages) + (strips > 1))
    for top, left, bottom, right in found:
        assert 0 < top < bottom <= lines
        assert 0 < left < right < length
    for one, other in combinations(found, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] < other[1] or other[3] < one[1]


def test_a_strip_is_a_title_and_a_line_of_panels() -> None:
    layout = Layout(2, 1, 3, 448, 448)
    text, gap, line = 26, 16, 47
    assert (layout.text, layout.gap, layout.line) == (text, gap, line)
    assert layout.size == (2 * (line + 448 + line) + 4 * gap, 4 * 448 + 5 * gap)
    assert layout.panel_at(0, 0, 0) == (gap + line, gap)
    assert layout.panel_at(1, 0, 1) == (gap + (2 * line + 448 + 2 * gap) + line, gap + 448 + gap)


def test_groups_stand_side_by_side_with_their_strips_below_each_other() -> None:
    layout = Layout(4, 3, 2, 448, 448, across=2)
    assert layout.panel_at(1, 2, 0)[0] == layout.panel_at(0, 2, 0)[0]
    assert layout.panel_at(1, 2, 0)[1] == layout.panel_at(0, 2, 0)[1] + layout.group_width + 2 * layout.gap
    assert layout.panel_at(2, 0, 0)[0] > layout.panel_at(0, 2, 0)[0]
    assert layout.panel_at(0, 1, 1)[1] == layout.panel_at(0, 0, 1)[1]


def test_twelve_stages_and_the_image_take_two_lines_of_seven() -> None:
    layout = Layout(1, 1, 12, 400, 400)
    assert (layout.lines, layout.columns) == (2, 7)
    top, left = layout.panel_at(0, 0, 0)
    assert layout.panel_at(0, 0, 7) == (top + 400 + layout.line, left)


def test_letters_grow_with_panels_within_bounds() -> None:
    assert [Layout(1, 1, 3, side, side).text for side in (100, 448, 672, 2000)] == [18, 26, 39, 44]


def test_panels_titles_and_captions_are_put_in_place() -> None:
    layout = Layout(1, 2, 1, 8, 8)
    canvas = Canvas(layout)
    canvas.add_group(0, "photo.jpg")
    for row in (0, 1):
        photo, stage = (Panel(np.full((8, 8, 3), shade, np.uint8), f"{shade}") for shade in (3 + row, 5 + row))
        canvas.add(0, row, Strip(photo, {0: stage}, f"m{row}"))
    for panel, shade in ((0, 3), (1, 5)):
        for row in (0, 1):
            top, left = layout.panel_at(0, row, panel)
            assert (canvas.pixels[top : top + 8, left : left + 8] == shade + row).all()
            assert (canvas.pixels[top - 1, left : left + 8] == grid.FRAME).all()
    assert (canvas.pixels < 10).sum() == 4 * 8 * 8 * 3
    assert [(label.text, label.left) for label in canvas.labels] == [
        ("photo.jpg", True), ("m0", True), ("3", False), ("5", False), ("m1", True), ("4", False), ("6", False),
    ]  # fmt: skip
    assert all(label.room == layout.group_width for label in canvas.labels if label.left)


def test_a_legend_takes_as_many_lines_as_its_texts_need() -> None:
    layout = Layout(1, 1, 3, 8, 8)
    sample = np.full((30, 30, 3), 7, np.uint8)
    short, long = (Canvas(layout, [Panel(sample, text)] * 3) for text in ("dark", "a long explanation " * 3))
    assert short.pixels.shape[0] < long.pixels.shape[0]
    assert [(canvas.pixels == 7).sum() for canvas in (short, long)] == [3 * sample.size] * 2
    for canvas in (short, long):
        assert [label.text for label in canvas.labels] == [canvas.legend[0].caption] * 3
        for label in canvas.labels:
            assert layout.size[0] <= label.y <= canvas.pixels.shape[0]
            assert label.x + label.room <= canvas.pixels.shape[1]


def layouts(groups: int, strips: int = 1, stages: int = 3, sides: tuple[int, ...] = (448, 320, 160)) -> Layout:
    """What fits so many rows of square panels."""
    return fit(
        [(side, side) for side in sides], groups,
        lambda tall, wide, across: Layout(groups, strips, stages, tall, wide, across),
    )  # fmt: skip


def test_a_few_rows_stand_below_each_other_at_full_size() -> None:
    assert [(one.height, one.across) for one in (layouts(1), layouts(4))] == [(448, 1), (448, 1)]


def test_many_rows_stand_side_by_side_so_that_no_picture_is_a_tower() -> None:
    for groups, strips in ((8, 1), (3, 8), (24, 1), (7, 3)):
        layout = layouts(groups, strips)
        assert layout.across > 1
        assert layout.size[0] <= grid.TALLEST
        assert layout.size[1] <= grid.WIDEST


def test_very_many_images_make_a_large_picture_and_too_many_none() -> None:
    layout = layouts(200)
    assert layout.height == 160
    assert max(layout.size) < 1.3 * min(layout.size)
    with pytest.raises(UsageError) as caught:
        layouts(3000)
    assert str(caught.value) == (
        "a picture of 3000 rows of 4 panels, each 160 x 160 px, would have 695 million pixels, and may have 60; "
        "name fewer images at a time"
    )
