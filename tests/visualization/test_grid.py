"""Where panels stand: in no two places at once, in line, and within the picture."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from tokencut.errors import UsageError
from tokencut.visualization.grid import CAPTION, GAP, MARGIN, NAME, Canvas, Layout, Panel, Strip, fit


def boxes(layout: Layout) -> list[tuple[int, int, int, int]]:
    """Top, left, bottom and right of every panel with its caption."""
    places = [layout.photo_at(image) for image in range(layout.images)]
    places += [
        layout.panel_at(image, strip, panel)
        for image in range(layout.images)
        for strip in range(layout.strips)
        for panel in range(layout.panels)
    ]
    return [(top, left, top + layout.height + CAPTION, left + layout.width) for top, left in places]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("strips", "panels"), [(1, 3), (3, 3), (2, 12), (1, 0)])
@pytest.mark.parametrize(("height", "width"), [(400, 400), (448, 128)])
def test_panels_lie_apart_and_inside(strips: int, panels: int, height: int, width: int, named: bool) -> None:
    layout = Layout(2, strips, panels, height, width, named)
    lines, length = layout.size
    found = boxes(layout)
    assert len(found) == 2 + 2 * strips * panels
    for top, left, bottom, right in found:
        assert 0 < top < bottom <= lines
        assert 0 < left < right < length
    for one, other in combinations(found, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] < other[1] or other[3] < one[1]


def test_one_model_stands_in_one_line_with_its_photo() -> None:
    layout = Layout(2, 1, 3, 400, 400, named=False)
    assert layout.size == (2 * (400 + CAPTION) + MARGIN, 2 * MARGIN + 4 * 400 + 3 * GAP)
    assert layout.photo_at(1) == (MARGIN + 400 + CAPTION, MARGIN)
    assert layout.panel_at(1, 0, 0) == (MARGIN + 400 + CAPTION, MARGIN + 400 + GAP)


def test_a_photo_stands_in_the_middle_of_its_models() -> None:
    layout = Layout(1, 3, 2, 400, 400, named=True)
    assert layout.photo_at(0)[0] == layout.panel_at(0, 1, 0)[0]
    assert layout.panel_at(0, 0, 0)[1] == MARGIN + 400 + NAME + GAP


def test_twelve_stages_take_two_lines_of_six() -> None:
    layout = Layout(1, 1, 12, 400, 400, named=False)
    assert (layout.lines, layout.columns) == (2, 6)
    assert layout.panel_at(0, 0, 6) == (layout.panel_at(0, 0, 0)[0] + 400 + CAPTION, layout.panel_at(0, 0, 0)[1])


def test_panels_names_and_captions_are_put_in_place() -> None:
    canvas = Canvas(Layout(1, 2, 1, 8, 8, named=True))
    strips = [Strip({0: Panel(np.full((8, 8, 3), shade, np.uint8), f"{shade}")}, f"m{shade}") for shade in (1, 2)]
    canvas.add(0, Panel(np.full((8, 8, 3), 3, np.uint8), "photo"), strips)
    for place, shade in ((canvas.layout.panel_at(0, 0, 0), 1), (canvas.layout.panel_at(0, 1, 0), 2),
                         (canvas.layout.photo_at(0), 3)):  # fmt: skip
        top, left = place
        assert (canvas.pixels[top : top + 8, left : left + 8] == shade).all()
        assert (canvas.pixels[top - 1, left : left + 8] > 100).all()
    assert (canvas.pixels < 4).sum() == 3 * 8 * 8 * 3
    assert [(label.text, label.upright) for label in canvas.labels] == [
        ("photo", False), ("1", False), ("m1", True), ("2", False), ("m2", True),
    ]  # fmt: skip


@pytest.mark.parametrize(("side", "scale"), [(32, 14), (56, 8), (224, 2), (384, 1), (1024, 1)])
def test_small_images_are_drawn_larger_by_a_whole_number(side: int, scale: int) -> None:
    found, layout = fit(side, side, lambda height, width: Layout(1, 1, 3, height, width, False))
    assert (found, layout.height) == (scale, scale * side)


def test_many_images_are_drawn_smaller_and_too_many_not_at_all() -> None:
    def images(count: int) -> int:
        return fit(32, 32, lambda height, width: Layout(count, 1, 3, height, width, False))[0]

    assert images(100) < 14
    with pytest.raises(UsageError) as caught:
        images(3000)
    # At scale 1: 3,000 lines of 32 + 46 px, and four columns as wide as a caption.
    assert str(caught.value) == (
        "a picture of 3000 images, each with 3 panels of 32 x 32 px, would have 314 million pixels, and may have 60; "
        "name fewer images at a time"
    )
