"""The files of a sweep's report: CSV, JSON, Markdown, plots, a picture of tokens, and a page for a browser."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokencut.errors import ArtifactError
from tokencut.evaluation.statistics import if_known
from tokencut.files import atomic_write, check_writable_folder
from tokencut.sweeping.page import GENERATOR, page
from tokencut.sweeping.picture import SweepPicture
from tokencut.sweeping.report import (
    COST_PLOT,
    CSV,
    FILES,
    JSON,
    PAGE,
    PICTURE,
    SPEED_PLOT,
    TABLE,
    SweepReport,
    markdown,
)
from tokencut.sweeping.rows import DENSE, keep_text
from tokencut.sweeping.state import FILE as STATE
from tokencut.visualization.plots import (
    FORMATS,
    PHONE_IN,
    SIZE_IN,
    Point,
    Series,
    accuracy_plot,
    save_figure,
    svg_of,
)
from tokencut.visualization.tiles import Tiles


def check_folder(folder: str | os.PathLike[str], *, force: bool) -> Path:
    """Refuses a folder that a report could not go to, before any work is done for it.

    Args:
        folder: Where the report is to go.
        force: Whether results in it that no sweep can go on with may be replaced.

    Returns:
        The folder, which need not exist yet.

    Raises:
        ArtifactError: It is a file, its parent does not exist, it may not be written to, or it holds results of unknown
            origin.
    """
    target = check_writable_folder(folder)
    found = [name for name in FILES if (target / name).exists()]
    if PAGE in found and not force and not _is_ours(target / PAGE):
        raise ArtifactError(f"{target / PAGE} is no report of a sweep; add `force=True` to replace it, or give another "
                            f"folder, such as `folder={f'{target}-2'!r}`")  # fmt: skip
    if found and not force and not (target / STATE).exists():
        raise ArtifactError(f"{target / found[0]} exists, but not the {STATE} from which a sweep could go on; add "
                            f"`force=True` to replace it, or give another folder, such as "
                            f"`folder={f'{target}-2'!r}`")  # fmt: skip
    return target


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(2000)
    except OSError:
        return False


def write_report(
    report: SweepReport, folder: Path, pictured: SweepPicture | None = None, tiles: Tiles | None = None
) -> None:
    """Writes all files of a report; those of an earlier one that would contradict it are removed.

    Args:
        report: What to write.
        folder: Where to; it exists.
        pictured: The picture that the report names, if any.
        tiles: What is left of a few images in each row, for the page in a browser.

    Raises:
        ArtifactError: One cannot be written.
    """
    values = [row.to_dict() for row in report.rows]
    with atomic_write(folder / CSV) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(values[0]))
        table.writeheader()
        table.writerows({**entry, "keep": keep_text(row.keep)} for entry, row in zip(values, report.rows, strict=True))
    with atomic_write(folder / JSON) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_write(folder / TABLE) as temporary:
        temporary.write_text(markdown(report), encoding="utf-8", errors="surrogateescape")  # names of images
    plots = _plots(report)
    for stem, (plot, _) in plots.items():
        save_figure(plot(SIZE_IN[0]), folder / stem)
    with atomic_write(folder / PAGE) as temporary:
        svgs = {name: (svg_of(plot(SIZE_IN[0])), svg_of(plot(PHONE_IN))) for plot, name in plots.values()}
        temporary.write_text(page(report, svgs, tiles), encoding="utf-8")
    if pictured is not None:
        for form in FORMATS:
            pictured.picture.save(folder / f"{PICTURE}.{form}", force=True)
    for name in set(FILES) - set(report.files):
        (folder / name).unlink(missing_ok=True)


def _plots(report: SweepReport) -> dict[str, tuple[Callable[[float], Any], str]]:
    """The plots by the names of their files: how to draw each at a width, and what it shows."""
    axis = f"images/s\n{report.device}, {report.precision}, batches of {report.batch_size}"
    found = {
        COST_PLOT: (
            lambda width: _plot(report, "gmacs", "GMACs per image", width, less_is_better=True),
            "top-1 against multiply-adds",
        ),
        SPEED_PLOT: (
            lambda width: _plot(report, "images_per_second", axis, width, less_is_better=False),
            "top-1 against images per second",
        ),
    }
    return found if report.timed else {COST_PLOT: found[COST_PLOT]}


def _plot(report: SweepReport, attribute: str, axis: str, width: float, *, less_is_better: bool) -> Any:
    points: dict[str, list[Point]] = {}
    for row in report.rows:
        error = None if row.to_dense is None else if_known(row.to_dense.standard_error)
        keep = "" if row.method == DENSE else keep_text(row.keep)
        points.setdefault(row.method, []).append(Point(getattr(row, attribute), row.top1, keep, error))
    [dense] = points.pop(DENSE)
    series = [Series(label, tuple(of)) for label, of in points.items()]
    return accuracy_plot(series, dense, axis, less_is_better=less_is_better, width=width)
