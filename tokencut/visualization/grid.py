"""Where the panels of a picture stand: images one below the other, the stages of each at its right, captions below."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tokencut.errors import UsageError
from tokencut.visualization.plots import Label
from tokencut.visualization.regions import Pixels

# Lengths are px of the picture, of which 300 make a printed inch: letters of 6 pt, the smallest that journals take.
TEXT = 26
CAPTION = 46
# The widest caption, `block 12: 1296 → 1296`, in letters of that size.
WIDEST_CAPTION = 316
MARGIN, GAP, NAME, BETWEEN_IMAGES = 16, 16, 44, 40
# The longer side of a panel: two photos of 224 px, six of CIFAR-10's. A page's width then holds four panels.
PANEL = 448
# More panels go into further lines.
PANELS_A_LINE = 6
# Around panels, that a white sky does not run out into the page.
FRAME = 160
# A megapixel of picture takes some 10 MB while it is written; more than 2^16 lines are more than many programs open.
MOST_PIXELS, MOST_LINES = 60_000_000, 60_000


@dataclass(frozen=True)
class Panel:
    """One image of a picture, `(H, W, 3)`, and what stands below it."""

    pixels: Pixels
    caption: str


@dataclass(frozen=True)
class Strip:
    """What one model makes of an image: a panel a stage, by place, and the model's name if it needs one."""

    panels: dict[int, Panel]
    name: str = ""


@dataclass(frozen=True)
class Layout:
    """The places of all panels, which are of one size.

    Attributes:
        images: How many images there are, each with its photo at the left.
        strips: Models, one below the other.
        panels: Stages a model, side by side; many of them in several lines.
        height: A panel's height in px.
        width: A panel's width in px.
        named: Whether names stand before the rows.
    """

    images: int
    strips: int
    panels: int
    height: int
    width: int
    named: bool

    @property
    def lines(self) -> int:
        """The lines of panels that a model takes."""
        return max(1, -(-self.panels // PANELS_A_LINE))

    @property
    def columns(self) -> int:
        """The panels in a line."""
        return -(-self.panels // self.lines)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        height = MARGIN + self.images * (self._image_height + self._between) - self._between
        width = MARGIN + self._cell + self._names + self.columns * (self._cell + GAP) + MARGIN
        return height, width

    def photo_at(self, image: int) -> tuple[int, int]:
        """The top and left of an image's photo, in the middle of its lines."""
        return self._top(image) + (self._image_height - self._line) // 2, MARGIN + (self._cell - self.width) // 2

    def panel_at(self, image: int, strip: int, panel: int) -> tuple[int, int]:
        """The top and left of a stage's panel."""
        line, column = divmod(panel, self.columns)
        left = MARGIN + self._cell + self._names + GAP + column * (self._cell + GAP)
        top = self._top(image) + (strip * self.lines + line) * self._line
        return top, left + (self._cell - self.width) // 2

    def name_at(self, image: int, strip: int) -> tuple[float, float]:
        """The middle of a model's name."""
        top = self._top(image) + strip * self.lines * self._line
        return top + (self.lines * self._line - CAPTION) / 2, MARGIN + self._cell + GAP + NAME / 2

    def _top(self, image: int) -> int:
        return MARGIN + image * (self._image_height + self._between)

    @property
    def _cell(self) -> int:
        """The width of a column, in which panels stand in the middle."""
        return max(self.width, WIDEST_CAPTION)

    @property
    def _line(self) -> int:
        return self.height + CAPTION

    @property
    def _image_height(self) -> int:
        return self.strips * self.lines * self._line

    @property
    def _between(self) -> int:
        return BETWEEN_IMAGES if self.strips * self.lines > 1 else 0

    @property
    def _names(self) -> int:
        return NAME if self.named else 0


@dataclass
class Canvas:
    """A picture being made; panels are handed over one image at a time, and not kept."""

    layout: Layout
    pixels: Pixels = field(init=False)
    labels: list[Label] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pixels = np.full((*self.layout.size, 3), 255, np.uint8)

    def add(self, image: int, photo: Panel, strips: Sequence[Strip]) -> None:
        """Puts an image and its rows in their places."""
        self._put(photo, self.layout.photo_at(image))
        for row, strip in enumerate(strips):
            for place, panel in strip.panels.items():
                self._put(panel, self.layout.panel_at(image, row, place))
            if self.layout.named:
                y, x = self.layout.name_at(image, row)
                self.labels.append(Label(strip.name, x, y, TEXT, upright=True))

    def _put(self, panel: Panel, at: tuple[int, int]) -> None:
        (top, left), (height, width) = at, panel.pixels.shape[:2]
        self.pixels[top - 1 : top + height + 1, left - 1 : left + width + 1] = FRAME
        self.pixels[top : top + height, left : left + width] = panel.pixels
        self.labels.append(Label(panel.caption, left + width / 2, top + height + CAPTION * 0.42, TEXT))


def fit(height: int, width: int, layout_of: Callable[[int, int], Layout]) -> tuple[int, Layout]:
    """Chooses how much larger images are drawn than they are, by a whole number that keeps patches sharp.

    Args:
        height: Of the images, in px.
        width: Likewise.
        layout_of: The layout for panels of a height and a width.

    Returns:
        The scale and the layout.

    Raises:
        UsageError: The picture would be too large even at scale 1.
    """
    for scale in _scales(max(height, width)):
        layout = layout_of(scale * height, scale * width)
        lines, length = layout.size
        if lines * length <= MOST_PIXELS and max(lines, length) <= MOST_LINES:
            return scale, layout
    raise UsageError(
        f"a picture of {layout.images} images, each with {layout.strips * layout.panels} panels of {height} x {width} "
        f"px, would have {lines * length // 10**6} million pixels, and may have {MOST_PIXELS // 10**6}; name fewer "
        "images at a time"
    )


def _scales(longer: int) -> Iterator[int]:
    yield from range(max(1, round(PANEL / longer)), 0, -1)
