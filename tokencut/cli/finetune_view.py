"""What people see of a fine-tune while it runs: the table on a terminal, lines elsewhere, the log, and curves.

Imports torch: commands import this when they run, not before.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokencut.cli import render
from tokencut.cli.observer import CommandObserver
from tokencut.cli.process import StopRequest
from tokencut.errors import ArtifactError
from tokencut.files import atomic_write
from tokencut.observers import TrainingProgress
from tokencut.runtime.distributed import Group
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
        self, output: Path, draw: Any, stop: StopRequest, group: Group, curves: TensorboardLog | None = None
    ) -> None:
        """Prepares a view.

        Args:
            output: The file that is to be written.
            draw: Draws the table, as `render.live` gives it.
            stop: Says whether to stop.
            group: The processes.
            curves: For TensorBoard, where that was asked for.
        """
        super().__init__(stop=stop)
        self.log = log_for(output)
        self.draw = draw
        self.main = group.main
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

    def saving(self) -> None:
        """Writes the curves up to where a run that is killed goes on."""
        self._curve(lambda curves: curves.flush())

    def step(self, now: TrainingProgress) -> None:
        """Draws the table, and adds to the curves."""
        self._curve(lambda curves: curves.add("train", {**now.latest, "lr": now.lr}, now.updates))
        if self.main and render.on_terminal():
            current = {"epoch": now.epoch, **now.losses, "images_per_second": now.images_per_second}
            left = f"{now.step}/{now.steps}, {duration(now.seconds_left)} left"
            self.draw(_table([*self.rows, current], now.epochs, left))

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


def duration(seconds: float) -> str:
    """A time as people say it: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _line(row: dict[str, float]) -> str:
    losses = ", ".join(f"{name} {row[name]:.4f}" for name in ("loss", *TERMS) if name in row)
    top1 = f", top-1 {row['top1']:.2f} %" if "top1" in row else ""
    return f"epoch {row['epoch']:.0f}: {losses}{top1}, {row['images_per_second']:.0f} images/s"


def _table(rows: Sequence[dict[str, float]], epochs: int, left: str) -> render.RenderableType:
    terms = [name for name in ("loss", *TERMS) if name in rows[-1]]
    cells = [
        [
            f"{row['epoch']:.0f}/{epochs}",
            *(f"{row[name]:.4f}" if name in row else "" for name in terms),
            f"{row['top1']:.2f} %" if "top1" in row else "",
            f"{row['images_per_second']:.0f}",
            duration(row["seconds"]) if "seconds" in row else left,
        ]
        for row in rows[-SHOWN:]
    ]
    return render.table(("epoch", *terms, "top-1", "images/s", "time"), cells)
