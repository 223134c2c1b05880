"""What a sweep found, and the files it comes to: CSV, JSON, a Markdown table, two plots and a picture of tokens."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencut.errors import ArtifactError
from tokencut.evaluation.statistics import if_known
from tokencut.files import atomic_write, check_writable_folder
from tokencut.sweeping.picture import SweepPicture
from tokencut.sweeping.rows import DENSE, Comparison, Row, keep_text
from tokencut.sweeping.state import FILE as STATE
from tokencut.visualization.plots import FORMATS, Point, Series, accuracy_plot, save_figure

CSV, JSON, TABLE = "results.csv", "results.json", "table.md"
COST_PLOT, SPEED_PLOT, PICTURE = "top1-gmacs", "top1-speed", "tokens"
FILES = (CSV, JSON, TABLE, *(f"{stem}.{form}" for stem in (COST_PLOT, SPEED_PLOT, PICTURE) for form in FORMATS))

PICTURE_LEGEND = (
    "Merged patches are outlined regions in their mean colour, tokens of one patch as they are, dropped dark; regions "
    "with one number are one token."
)
LEGEND = (
    "Differences are points of top-1, paired over the images, ± one standard error; `none beyond chance` within two. "
    "Bars in plots are that error."
)


@dataclass(frozen=True)
class SweepReport:
    """What a sweep found.

    Attributes:
        model: The model's name.
        data: The data as the user wrote it.
        images: How many images each row was judged on.
        rows: The dense model, then each pair of a keep rate and a method.
        comparisons: The first method against each of the others.
        layers: The blocks that reduce, 1-based.
        precision: `fp32`, `bf16` or `fp16`.
        device: What it ran on.
        batch_size: Images in a forward that was timed.
        versions: Of torch, timm and tokencut.
        notes: What a user should know.
        pictured: The images in its picture, from top to bottom; none where there is no picture.
        pictured_keep: The keep rate of the picture.
    """

    model: str
    data: str
    images: int
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    layers: tuple[int, ...]
    precision: str
    device: str
    batch_size: int
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    pictured: tuple[str, ...] = ()
    pictured_keep: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that it is written to."""
        missing = [*([] if self.timed else [SPEED_PLOT]), *([] if self.pictured else [PICTURE])]
        return tuple(name for name in FILES if Path(name).stem not in missing)

    @property
    def timed(self) -> bool:
        """Whether speeds were measured."""
        return self.rows[0].images_per_second is not None

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        own = {name: value for name, value in vars(self).items() if name not in ("rows", "comparisons")}
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in own.items()},
            "rows": [row.to_dict() for row in self.rows],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }


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
    if found and not force and not (target / STATE).exists():
        raise ArtifactError(f"{target / found[0]} exists, but not the {STATE} from which a sweep could go on; add "
                            f"`force=True` to replace it, or give another folder, such as "
                            f"`folder={f'{target}-2'!r}`")  # fmt: skip
    return target


def write_report(report: SweepReport, folder: Path, pictured: SweepPicture | None = None) -> None:
    """Writes all files of a report; those of an earlier one that would contradict it are removed.

    Args:
        report: What to write.
        folder: Where to; it exists.
        pictured: The picture that the report names, if any.

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
    _plot(report, folder / COST_PLOT, "gmacs", "GMACs per image", less_is_better=True)
    if report.timed:
        axis = f"images/s\n{report.device}, {report.precision}, batches of {report.batch_size}"
        _plot(report, folder / SPEED_PLOT, "images_per_second", axis, less_is_better=False)
    if pictured is not None:
        for form in FORMATS:
            pictured.picture.save(folder / f"{PICTURE}.{form}", force=True)
    for name in set(FILES) - set(report.files):
        (folder / name).unlink(missing_ok=True)


def _plot(report: SweepReport, stem: Path, attribute: str, axis: str, *, less_is_better: bool) -> None:
    points: dict[str, list[Point]] = {}
    for row in report.rows:
        error = None if row.to_dense is None else if_known(row.to_dense.standard_error)
        keep = "" if row.method == DENSE else keep_text(row.keep)
        points.setdefault(row.method, []).append(Point(getattr(row, attribute), row.top1, keep, error))
    [dense] = points.pop(DENSE)
    series = [Series(label, tuple(of)) for label, of in points.items()]
    save_figure(accuracy_plot(series, dense, axis, less_is_better=less_is_better), stem)


def result_table(report: SweepReport) -> tuple[list[str], list[list[str]]]:
    """The rows as texts, headings first: two columns of names, then numbers."""
    head = ["method", "keep", "GMACs", "top-1", "against dense", *(["images/s"] if report.timed else [])]
    body = []
    for row in report.rows:
        speed = [] if row.images_per_second is None else [f"{row.images_per_second:,.0f}"]
        difference = row.to_dense.verdict() if row.to_dense else ""
        body.append([row.method, keep_text(row.keep), f"{row.gmacs:#.4g}", f"{row.top1:.2f}", difference, *speed])
    return head, body


def comparison_table(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """The comparisons as texts, headings first: a row for each other method, a column for each keep."""
    keeps = list(dict.fromkeys(comparison.keep for comparison in comparisons))
    head = ["against", *("average" if keep is None else f"keep {keep_text(keep)}" for keep in keeps)]
    cells = {(comparison.second, comparison.keep): comparison.difference.verdict() for comparison in comparisons}
    others = list(dict.fromkeys(comparison.second for comparison in comparisons))
    return head, [[other, *(cells[other, keep] for keep in keeps)] for other in others]


def markdown(report: SweepReport) -> str:
    """The report as a Markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    layers = ",".join(map(str, report.layers))
    parts = [
        f"# {report.model}: top-1 against cost",
        f"{report.images:,} images of {report.data}; blocks {layers} reduce; {report.precision} on {report.device}; "
        f"{versions}.",
        _markdown_table(*result_table(report), left=2),
        LEGEND,
    ]
    if report.timed:
        parts.append(f"Images/s: batches of {report.batch_size}, the median of rounds in which all rows took turns.")
    if report.comparisons:
        first = report.comparisons[0].first
        parts += [f"## {first} against the others", _markdown_table(*comparison_table(report.comparisons), left=1)]
        parts.append(f"Positive where {first} is ahead.")
    if report.pictured:
        parts += [f"## What is left at keep {report.pictured_keep}", f"![tokens of each method]({PICTURE}.png)"]
        names = ", ".join(f"`{name}`" for name in report.pictured)
        parts.append(f"Images: {names}. {PICTURE_LEGEND}")
    return "\n\n".join(parts) + "\n"


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, rule, *body)]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)
