"""The table of a timing script: its rows, line by line as they come, and medians over several processes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One model in one form, timed beside the dense model in the same form.

    Attributes:
        model: `dense`, or a method and its keep rate.
        form: `eager`, `compiled (MODE)` or `onnxruntime`.
        batch: Images in a forward.
        tokens: Image tokens entering the first block.
        gmacs: Multiply-adds per image, in units of 1e9.
        stage_gmacs: Those of the stages among them.
        flops_ratio: The dense model's over the model's.
        ms: Of one batch, the median over rounds; over processes the median of those.
        ms_spread: The quartiles over rounds; over processes the lowest and the highest.
        speedup: How many times as fast as the dense model beside it.
        speedup_spread: As `ms_spread`.
        stage_share: The share of a forward spent inside the stages, 0 to 1; None where it is not known.
        memory_mib: Memory held at the peak of a forward, weights included; None where it is not known.
    """

    model: str
    form: str
    batch: int
    tokens: int
    gmacs: float
    stage_gmacs: float
    flops_ratio: float
    ms: float
    ms_spread: tuple[float, float]
    speedup: float = 1.0
    speedup_spread: tuple[float, float] = (1.0, 1.0)
    stage_share: float | None = None
    memory_mib: float | None = None

    @property
    def kept(self) -> float:
        """The speed-up divided by the FLOPs ratio: 1 where seconds fall as far as FLOPs."""
        return self.speedup / self.flops_ratio

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What the row is of, the same in every process."""
        return self.model, self.form, self.batch, self.tokens


Columns = Mapping[str, Callable[[Row], str]]


def plus_minus(row: Row) -> str:
    """Half of the spread of the milliseconds, in percent of them."""
    low, high = row.ms_spread
    return f"± {50 * (high - low) / row.ms:.1f} %"


def between(row: Row) -> str:
    """The spread of the speed-up; nothing for the dense model itself."""
    return "" if row.model == "dense" else f"{row.speedup_spread[0]:.2f} to {row.speedup_spread[1]:.2f}"


def percent(share: float | None) -> str:
    """A share as a cell; nothing where it is not known."""
    return "" if share is None else f"{100 * share:.1f} %"


# What a model is beside the dense one.
BESIDE_DENSE: Columns = {
    "speed-up": lambda row: f"{row.speedup:.2f}",
    "spread": between,
    "FLOPs ratio": lambda row: f"{row.flops_ratio:.2f}",
    "kept": lambda row: f"{row.kept:.2f}",
    "stages": lambda row: percent(row.stage_share),
}

Measured = Callable[[Callable[[str], None]], Iterable[Row]]


def publish(args: argparse.Namespace, columns: Columns, title: str, measured: Measured) -> list[Row]:
    """Prints a table, line by line as the rows come, and writes it where it was asked for.

    Args:
        args: The script's options.
        columns: How each column's cells are made.
        title: The line above.
        measured: Makes the rows; is given what to call with a note, such as what could not be timed.

    Returns:
        The rows.
    """
    rows: list[Row] = []
    notes: list[str] = []
    lines = [title, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    print(*lines, sep="\n", flush=True)
    for row in measured(notes.append):
        rows.append(row)
        lines.append(f"| {' | '.join(cell(row) for cell in columns.values())} |")
        print(lines[-1], flush=True)
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
        print(*lines[-len(notes) - 1 :], sep="\n", flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if args.rows_to:
        values = {"rows": [dataclasses.asdict(row) for row in rows], "notes": notes}
        args.rows_to.write_text(json.dumps(values), encoding="utf-8")
    return rows


def in_processes(count: int, command: Sequence[str], note: Callable[[str], None]) -> list[Row]:
    """Runs a benchmark several times, each in a process of its own, and takes medians.

    Where memory lies, and so how fast a model is, differs from process to process by more than from round to round.

    Args:
        count: How many processes, one after the other; what they print goes to stderr.
        command: Its command line; `--processes 1` and `--rows-to` are added.
        note: Told each process's notes, once.

    Returns:
        The merged rows.

    Raises:
        SystemExit: One of them failed.
    """
    runs: list[list[Row]] = []
    notes: dict[str, None] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, count + 1):
            print(f"process {number} of {count}", file=sys.stderr, flush=True)
            report = Path(folder, f"{number}.json")
            once = [*command, "--processes", "1", "--rows-to", str(report)]
            if subprocess.run(once, check=False, stdout=sys.stderr).returncode:
                raise SystemExit(f"error: process {number} of {count} failed, as said above")
            values = json.loads(report.read_text(encoding="utf-8"))
            runs.append([row_from(entry) for entry in values["rows"]])
            notes |= dict.fromkeys(values["notes"])
    for text in notes:
        note(text)
    return merged(runs)


def row_from(values: Mapping[str, Any]) -> Row:
    """A row as JSON has it."""
    spreads = {name: tuple(values[name]) for name in ("ms_spread", "speedup_spread")}
    return Row(**{**values, **spreads})


def merged(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of several runs as one: medians, and the lowest and highest as spread."""
    found: dict[tuple[str, str, int, int], list[Row]] = {}
    for row in (row for run in runs for row in run):
        found.setdefault(row.key, []).append(row)
    return [_median(rows) for rows in found.values()]


def _median(rows: Sequence[Row]) -> Row:
    def middle(name: str) -> float | None:
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        return statistics.median(values) if values else None

    times, ratios = [row.ms for row in rows], [row.speedup for row in rows]
    return dataclasses.replace(
        rows[0],
        ms=statistics.median(times),
        ms_spread=(min(times), max(times)),
        speedup=statistics.median(ratios),
        speedup_spread=(min(ratios), max(ratios)),
        stage_share=middle("stage_share"),
        memory_mib=middle("memory_mib"),
    )
