"""Pictures as files: texts where they are put, in whatever script, and the colours of heat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokencut.visualization.saving import Label, heat_colours, save_picture

pytest.importorskip("matplotlib")


def test_heat_goes_from_dark_violet_to_yellow() -> None:
    # The ends of viridis.
    assert heat_colours(np.array([0.0, 1.0])).tolist() == [[68, 1, 84], [253, 231, 36]]


def test_a_label_stands_where_it_is_put(tmp_path: Path) -> None:
    for left, where in ((False, (150, 250)), (True, (200, 300))):
        (top, bottom), (start, end) = inked(tmp_path, Label("block $4$", 200, 60, 20, left=left))
        assert 12 <= bottom - top <= 24
        assert abs((top + bottom) / 2 - 60) <= 4
        assert where[0] <= start < end <= where[1]
        assert abs(start - 200 if left else (start + end) / 2 - 200) <= 4


def test_a_label_without_room_is_cut_in_its_middle(tmp_path: Path) -> None:
    texts: list[str] = []
    for room in (280, 200, 60):
        _, (start, end) = inked(tmp_path, Label("bat:preset=paper:neighbours=3", 10, 60, 20, room, left=True), texts)
        assert 10 <= start < end <= 10 + room
    assert texts[-1].count("…") == 1
    assert texts[-2].startswith("bat:")
    assert texts[-2].endswith("=3")
    assert len(texts[-2]) > len(texts[-1])


def test_letters_that_no_font_has_are_told_apart(tmp_path: Path) -> None:
    texts: list[str] = []
    for text in ("кот \U000f0001.jpg", "кот \U000f0002.jpg"):  # for private use
        inked(tmp_path, Label(text, 10, 60, 20, left=True), texts)
    assert texts == ["кот \\U000f0001.jpg", "кот \\U000f0002.jpg"]


def inked(folder: Path, label: Label, texts: list[str] | None = None) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and last row, and the first and last column, in which a label leaves ink; its text joins `texts`."""
    from matplotlib.text import Text

    kept = Text.draw

    def noting(self: Any, *args: Any, **named: Any) -> None:
        if texts is not None and self.get_text():
            texts.append(self.get_text())
        kept(self, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noting)
        save_picture(np.full((200, 320, 3), 255, np.uint8), [label], folder / "a.png", "png")
    with Image.open(folder / "a.png") as written:
        dark = np.argwhere(np.asarray(written.convert("L")) < 128)
    (top, left), (bottom, right) = dark.min(0), dark.max(0)
    return (top, bottom), (left, right)
