"""What `compress` does to fine-tune: checks, the run with its table and log, and what is left when it ends early.

Imports torch: commands import this when they run, not before.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tokencut.cli import render
from tokencut.cli.finetune_options import FinetuneOptions
from tokencut.cli.finetune_view import RunView, log_for
from tokencut.cli.observer import CommandObserver
from tokencut.cli.options import DataOptions, RunOptions
from tokencut.cli.process import StopRequest
from tokencut.cli.subject import Subject, measure_accuracy
from tokencut.data.labels import classes_for
from tokencut.data.sources import Source
from tokencut.errors import ArtifactError, DataError, TokencutError
from tokencut.evaluation.accuracy import EvaluationReport
from tokencut.evaluation.statistics import if_known
from tokencut.files import check_writable, check_writable_folder
from tokencut.messages import quoted
from tokencut.model import CompressedModel
from tokencut.models import artifact
from tokencut.models.pretrained_cfg import description_of, label_names
from tokencut.runtime import extras
from tokencut.runtime.distributed import Group
from tokencut.training.run import TASK, finetune, training_classes
from tokencut.training.setup import FinetuneReport, TrainingSetup
from tokencut.training.state import check_state_folder, folder_for, has_state, remove_state
from tokencut.training.step import TrainingDivergedError
from tokencut.training.tensorboard_log import TensorboardLog


def check_run(output: Path, tuning: FinetuneOptions, *, force: bool) -> None:
    """Refuses what could not be done or would lose an earlier run, before any work is done.

    Raises:
        ArtifactError: There is one that was stopped, its log or its last good weights, and neither `--resume` nor
            `--force`; or something else is in the way.
        TokencutError: `--tensorboard` without tensorboard.
    """
    if tuning.tensorboard is not None:
        extras.require("--tensorboard needs", "tensorboard", extra="tensorboard")
    folder = folder_for(output)
    check_state_folder(folder)
    if has_state(folder) and not tuning.resume and not force:
        raise ArtifactError(f"{folder} holds a run that was stopped; add --resume to go on with it, or --force to start"
                            " again")  # fmt: skip
    for path in (log_for(output), last_good_for(output)):
        check_writable(path, force=force or bool(tuning.resume))
    if tuning.tensorboard is not None:
        check_writable_folder(curves_for(tuning.tensorboard, output), parents=True)
    if tuning.resume and not has_state(folder):
        render.note(f"there is nothing to resume in {folder}: starting at the first epoch")


def refuse_finished(output: Path, tuning: FinetuneOptions, *, force: bool) -> None:
    """Says how to train on what `--resume` finds finished.

    Raises:
        ArtifactError: The output is there, and no run that was stopped.
    """
    if tuning.resume and output.is_file() and not has_state(folder_for(output)) and not force:
        more = output.with_name(f"{output.stem}-2{output.suffix}")
        raise ArtifactError(f"{output} is finished, and there is nothing to resume; to train it further type tokencut "
                            f"compress {output} --train-data {tuning.train_data} -o {more}")  # fmt: skip


def last_good_for(output: Path) -> Path:
    """Where the weights before a loss that is no number go."""
    return output.with_name(f"{output.stem}-last-good.safetensors")


def curves_for(folder: Path, output: Path) -> Path:
    """The folder of a run's curves: named after the output, to tell runs apart."""
    return folder / output.stem


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
    judged = classes_for(model, val)
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
        force: Whether a run that cannot go on may start again.
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
    force: bool = False
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
            draw = stack.enter_context(render.live())
            advance = stack.enter_context(render.progress(TASK))
            view = stack.enter_context(closing(RunView(self.output, draw, advance, self.group, self._curves())))
            view.stop = stack.enter_context(StopRequest(lambda: render.note(
                f"stopping: the run is kept in {folder}, and the same command with --resume goes on; "
                "Ctrl-C again stops at once"
            )))  # fmt: skip
            try:
                report = finetune(
                    model, self.train, recipe=self.tuning.training_recipe(), setup=self.setup(), group=self.group,
                    state=folder, resume=bool(self.tuning.resume), force=self.force,
                    judge=self._judge(view) if self.val else None,
                    observer=view,
                )  # fmt: skip
            except KeyboardInterrupt:
                if self.group.main and has_state(folder):
                    render.note(f"the run is kept in {folder} as it was saved last; type the same command with "
                                "--resume to go on")  # fmt: skip
                raise
            except TrainingDivergedError as error:
                raise self._keep_last_good(model, error) from error
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

    def _curves(self) -> TensorboardLog | None:
        """Where the first process writes for TensorBoard."""
        if self.tuning.tensorboard is None or not self.group.main:
            return None
        return TensorboardLog(curves_for(self.tuning.tensorboard, self.output))

    def _judge(self, view: RunView) -> Any:
        if self.tuning.select == "best":  # epochs are judged by the images held out
            return None

        def judge(model: CompressedModel) -> float:
            self.judged = self.measure(model, "fine-tuned", view)
            return self.judged.top1

        return judge

    def measure(self, model: nn.Module, kind: str, observer: CommandObserver | None = None) -> EvaluationReport:
        """Evaluates a model on `--data`, on all processes together."""
        assert self.val is not None
        return measure_accuracy(
            model, f"{kind} {self.subject.name}", self.val, self.data, self.run, self.group.device, group=self.group,
            observer=observer,
        )  # fmt: skip

    def summary(self, report: FinetuneReport) -> dict[str, Any]:
        """What `--json` tells of the fine-tune."""
        held_out = None
        if (found := report.held_out) is not None:
            held_out = {
                "images": found.images, "before": found.before, "after": found.after, "kept": found.kept,
                "difference": found.difference.points, "standard_error": if_known(found.difference.standard_error),
            }  # fmt: skip
        return {
            "epochs": report.epochs, "chosen": report.chosen, "held_out": held_out, "log": str(log_for(self.output)),
        }  # fmt: skip

    def _keep_last_good(self, model: CompressedModel, error: TokencutError) -> TokencutError:
        path = last_good_for(self.output)  # outside the run's folder, which --force removes
        if self.group.main:
            artifact.save(model, path, force=True)
        return type(error)(f"{error}, and --force; the weights before that step are in {path}")

    def done(self) -> None:
        """Removes what only an unfinished run needs."""
        remove_state(folder_for(self.output))
