"""Figures for a paper: accuracy against cost or speed."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokencut.evaluation.statistics import pareto_front
from tokencut.files import atomic_write
from tokencut.visualization.saving import PNG_DPI, TIMELESS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind and in grey; their yellow, too pale for lines, darker; and two
# dark ones for an eighth and ninth line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#A89000", "#7F4F24", "#5D3A9B")
# 8 of them to 9 colours: 72 lines before a pair repeats.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
# A paper's column is 3.3 in wide and its page 6.9; this is legible in the page's width and, reduced, in a column.
SIZE_IN = (5.6, 3.5)
# On a phone the letters of a plot are as large as others only where it is as narrow as the screen.
PHONE_IN = 3.7
FORMATS = ("png", "pdf")
# Longer labels of methods stand below the axes, which they would leave no room beside; the longest in several lines.
BESIDE, LONGEST = 20, 76
# A line of the legend, a letter of it on average, and what stands before its text, in inches.
LEGEND_LINE, LETTER, HANDLE = 0.18, 0.072, 0.55
# Points nearer than this stand side by side, in points of 1/72 in: the size of a marker.
MARKER = 6.0

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "pdf.fonttype": 42,  # fonts are embedded whole: many venues refuse matplotlib's default, type 3
    "svg.fonttype": "path",
    "svg.hashsalt": "tokencut",  # names within the file are else drawn by chance
}


@dataclass(frozen=True)
class Point:
    """A model that was measured.

    Attributes:
        x: Its cost or speed.
        top1: In percent.
        keep: Its keep rate as text; empty where none is to be written beside it.
        error: One standard error of `top1`, or of its difference to the dense model's; None where it is not known.
    """

    x: float
    top1: float
    keep: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Series:
    """One method's points, joined by a thin line in the order of cost."""

    label: str
    points: tuple[Point, ...]


def accuracy_plot(
    series: Sequence[Series], dense: Point, x_label: str, *, less_is_better: bool, width: float = SIZE_IN[0]
) -> Figure:
    """Draws top-1 against what it costs: a line a method, the dense model as a star, and the Pareto front.

    Bars reach one standard error up and down. Points that would hide each other stand side by side.

    Args:
        series: The methods.
        dense: The dense model.
        x_label: What stands on the x axis, with its unit.
        less_is_better: Whether x is a cost rather than a speed.
        width: Of the figure, in inches.

    Returns:
        matplotlib's figure; no window is opened and no global state of matplotlib changes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        labels = [_broken(line.label) for line in series]
        below = any(len(line.label) > BESIDE for line in series) or width < SIZE_IN[0]
        columns, rows = _legend_shape(labels, width)
        figure = Figure(figsize=(width, SIZE_IN[1] + (rows * LEGEND_LINE if below else 0)), layout="constrained")
        axes = figure.add_subplot()
        front = pareto_front(
            [dense, *(point for line in series for point in line.points)],
            cost=lambda point: point.x if less_is_better else -point.x,
            gain=lambda point: point.top1,
        )
        axes.plot(dense.x, dense.top1, color="black", marker="*", markersize=11, linestyle="none", zorder=4,
                  label="dense")  # fmt: skip
        # Steps: at a budget between two models that were measured, the cheaper of them is the best there is.
        axes.plot(
            [point.x for point in front], [point.top1 for point in front], color="#999999", linewidth=3, alpha=0.45,
            drawstyle="steps-post", solid_joinstyle="miter", label="Pareto front",
        )  # fmt: skip
        styles = list(zip(series, labels, cycle(COLOURS), cycle(MARKERS)))
        for line, label, colour, marker in styles:
            _draw_line(axes, line, label, colour, marker)
        if width < SIZE_IN[0]:
            axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(x_label)
        axes.set_ylabel("top-1 accuracy (%)")
        axes.margins(0.08, 0.09)
        place = {"loc": "outside lower center", "ncols": columns} if below else {"loc": "outside right upper"}
        figure.legend(frameon=False, **place)
        figure.draw_without_rendering()  # only now it is known which points lie near each other
        offsets = _side_by_side(axes, [point for line in series for point in line.points])
        for line, _, colour, marker in styles:
            for point in line.points:
                _draw_point(figure, axes, point, colour, marker, offsets.pop(0))
        _write_keep_rates(axes, series)
    return figure


def _broken(label: str) -> str:
    """A long label in several lines, broken where a setting begins."""
    spaced = label.replace(":", ": ")
    return "\n".join(line.replace(": ", ":") for line in textwrap.wrap(spaced, LONGEST)) or label


def _legend_shape(labels: Sequence[str], width: float) -> tuple[int, int]:
    """The columns of a legend below the axes, and how many lines of text it then has."""
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    columns = max(1, min(len(labels) + 2, int(width / (HANDLE + LETTER * max(longest, len("Pareto front"))))))
    lines = 2 + sum(1 + label.count("\n") for label in labels)
    return columns, -(-lines // columns) + 1


def _draw_line(axes: Axes, line: Series, label: str, colour: str, marker: str) -> None:
    """Draws the line without its markers, which the legend shows all the same, and makes room for its bars."""
    points = sorted(line.points, key=lambda point: (point.x, point.top1))
    axes.plot(
        [point.x for point in points], [point.top1 for point in points], color=colour, marker=marker, markevery=[],
        markersize=MARKER, markeredgecolor="white", markeredgewidth=0.4, linewidth=1.1, label=label,
    )  # fmt: skip
    bars = [(point.x, point.top1 + sign * (point.error or 0)) for point in points for sign in (-1, 1)]
    axes.update_datalim(bars)
    axes.autoscale_view()


def _draw_point(figure: Figure, axes: Axes, point: Point, colour: str, marker: str, offset: float) -> None:
    """Draws a marker and its bar, `offset` points of 1/72 in beside its place."""
    from matplotlib.transforms import offset_copy

    place = offset_copy(axes.transData, figure, x=offset, units="points")
    if point.error:
        ends = [point.top1 - point.error, point.top1 + point.error]
        axes.plot([point.x] * 2, ends, color=colour, linewidth=0.9, marker="_", markersize=4, transform=place,
                  zorder=2.5, scalex=False, scaley=False, clip_on=False)  # fmt: skip
    axes.plot(
        point.x, point.top1, color=colour, marker=marker, markersize=MARKER, markeredgecolor="white",
        markeredgewidth=0.4, linestyle="none", transform=place, zorder=3, scalex=False, scaley=False,
        clip_on=False,
    )  # fmt: skip


def _side_by_side(axes: Axes, points: Sequence[Point]) -> list[float]:
    """How far each point moves to the side that none hides another, in points of 1/72 in; most do not move."""
    if not points:
        return []
    places = axes.transData.transform([(point.x, point.top1) for point in points]) * 72 / axes.figure.dpi
    offsets, left = [0.0] * len(points), list(range(len(points)))
    while left:
        near = np.abs(places[left] - places[left[0]]).max(1) < 0.6 * MARKER
        group = [number for number, close in zip(left, near, strict=True) if close]
        for position, number in enumerate(group):
            offsets[number] = (position - (len(group) - 1) / 2) * MARKER
        left = [number for number in left if number not in group]
    return offsets


def _write_keep_rates(axes: Axes, series: Sequence[Series]) -> None:
    """Writes each keep rate once, above its points, where no other stands among them; else beside each point."""
    from matplotlib.patheffects import withStroke

    groups: dict[str, list[Point]] = {}
    for point in (point for line in series for point in line.points if point.keep):
        groups.setdefault(point.keep, []).append(point)
    spans = sorted((min(point.x for point in group), max(point.x for point in group)) for group in groups.values())
    how: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "zorder": 5, "annotation_clip": False,
                           "path_effects": [withStroke(linewidth=1.5, foreground="white")]}  # fmt: skip
    if all(one[1] < other[0] for one, other in pairwise(spans)):
        for keep, group in groups.items():
            highest = max(group, key=lambda point: point.top1 + (point.error or 0))
            top = highest.top1 + (highest.error or 0)
            axes.annotate(keep, (highest.x, top), (0, 5), ha="center", va="bottom", color="#444444", **how)
        return
    for line, colour in zip(series, cycle(COLOURS)):
        for point in line.points:
            axes.annotate(point.keep, (point.x, point.top1), (5, 0), ha="left", va="center", color=colour, **how)


def svg_of(figure: Figure) -> str:
    """A figure as SVG that looks the same in every program; the same figure gives the same text."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata=TIMELESS["svg"])
    return text.getvalue()


def save_figure(figure: Figure, stem: Path) -> None:
    """Writes a figure as PNG and PDF; the same figure gives the same bytes.

    Args:
        figure: What `accuracy_plot` returned.
        stem: The path without extension.

    Raises:
        ArtifactError: One cannot be written.
    """
    import matplotlib

    for form in FORMATS:
        path = stem.with_name(f"{stem.name}.{form}")
        with matplotlib.rc_context(STYLE), atomic_write(path) as temporary:
            figure.savefig(temporary, format=form, dpi=PNG_DPI, metadata=TIMELESS.get(form))
