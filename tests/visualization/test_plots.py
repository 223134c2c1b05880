"""The plots: what is drawn and where, and the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokencut.errors import ArtifactError
from tokencut.visualization.plots import (
    COLOURS,
    MARKERS,
    Label,
    Series,
    accuracy_plot,
    heat_colours,
    save_figure,
    save_picture,
)

DENSE = (4.6, 79.8)
SERIES = (Series("ours", ((3.0, 79.5), (2.3, 78.9))), Series("theirs", ((3.0, 79.0), (2.3, 78.0))))


@pytest.fixture
def _drawn() -> None:
    pytest.importorskip("matplotlib")


def test_many_lines_are_told_apart() -> None:
    pairs = {(COLOURS[line % len(COLOURS)], MARKERS[line % len(MARKERS)]) for line in range(72)}
    assert len(pairs) == 72


@pytest.mark.usefixtures("_drawn")
def test_every_method_the_dense_model_and_the_front_are_drawn() -> None:
    figure = accuracy_plot(SERIES, DENSE, "GMACs per image", less_is_better=True)
    axes: Any = figure.axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"ours", "theirs", "dense", "Pareto front"}
    assert list(lines["ours"].get_xdata()) == [2.3, 3.0]
    assert list(lines["ours"].get_ydata()) == [78.9, 79.5]
    assert (list(lines["dense"].get_xdata()), lines["dense"].get_marker()) == ([4.6], "*")
    assert list(lines["Pareto front"].get_xdata()) == [2.3, 3.0, 4.6]
    assert lines["ours"].get_color() != lines["theirs"].get_color()
    assert lines["ours"].get_marker() != lines["theirs"].get_marker()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("GMACs per image", "top-1 accuracy (%)")


@pytest.mark.usefixtures("_drawn")
def test_of_equal_accuracies_only_the_cheapest_is_on_the_front() -> None:
    series = Series("ours", ((3.0, 79.8), (2.3, 78.9), (2.0, 78.9)))
    for less_is_better, expected in ((True, [2.0, 3.0]), (False, [4.6])):
        axes: Any = accuracy_plot((series,), DENSE, "GMACs", less_is_better=less_is_better).axes[0]
        [front] = [line for line in axes.get_lines() if line.get_label() == "Pareto front"]
        assert list(front.get_xdata()) == expected


@pytest.mark.usefixtures("_drawn")
def test_the_legend_stands_outside_the_data() -> None:
    figure = accuracy_plot(SERIES, DENSE, "GMACs", less_is_better=True)
    figure.draw_without_rendering()
    [legend] = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"ours", "theirs", "dense", "Pareto front"}
    assert legend.get_window_extent().x0 >= figure.axes[0].get_window_extent().x1


@pytest.mark.usefixtures("_drawn")
def test_files_are_whole_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_figure(accuracy_plot(SERIES, DENSE, "GMACs", less_is_better=True), tmp_path / f"{name}.v1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.v1.pdf", "one.v1.png", "two.v1.pdf", "two.v1.png"]
    for form, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        content = (tmp_path / f"one.v1.{form}").read_bytes()
        assert content.startswith(start)
        assert content == (tmp_path / f"two.v1.{form}").read_bytes()
    assert b"/Type3" not in (tmp_path / "one.v1.pdf").read_bytes()


@pytest.mark.usefixtures("_drawn")
def test_settings_of_matplotlib_stay_as_they_are() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    accuracy_plot(SERIES, DENSE, "GMACs", less_is_better=True)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.usefixtures("_drawn")
def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    figure = accuracy_plot((), DENSE, "GMACs", less_is_better=True)
    with pytest.raises(ArtifactError, match="does not exist"):
        save_figure(figure, tmp_path / "no" / "plot")


@pytest.mark.usefixtures("_drawn")
def test_heat_goes_from_dark_violet_to_yellow() -> None:
    # The ends of viridis.
    assert heat_colours(np.array([0.0, 1.0])).tolist() == [[68, 1, 84], [253, 231, 36]]


@pytest.mark.usefixtures("_drawn")
def test_a_label_stands_where_it_is_put(tmp_path: Path) -> None:
    for left, where in ((False, (150, 250)), (True, (200, 300))):
        (top, bottom), (start, end) = inked(tmp_path, Label("block $4$", 200, 60, 20, left=left))
        assert 12 <= bottom - top <= 24
        assert abs((top + bottom) / 2 - 60) <= 4
        assert where[0] <= start < end <= where[1]
        assert abs(start - 200 if left else (start + end) / 2 - 200) <= 4


@pytest.mark.usefixtures("_drawn")
def test_a_label_without_room_is_cut_in_its_middle(tmp_path: Path) -> None:
    texts: list[str] = []
    for room in (280, 200, 60):
        _, (start, end) = inked(tmp_path, Label("bat:preset=paper:neighbours=3", 10, 60, 20, room, left=True), texts)
        assert 10 <= start < end <= 10 + room
    assert texts[-1].count("…") == 1
    assert texts[-2].startswith("bat:")
    assert texts[-2].endswith("=3")
    assert len(texts[-2]) > len(texts[-1])


@pytest.mark.usefixtures("_drawn")
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
