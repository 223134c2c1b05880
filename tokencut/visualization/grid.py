"""Where the panels of a picture stand: strips of an image and a model's stages, below or beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tokencut.errors import UsageError
from tokencut.visualization.regions import Pixels
from tokencut.visualization.saving import Label

# Lengths are px of the picture, of which 300 make a printed inch. Letters grow with panels, since a larger picture is
# seen from further away: 26 px beside panels of 448, which is 6 pt in print.
PANEL, PANEL_TEXT = 448, 26
SMALLEST_TEXT, LARGEST_TEXT = 18, 44
# In letters: a line of text below or above a panel, and the widest caption, `block 12: 1296 → 1296`.
LINE, WIDEST_CAPTION = 1.8, 12.2
# A swatch of the legend, and how wide a letter is on average.
SWATCH, LETTER = 2.2, 0.53
# Panels in a line, the image among them; more go into further lines.
PANELS_A_LINE = 7
# Around panels, that a white sky does not run out into the page.
FRAME = 160
# What fits a screen two or three times over; a picture of very many images may be larger.
TALLEST, WIDEST = 3000, 4000
# A megapixel of picture takes some 10 MB while it is written; more than 2^16 lines are more than many programs open.
MOST_PIXELS, MOST_LINES = 60_000_000, 60_000


@dataclass(frozen=True)
class Panel:
    """One image of a picture, `(H, W, 3)`, and what stands below it; beside it in a legend."""

    pixels: Pixels
    caption: str


@dataclass(frozen=True)
class Strip:
    """What one model makes of one image: the image, a panel a stage by place, and what stands above them."""

    photo: Panel
    stages: dict[int, Panel]
    title: str


@dataclass(frozen=True)
class Layout:
    """The places of all panels, which are of one size.

    Strips form groups, each with a title: one below the other inside a group, groups `across` a line of them.

    Attributes:
        groups: How many groups there are.
        strips: Strips a group.
        stages: Stages a strip, side by side behind the image; many of them in several lines.
        height: A panel's height in px.
        width: A panel's width in px.
        across: Groups that stand side by side.
        a_line: Panels in a line at most, the image among them.
    """

    groups: int
    strips: int
    stages: int
    height: int
    width: int
    across: int = 1
    a_line: int = PANELS_A_LINE

    @property
    def text(self) -> int:
        """The size of letters in px."""
        return round(min(max(PANEL_TEXT * max(self.height, self.width) / PANEL, SMALLEST_TEXT), LARGEST_TEXT))

    @property
    def gap(self) -> int:
        """Between panels, and around everything."""
        return round(0.6 * self.text)

    @property
    def line(self) -> int:
        """The height of a line of text."""
        return round(LINE * self.text)

    @property
    def lines(self) -> int:
        """The lines of panels that a strip takes."""
        return -(-(1 + self.stages) // self.a_line)

    @property
    def columns(self) -> int:
        """The panels in a line."""
        return -(-(1 + self.stages) // self.lines)

    @property
    def cell(self) -> int:
        """The width of a column, in which panels stand in the middle."""
        return max(self.width, round(WIDEST_CAPTION * self.text))

    @property
    def titled(self) -> bool:
        """Whether a group has a title above those of its strips."""
        return self.strips > 1

    @property
    def group_width(self) -> int:
        """The width of a group in px."""
        return self.columns * (self.cell + self.gap) - self.gap

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture, without its legend."""
        down = -(-self.groups // self.across)
        height = down * (self._group_height + self._between) - self._between
        width = self.across * (self.group_width + self._between) - self._between
        return height + 2 * self.gap, width + 2 * self.gap

    def group_at(self, group: int) -> tuple[int, int]:
        """The top and left of a group."""
        row, column = divmod(group, self.across)
        top = self.gap + row * (self._group_height + self._between)
        return top, self.gap + column * (self.group_width + self._between)

    def strip_at(self, group: int, strip: int) -> tuple[int, int]:
        """The top and left of a strip, where its title is."""
        top, left = self.group_at(group)
        return top + self.line * self.titled + strip * self._strip_height, left

    def panel_at(self, group: int, strip: int, panel: int) -> tuple[int, int]:
        """The top and left of a panel: 0 is the image, 1 the first stage."""
        line, column = divmod(panel, self.columns)
        top, left = self.strip_at(group, strip)
        left += column * (self.cell + self.gap) + (self.cell - self.width) // 2
        return top + self.line + line * (self.height + self.line), left

    @property
    def _strip_height(self) -> int:
        return self.line + self.lines * (self.height + self.line)

    @property
    def _group_height(self) -> int:
        return self.line * self.titled + self.strips * self._strip_height

    @property
    def _between(self) -> int:
        return 2 * self.gap


@dataclass
class Canvas:
    """A picture being made; strips are handed over one at a time, and not kept."""

    layout: Layout
    legend: Sequence[Panel] = ()
    pixels: Pixels = field(init=False)
    labels: list[Label] = field(default_factory=list)

    def __post_init__(self) -> None:
        height, width = self.layout.size
        lines = self._legend_lines(width)
        self.pixels = np.full((height + len(lines) * self._legend_height, width, 3), 255, np.uint8)
        for row, panels in enumerate(lines):
            self._add_legend(panels, height + row * self._legend_height)

    def add_group(self, group: int, title: str) -> None:
        """Puts the title of a group in its place."""
        self._label(title, *self.layout.group_at(group))

    def add(self, group: int, row: int, strip: Strip) -> None:
        """Puts a strip in its place."""
        self._label(strip.title, *self.layout.strip_at(group, row))
        self._put(strip.photo, self.layout.panel_at(group, row, 0))
        for place, panel in strip.stages.items():
            self._put(panel, self.layout.panel_at(group, row, place + 1))

    def _label(self, title: str, top: int, left: int) -> None:
        if title:
            middle = top + 0.45 * self.layout.line
            self.labels.append(Label(title, left, middle, self.layout.text, self.layout.group_width, left=True))

    def _put(self, panel: Panel, at: tuple[int, int]) -> None:
        (top, left), (height, width) = at, panel.pixels.shape[:2]
        self.pixels[top - 1 : top + height + 1, left - 1 : left + width + 1] = FRAME
        self.pixels[top : top + height, left : left + width] = panel.pixels
        middle = top + self.layout.height + 0.42 * self.layout.line
        self.labels.append(Label(panel.caption, left + width / 2, middle, self.layout.text, self.layout.cell))

    @property
    def _legend_height(self) -> int:
        return round((SWATCH + 0.6) * self.layout.text)

    def _legend_width(self, panel: Panel) -> int:
        return panel.pixels.shape[1] + self.layout.gap + round(LETTER * self.layout.text * len(panel.caption))

    def _legend_lines(self, width: int) -> list[list[Panel]]:
        """The legend's entries, as many a line as have room."""
        lines: list[list[Panel]] = []
        left = width
        for panel in self.legend:
            taken = self._legend_width(panel) + 2 * self.layout.gap
            if not lines or left + taken > width:
                lines.append([])
                left = self.layout.gap
            lines[-1].append(panel)
            left += taken
        return lines

    def _add_legend(self, panels: Iterable[Panel], top: int) -> None:
        left = self.layout.gap
        for panel in panels:
            height, width = panel.pixels.shape[:2]
            self.pixels[top : top + height, left : left + width] = panel.pixels
            room = self.pixels.shape[1] - left - width - 2 * self.layout.gap
            at = left + width + self.layout.gap
            self.labels.append(Label(panel.caption, at, top + height / 2, self.layout.text, room, left=True))
            left += self._legend_width(panel) + 2 * self.layout.gap


def swatch_side(layout: Layout) -> int:
    """The side of a swatch of the legend, in px."""
    return round(SWATCH * layout.text)


def fit(sizes: Sequence[tuple[int, int]], groups: int, layout_of: Callable[[int, int, int], Layout]) -> Layout:
    """Chooses the size of panels and how many groups stand side by side.

    Args:
        sizes: Heights and widths that panels may have in px, the best first, the smallest last.
        groups: How many groups there are.
        layout_of: The layout for panels of a height and a width, and so many groups across.

    Returns:
        The layout.

    Raises:
        UsageError: The picture would be too large with the smallest panels.
    """
    for height, width in sizes:
        for across in range(1, groups + 1):
            layout = layout_of(height, width, across)
            tall, wide = layout.size
            if tall <= TALLEST and wide <= WIDEST:
                return layout
    # So many images that they make a large picture in any case: as near to a square as can be.
    layout = min((layout_of(*sizes[-1], across) for across in range(1, groups + 1)), key=lambda one: max(one.size))
    lines, length = layout.size
    if lines * length <= MOST_PIXELS and max(lines, length) <= MOST_LINES:
        return layout
    raise UsageError(
        f"a picture of {groups * layout.strips} rows of {layout.stages + 1} panels, each {layout.height} x "
        f"{layout.width} px, would have {lines * length // 10**6} million pixels, and may have "
        f"{MOST_PIXELS // 10**6}; name fewer images at a time"
    )
