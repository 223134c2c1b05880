"""What `compress` does to fine-tune: checks, the run with its table and log, and what is left when it ends early.

Imports torch: commands import this when they run, not before.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tokencut import artifact
from tokencut.cli import render
from tokencut.cli.finetune_options import FinetuneOptions
from tokencut.cli.options import DataOptions, RunOptions
from tokencut.cli.process import StopRequest
from tokencut.cli.subject import Subject, measure_accuracy
from tokencut.compression import CompressedModel
from tokencut.description import description_of
from tokencut.distributed import Group
from tokencut.errors import ArtifactError, DataError, TokencutError
from tokencut.evaluation import EvaluationReport
from tokencut.files import atomic_write
from tokencut.finetuning import finetune, training_classes
from tokencut.labels import label_names, map_classes, quoted
from tokencut.sources import Source
from tokencut.training_setup import FinetuneReport, TrainingProgress, TrainingSetup, Watcher
from tokencut.training_state import folder_for, has_state, remove_state
from tokencut.training_step import TERMS, TrainingDivergedError

COLUMNS = ("epoch", "updates", "lr", "loss", *TERMS, "top1", "images_per_second", "seconds")
# Rows of the live table: more would not fit on a screen.
SHOWN = 12


def log_for(output: Path) -> Path:
    """The log beside an output: `out.log.csv`."""
    return output.with_suffix(".log.csv")


def check_run(output: Path, tuning: FinetuneOptions, *, force: bool) -> None:
    """Refuses to lose an earlier run, before any work is done.

    Raises:
        ArtifactError: There is one that was stopped, and neither `--resume` nor `--force`.
    """
    folder = folder_for(output)
    if has_state(folder) and not tuning.resume and not force:
        raise ArtifactError(f"{folder} holds a run that was stopped; add --resume to go on with it, or --force to start"
                            " again")  # fmt: skip
    if tuning.resume and not has_state(folder):
        render.note(f"there is nothing to resume in {folder}: starting at the first epoch")


def fit_classes(subject: Subject, train: Source, val: Source | None) -> None:
    """Checks that the images fit the model and each other, and names the classes of a new head after the folders.

    Raises:
        DataError: They do not.
    """
    model = subject.model
    assert isinstance(model, CompressedModel)
    classes = training_classes(train, model)
    if subject.new_head and label_names(model) is None:
        for owner in (model.model, subject.dense):
            cfg = {**description_of(owner), "label_names": list(classes.class_names)}
            owner.pretrained_cfg = owner.default_cfg = cfg
    if val is None or set(val.classes) <= set(train.classes):
        return
    judged = map_classes(val.classes, label_names(model), model.num_classes)
    known = set(classes.targets)
    strangers = [name for name, target in zip(val.classes, judged.targets, strict=True) if target not in known]
    if judged.class_names != classes.class_names or strangers:
        names = strangers or sorted(set(val.classes) - set(train.classes))
        raise DataError(f"--data {val.name!r} has classes that --train-data {train.name!r} has not: {quoted(names)}; "
                        "give two folders with the same classes")  # fmt: skip


@dataclass
class FinetuneRun:
    """A fine-tune for `compress`.

    Attributes:
        subject: The model.
        output: The file that is to be written.
        tuning: How it is trained, as typed.
        train: The training images, where it is to be trained.
        val: The images of `--data`, if given.
        data: How images are loaded.
        run: Where it runs.
        group: The processes.
        judged: The last report on `val`.
    """

    subject: Subject
    output: Path
    tuning: FinetuneOptions
    train: Source | None
    val: Source | None
    data: DataOptions
    run: RunOptions
    group: Group
    judged: EvaluationReport | None = None

    def setup(self) -> TrainingSetup:
        """How it runs."""
        return self.tuning.training_setup(
            batch_size=self.run.batch_size, workers=self.data.workers, precision=self.run.precision, seed=self.run.seed,
            new_head=self.subject.new_head,
        )  # fmt: skip

    def train_model(self) -> FinetuneReport:
        """Fine-tunes the model in place.

        Raises:
            KeyboardInterrupt: It was told to stop, and has saved its state.
            TokencutError: It cannot be done.
        """
        model, folder = self.subject.model, folder_for(self.output)
        assert isinstance(model, CompressedModel)
        assert self.train is not None
        if self.group.main and not self.tuning.resume:
            remove_state(folder)
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            view = stack.enter_context(render.live())
            watcher = _View(self.output, view, self.group).watcher(stop)
            try:
                report = finetune(
                    model, self.train, recipe=self.tuning.training_recipe(), setup=self.setup(), group=self.group,
                    state=folder, resume=bool(self.tuning.resume), judge=self._judge() if self.val else None,
                    watcher=watcher,
                )  # fmt: skip
            except TrainingDivergedError as error:
                raise self._keep_last_good(model, folder, error) from error
            except TokencutError as error:
                if not self.group.main and sys.__stderr__ is not None:  # else nobody would say it
                    sys.__stderr__.write(f"error: process {self.group.rank}: {error}\n")
                raise
        if not report.finished:
            render.note(f"the run is kept in {folder}; type the same command with --resume to go on")
            raise KeyboardInterrupt
        for text in report.notes:
            render.note(text)
        return report

    def _judge(self) -> Any:
        if self.tuning.select == "best":  # epochs are judged by the images held out
            return None

        def judge(model: CompressedModel) -> float:
            self.judged = self.measure(model, "fine-tuned")
            return self.judged.top1

        return judge

    def measure(self, model: nn.Module, kind: str) -> EvaluationReport:
        """Evaluates a model on `--data`, on all processes together."""
        assert self.val is not None
        return measure_accuracy(
            model, f"{kind} {self.subject.name}", self.val, self.data, self.run, self.group.device, group=self.group
        )

    def summary(self, report: FinetuneReport) -> dict[str, Any]:
        """What `--json` tells of the fine-tune."""
        return {"epochs": report.epochs, "chosen": report.chosen, "log": str(log_for(self.output))}

    def _keep_last_good(self, model: CompressedModel, folder: Path, error: TokencutError) -> TokencutError:
        path = folder / "last-good.safetensors"
        if self.group.main:
            artifact.save(model, path, force=True)
        return type(error)(f"{error}, and --force; the weights before that step are in {path}")

    def done(self) -> None:
        """Removes what only an unfinished run needs."""
        remove_state(folder_for(self.output))


class _View:
    """The table on a terminal, the lines elsewhere, and the log."""

    def __init__(self, output: Path, draw: Any, group: Group) -> None:
        self.log = log_for(output)
        self.draw = draw
        self.main = group.main
        self.rows: list[dict[str, float]] = []

    def watcher(self, stop: StopRequest) -> Watcher:
        return Watcher(
            on_start=self.on_start,
            on_step=self.on_step,
            on_epoch=self.on_epoch,
            should_stop=lambda: stop.requested,
        )

    def on_start(self, notes: tuple[str, ...]) -> None:
        for text in notes:
            render.note(text)

    def on_step(self, now: TrainingProgress) -> None:
        if self.main and render.on_terminal():
            current = {"epoch": now.epoch, **now.losses, "images_per_second": now.images_per_second}
            left = f"{now.step}/{now.steps}, {duration(now.seconds_left)} left"
            self.draw(_table([*self.rows, current], now.epochs, left))

    def on_epoch(self, history: list[dict[str, float]]) -> None:
        self.rows = list(history)
        if not self.main:
            return
        if not render.on_terminal():
            render.note(_line(history[-1]))
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
