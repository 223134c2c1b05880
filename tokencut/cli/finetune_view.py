"""What people see of a fine-tune while it runs: the table on a terminal, lines elsewhere, the log, and curves.

Imports torch: commands import this when they run, not before.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokencut.cli import render
from tokencut.cli.observer import CommandObserver
from tokencut.cli.progress import duration
from tokencut.errors import ArtifactError
from tokencut.files import atomic_write
from tokencut.observers import TrainingProgress
from tokencut.runtime.distributed import Group
from tokencut.training.run import TASK
from tokencut.training.step import TERMS
from tokencut.training.tensorboard_log import TensorboardLog

COLUMNS = ("epoch", "updates", "lr", "loss", *TERMS, "top1", "images_per_second", "seconds")
# Rows of the live table: more would not fit on a screen.
SHOWN = 12


def log_for(output: Path) -> Path:
    """The log beside an output: `out.log.csv`."""
    return output.with_suffix(".log.csv")


class RunView(CommandObserver):
    """The table on a terminal, the lines elsewhere, the log, and the curves; of the first process alone."""

    def __init__(
        self, output: Path, draw: Any, advance: render.Advance, group: Group, curves: TensorboardLog | None = None
    ) -> None:
        """Prepares a view.

        Args:
            output: The file that is to be written.
            draw: Draws the table, as `render.live` gives it.
            advance: Shows how far the run is, as `render.progress` gives it.
            group: The processes.
            curves: For TensorBoard, where that was asked for.
        """
        super().__init__(advance)
        self.log = log_for(output)
        self.draw = draw
        self.main, self.alone = group.main, group.size == 1
        self.curves = curves
        self.rows: list[dict[str, float]] = []

    def close(self) -> None:
        """Ends what is written all along."""
        self._curve(lambda curves: curves.close())

    def _curve(self, write: Callable[[TensorboardLog], None]) -> None:
        """Writes to the curves; a disk that is full ends them, and not the run."""
        if self.curves is None:
            return
        try:
            write(self.curves)
        except ArtifactError as error:
            self.curves = None
            render.note(f"no more curves are written: {error}")

    def progress(self, task: str, done: float, total: float, values: Mapping[str, float]) -> None:
        """Shows how far it is; a request to stop ends an evaluation, before which the state was saved."""
        super().progress(task, done, total, values)
        if task != TASK and self.alone and self.should_stop():
            raise KeyboardInterrupt

    def saving(self) -> None:
        """Writes the curves up to where a run that is killed goes on."""
        self._curve(lambda curves: curves.flush())

    def step(self, now: TrainingProgress) -> None:
        """Draws the table, and adds to the curves."""
        self._curve(lambda curves: curves.add("train", {**now.latest, "lr": now.lr}, now.updates))
        if self.main and render.on_terminal():
            current = {"epoch": now.epoch, **now.losses, "images_per_second": now.images_per_second}
            self.draw(partial(_table, [*self.rows, current], now.epochs))

    def epoch(self, history: list[dict[str, float]]) -> None:
        """Prints a line, writes the log anew, and adds to the curves."""
        self.rows = list(history)
        if not self.main:
            return
        row = history[-1]
        measured = {name: row[name] for name in COLUMNS[3:] if name in row}
        self._curve(lambda curves: curves.add("epoch", measured, int(row["updates"])))
        if not render.on_terminal():
            render.note(_line(row))
        with atomic_write(self.log) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS, restval="")
            table.writeheader()
            table.writerows(history)


def _line(row: dict[str, float]) -> str:
    losses = ", ".join(f"{name} {row[name]:.4f}" for name in ("loss", *TERMS) if name in row)
    top1 = f", top-1 {row['top1']:.2f} %" if "top1" in row else ""
    return f"epoch {row['epoch']:.0f}: {losses}{top1}, {row['images_per_second']:.0f} images/s"


def _table(rows: Sequence[dict[str, float]], epochs: int, columns: int) -> render.RenderableType:
    """The last epochs, the one under way among them: the loss without its terms where these do not fit."""
    terms = [name for name in ("loss", *TERMS) if name in rows[-1]]
    head, cells = _cells(rows, epochs, terms)
    if render.table_width(head, cells) > columns:
        head, cells = _cells(rows, epochs, terms[:1])
    return render.table(head, cells)


def _cells(
    rows: Sequence[dict[str, float]], epochs: int, terms: Sequence[str]
) -> tuple[tuple[str, ...], list[list[str]]]:
    judged = any("top1" in row for row in rows)
    cells = [
        [
            f"{row['epoch']:.0f}/{epochs}",
            *(f"{row[name]:.4f}" if name in row else "" for name in terms),
            *([f"{row['top1']:.2f} %" if "top1" in row else ""] if judged else []),
            f"{row['images_per_second']:.0f}",
            duration(row["seconds"]) if "seconds" in row else "",
        ]
        for row in rows[-SHOWN:]
    ]
    return ("epoch", *terms, *(["top-1"] if judged else []), "images/s", "time"), cells
