"""The plots: what is drawn and where, and the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokencut.errors import ArtifactError
from tokencut.visualization.plots import COLOURS, MARKER, MARKERS, Point, Series, accuracy_plot, save_figure, svg_of

DENSE = Point(4.6, 79.8)
SERIES = (
    Series("ours", (Point(3.0, 79.5, "0.7", 0.2), Point(2.3, 78.9, "0.5", 0.3))),
    Series("theirs", (Point(3.0, 79.0, "0.7", 0.2), Point(2.3, 78.0, "0.5"))),
)


def drawn(series: Any = SERIES, dense: Point = DENSE, **how: Any) -> Any:
    """The axes of a plot."""
    return accuracy_plot(series, dense, "GMACs", **{"less_is_better": True, **how}).axes[0]


def markers(axes: Any, colour: str) -> list[Any]:
    """The points of a method, as they are drawn."""
    return [line for line in axes.get_lines() if line.get_color() == colour and line.get_linestyle() == "None"]


def bars(axes: Any, colour: str) -> list[list[float]]:
    """The ends of the error bars of a method."""
    lines = [line for line in axes.get_lines() if line.get_marker() == "_" and line.get_color() == colour]
    return [[round(float(end), 6) for end in line.get_ydata()] for line in lines]


def place(axes: Any, line: Any) -> Any:
    """Where a point is on the page, in 1/72 in."""
    [point] = line.get_transform().transform(line.get_xydata())
    return point * 72 / axes.figure.dpi


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
    assert {name for name in lines if not name.startswith("_")} == {"ours", "theirs", "dense", "Pareto front"}
    assert list(lines["ours"].get_xdata()) == [2.3, 3.0]
    assert list(lines["ours"].get_ydata()) == [78.9, 79.5]
    assert (list(lines["dense"].get_xdata()), lines["dense"].get_marker()) == ([4.6], "*")
    assert list(lines["Pareto front"].get_xdata()) == [2.3, 3.0, 4.6]
    assert lines["ours"].get_color() != lines["theirs"].get_color()
    assert lines["ours"].get_marker() != lines["theirs"].get_marker()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("GMACs per image", "top-1 accuracy (%)")


@pytest.mark.usefixtures("_drawn")
def test_of_equal_accuracies_only_the_cheapest_is_on_the_front() -> None:
    series = Series("ours", (Point(3.0, 79.8), Point(2.3, 78.9), Point(2.0, 78.9)))
    for less_is_better, expected in ((True, [2.0, 3.0]), (False, [4.6])):
        axes = drawn((series,), less_is_better=less_is_better)
        [front] = [line for line in axes.get_lines() if line.get_label() == "Pareto front"]
        assert list(front.get_xdata()) == expected


@pytest.mark.usefixtures("_drawn")
def test_errors_are_bars_where_they_are_known() -> None:
    axes = drawn()
    assert bars(axes, COLOURS[0]) == [[79.3, 79.7], [78.6, 79.2]]
    assert bars(axes, COLOURS[1]) == [[78.8, 79.2]]
    low, high = axes.get_ylim()
    assert low < 78.0
    assert high > 79.8


@pytest.mark.usefixtures("_drawn")
def test_keep_rates_are_written_above_their_points_or_beside_each_where_others_stand_among_them() -> None:
    assert [(note.get_text(), note.xy) for note in drawn().texts] == [("0.7", (3.0, 79.7)), ("0.5", (2.3, 79.2))]
    speeds = [
        Series(name, (Point(slow, 79.0, "0.7", 0.2), Point(slow + 2, 78.0, "0.5", 0.2)))
        for name, slow in (("ours", 3.0), ("theirs", 1.0))
    ]
    written = [(note.get_text(), note.xy, note.get_color()) for note in drawn(speeds, less_is_better=False).texts]
    assert written == [
        ("0.7", (3.0, 79.0), COLOURS[0]), ("0.5", (5.0, 78.0), COLOURS[0]),
        ("0.7", (1.0, 79.0), COLOURS[1]), ("0.5", (3.0, 78.0), COLOURS[1]),
    ]  # fmt: skip


@pytest.mark.usefixtures("_drawn")
def test_points_that_would_hide_each_other_stand_side_by_side() -> None:
    same = [Series(name, (Point(3.0, 79.0, "0.7", 0.1), Point(2.0, 77.0 + high))) for high, name in enumerate("abc")]
    axes = drawn(same)
    found = [[place(axes, line) for line in markers(axes, colour)] for colour in COLOURS[:3]]
    middle = axes.transData.transform((3.0, 79.0)) * 72 / axes.figure.dpi
    assert np.allclose([points[0] - middle for points in found], [(-MARKER, 0), (0, 0), (MARKER, 0)])
    apart = axes.transData.transform([(2.0, 77.0), (2.0, 78.0), (2.0, 79.0)]) * 72 / axes.figure.dpi
    assert np.allclose([points[1] for points in found], apart)
    # The lines go through the true values.
    assert {tuple(line.get_xdata()) for line in axes.get_lines() if line.get_label() in "abc"} == {(2.0, 3.0)}


@pytest.mark.usefixtures("_drawn")
@pytest.mark.parametrize("label", ["bat:preset=paper:neighbours=3", "bat" + ":a-setting-of-some-length=1.2345" * 6])
def test_long_labels_leave_the_axes_their_width(label: str) -> None:
    figure = accuracy_plot([Series(label, SERIES[0].points), SERIES[1]], DENSE, "GMACs", less_is_better=True)
    figure.draw_without_rendering()
    [legend] = figure.legends
    box, axes = legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert box.y1 <= axes.y0
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= 0
    assert axes.width > 0.75 * figure.bbox.width
    assert axes.height > 2 * figure.dpi
    assert label in {text.get_text().replace("\n", "") for text in legend.get_texts()}


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
    one, two = (svg_of(accuracy_plot(SERIES, DENSE, "GMACs", less_is_better=True, width=3.7)) for _ in range(2))
    assert one == two
    assert "<svg" in one
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
