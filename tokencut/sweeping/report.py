"""What a sweep found, and the names of the files it comes to; as tables, and as a Markdown page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencut.evaluation.statistics import Difference
from tokencut.sweeping.rows import Comparison, Row, keep_text
from tokencut.visualization.plots import FORMATS

CSV, JSON, TABLE, PAGE = "results.csv", "results.json", "table.md", "index.html"
COST_PLOT, SPEED_PLOT, PICTURE = "top1-gmacs", "top1-speed", "tokens"
FILES = (CSV, JSON, TABLE, PAGE, *(f"{stem}.{form}" for stem in (COST_PLOT, SPEED_PLOT, PICTURE) for form in FORMATS))

PICTURE_LEGEND = (
    "Merged patches are outlined regions in their mean colour, tokens of one patch as they are, dropped dark; regions "
    "with one number are one token."
)
LEGEND = (
    "Differences are points of top-1, paired over the images, ± one standard error; `none beyond chance` within two. "
    "Bars in plots are that error."
)
TIMING = "Images/s: batches of {batch_size}, the median of rounds in which all rows took turns."

# How a difference is put into words.
Told = Callable[[Difference], str]


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


def result_table(report: SweepReport, told: Told = Difference.verdict) -> tuple[list[str], list[list[str]]]:
    """The rows as texts, headings first: two columns of names, then numbers."""
    head = ["method", "keep", "GMACs", "top-1", "against dense", *(["images/s"] if report.timed else [])]
    body = []
    for row in report.rows:
        speed = [] if row.images_per_second is None else [f"{row.images_per_second:,.0f}"]
        difference = told(row.to_dense) if row.to_dense else ""
        body.append([row.method, keep_text(row.keep), f"{row.gmacs:#.4g}", f"{row.top1:.2f}", difference, *speed])
    return head, body


def comparison_table(
    comparisons: Sequence[Comparison], told: Told = Difference.verdict
) -> tuple[list[str], list[list[str]]]:
    """The comparisons as texts, headings first: a row for each other method, a column for each keep."""
    keeps = list(dict.fromkeys(comparison.keep for comparison in comparisons))
    head = ["against", *("average" if keep is None else f"keep {keep_text(keep)}" for keep in keeps)]
    cells = {(comparison.second, comparison.keep): told(comparison.difference) for comparison in comparisons}
    others = list(dict.fromkeys(comparison.second for comparison in comparisons))
    return head, [[other, *(cells[other, keep] for keep in keeps)] for other in others]


def facts_of(report: SweepReport) -> str:
    """What was judged, how, and by what."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    layers = ",".join(map(str, report.layers))
    how = f"{report.precision} on {report.device}; {versions}"
    return f"{report.images:,} images of {report.data}; blocks {layers} reduce; {how}."


def markdown(report: SweepReport) -> str:
    """The report as a Markdown page."""
    parts = [
        f"# {report.model}: top-1 against cost",
        facts_of(report),
        _markdown_table(*result_table(report), left=2),
        LEGEND,
    ]
    if report.timed:
        parts.append(TIMING.format(batch_size=report.batch_size))
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
