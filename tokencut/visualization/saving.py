"""Pictures of tokens as files: pixels with texts over them, in whatever script."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokencut.data.own_pictures import MARK
from tokencut.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.text import Text

PNG_DPI = 300
# Sharp in each: pixels are stored as they are, and text as text where the format has any.
PICTURE_FORMATS = ("png", "pdf", "svg")
# No moment of writing in a file, and in a PNG the mark by which it is not taken for an image to judge.
TIMELESS: dict[str, dict[Any, Any]] = {"png": dict(MARK), "pdf": {"CreationDate": None}, "svg": {"Date": None}}

# matplotlib brings them along: one with letters of Europe and near it, and one with the same box for all of a script.
OWN_FONT, NO_FONT = "DejaVu Sans", "Last Resort"

PICTURE_STYLE: dict[Any, Any] = {
    "font.family": OWN_FONT,
    "text.usetex": False,
    "savefig.bbox": "standard",  # a user's "tight" would change the number of pixels
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
    "svg.fonttype": "path",  # a reader without the font sees the same letters
    "svg.hashsalt": "tokencut",  # names within the file are else drawn by chance
}


@dataclass(frozen=True)
class Label:
    """A text in a picture.

    Attributes:
        text: What it says.
        x: Of its middle, in px from the left.
        y: Of its middle, in px from the top.
        size: Of its letters, in px.
        room: Its largest width in px; a longer text is cut in its middle.
        left: Whether `x` is where it begins.
    """

    text: str
    x: float
    y: float
    size: float
    room: float = float("inf")
    left: bool = False


def heat_colours(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours for a heat map, by viridis: even steps to every eye, the colour-blind's too.

    Args:
        values: From 0 to 1, `(N,)`.

    Returns:
        `(N, 3)`.
    """
    import matplotlib

    colours: NDArray[np.uint8] = matplotlib.colormaps["viridis"](values, bytes=True)[:, :3]
    return colours


def save_picture(pixels: NDArray[np.uint8], labels: Iterable[Label], path: Path, form: str) -> None:
    """Writes pixels with texts over them; the same picture gives the same bytes.

    Args:
        pixels: `(H, W, 3)`; each is one pixel of a PNG, at 300 a printed inch.
        labels: The texts.
        path: The file, which is replaced all at once.
        form: One of `PICTURE_FORMATS`.

    Raises:
        ArtifactError: It cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    height, width = pixels.shape[:2]
    labels = list(labels)
    with matplotlib.rc_context(PICTURE_STYLE):
        fonts = _Fonts("".join(label.text for label in labels))
        figure = Figure(figsize=(width / PNG_DPI, height / PNG_DPI), dpi=PNG_DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(pixels, interpolation="none", extent=(0, width, height, 0), aspect="auto")
        for label in labels:
            shown = axes.text(
                label.x, label.y, fonts.printable(label.text), fontsize=label.size * 72 / PNG_DPI,
                fontfamily=fonts.families, ha="left" if label.left else "center", va="center", parse_math=False,
            )  # fmt: skip
            _cut(shown, label.room)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=form, dpi=PNG_DPI, metadata=TIMELESS.get(form))


def _cut(shown: Text, room: float) -> None:
    """Leaves out the middle of a text until it is no wider than `room` px: what tells names apart is at their ends."""
    whole = shown.get_text()
    left = len(whole)
    while (width := shown.get_window_extent().width) > room and left > 1:
        left = min(left - 1, int(left * room / width))
        shown.set_text(f"{whole[: left // 2]}\N{HORIZONTAL ELLIPSIS}{whole[len(whole) - (left - left // 2) :]}")


class _Fonts:
    """The fonts for a text: matplotlib's own, and of those installed the ones that have most of what it lacks."""

    def __init__(self, text: str) -> None:
        from matplotlib.font_manager import findfont, fontManager

        self.families = [OWN_FONT]
        self._missing = {ord(letter) for letter in text} - _letters(findfont(OWN_FONT))
        if not self._missing:
            return
        installed = {
            entry.name: entry.fname
            for entry in sorted(fontManager.ttflist, key=lambda entry: entry.fname)
            if not entry.name.startswith(NO_FONT)
        }
        able = {name: _letters(path) & self._missing for name, path in sorted(installed.items())}
        while any(able.values()):
            best = max(able, key=lambda name: len(able[name]))
            self.families.append(best)
            self._missing -= able[best]
            able = {name: letters & self._missing for name, letters in able.items()}

    def printable(self, text: str) -> str:
        """The text with an escape for every letter that no font has: names stay different."""
        return "".join(
            letter.encode("unicode_escape").decode() if ord(letter) in self._missing else letter for letter in text
        )


def _letters(path: str) -> set[int]:
    """The code points that a font has; none where it was removed since matplotlib made its list, or is damaged."""
    from matplotlib.font_manager import get_font

    try:
        return set(get_font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return set()
