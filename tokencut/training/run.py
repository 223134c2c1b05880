"""The short fine-tune that wins back what compression lost, on one process or many, and that survives being killed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

from tokencut import cost
from tokencut.data.image_set import images_for
from tokencut.data.labels import ClassMap, classes_for, what_classes_are
from tokencut.data.loading import Batch, Loader, Unreadable
from tokencut.data.sources import Source, Subset, hold_out, open_source
from tokencut.errors import ArtifactError, DataError, UsageError
from tokencut.evaluation.distributed import evaluate_spread
from tokencut.messages import quoted
from tokencut.model import CompressedModel, predicted_macs, require_compressed, require_one_schedule
from tokencut.models.pretrained_cfg import require_head
from tokencut.models.quantized import refuse_quantized
from tokencut.observers import Observer, TrainingProgress
from tokencut.runtime.devices import resolve_device
from tokencut.runtime.distributed import Group, single_process
from tokencut.runtime.resume import weights_digest
from tokencut.training.held_out import CHOICE, HeldOutComparison, Right, compared, guard_size, top1_of
from tokencut.training.objective import ObjectiveSettings, without_teacher_logits
from tokencut.training.order import Augmented, Order, random_states_kept, training_loader
from tokencut.training.recipe import SHORT, TrainingRecipe
from tokencut.training.setup import FinetunePlan, FinetuneReport, TrainingSetup
from tokencut.training.state import Best, TrainingState, Weights, copy_of, damaged, has_state, load_state, save_state
from tokencut.training.step import Trainer, TrainingDivergedError, term_means

# A checkpoint is written at least this often, in seconds: an epoch of ImageNet may take hours.
SAVE_EVERY = 900.0
# Steps that a plan makes to know how long one takes.
REHEARSED = 4
# What another number of epochs comes from.
_MAY_GROW = ("epochs", "least_updates")
# What of the setup decides the result.
_OF_SETUP = ("batch_size", "accumulate", "seed", "precision", "compiled", "select")

# What observers are told that its steps are.
TASK = "fine-tuning"

Judge = Callable[[CompressedModel], float]


def finetune(
    model: CompressedModel,
    data: str | os.PathLike[str] | Source,
    *,
    recipe: TrainingRecipe = SHORT,
    setup: TrainingSetup | None = None,
    group: Group | None = None,
    state: Path | None = None,
    resume: bool = False,
    force: bool = False,
    judge: Judge | None = None,
    observer: Observer | None = None,
) -> FinetuneReport:
    """Fine-tunes a compressed model in place; afterwards it is in eval mode and where it was.

    Where there are enough training images, some are held out and judged before and after; a model that got worse on
    them gets its weights from before back, and a note says what to type.

    Args:
        model: What `compress` returned.
        data: The training images, as `open_source` takes them: a folder, an archive, a list, `digits`, or a source.
        recipe: What decides the result.
        setup: How it runs.
        group: The processes that train together; this one on the best device where None.
        state: A folder to keep the run's state in; none is kept where None.
        resume: Whether to go on with the state in that folder, if there is one. The number of epochs may be another
            than before: then the learning rate follows the schedule of the new number from here on.
        force: Whether to start again where that state is damaged or of another run.
        judge: Measures top-1 after each epoch, for the history alone.
        observer: Told how it goes, and asked after each step whether to stop: then the state is written.

    Returns:
        The report.

    Raises:
        DataError: The images cannot be found or read, or do not fit the model's classes.
        TrainingDivergedError: The loss is no longer finite; the model has the last good weights.
        UsageError: Arguments contradict each other.
        ArtifactError: The state cannot be written, read, or belongs to another run.
        TokencutError: A batch does not fit in memory.

    Example:
        >>> import tokencut
        >>> from tokencut.models.loading import load_model
        >>> from tokencut.training.recipe import SHORT
        >>> model = tokencut.compress(load_model("digits").model, keep=0.3)
        >>> setup = tokencut.TrainingSetup(workers=0)
        >>> report = tokencut.finetune(model, "digits", recipe=SHORT.changed(epochs=1), setup=setup)
        >>> report.finished, len(report.history)
        (True, 1)
    """
    setup = setup or TrainingSetup()
    group = group or single_process(resolve_device("auto"))
    model = require_compressed(model, "finetune")
    require_one_schedule(model, "finetune")
    require_head(model)
    refuse_quantized(model, "trained")
    home = next(model.parameters()).device
    model.to(group.device)
    try:
        with random_states_kept(group.device):
            source = open_source(data, split="train", observer=observer)
            run = _Run(model, source, recipe, setup, group, state, judge, observer or Observer(), force=force)
            return run.train(resume=resume)
    finally:
        model.to(home).eval()


def plan_finetune(
    model: CompressedModel,
    data: str | os.PathLike[str] | Source,
    *,
    recipe: TrainingRecipe = SHORT,
    setup: TrainingSetup | None = None,
    group: Group | None = None,
) -> FinetunePlan:
    """Tells what a fine-tune would come to here, by a few steps on a copy of the model; arguments as `finetune`'s.

    Raises:
        DataError: The images cannot be found or read, or do not fit the model's classes.
        UsageError: Arguments contradict each other.
        TokencutError: A batch does not fit in memory.
    """
    group = group or single_process(resolve_device("auto"))
    require_head(model)
    with random_states_kept(group.device):
        tried = copy.deepcopy(model).to(group.device)
        source = open_source(data, split="train")
        return _Run(tried, source, recipe, setup or TrainingSetup(), group, None, None, Observer()).plan()


def training_classes(source: Source, model: CompressedModel) -> ClassMap:
    """Which of the model's classes each class folder stands for.

    Raises:
        DataError: They do not fit, with the new head that would.
    """
    try:
        return classes_for(model, source)
    except DataError as error:
        count, classes = len(source.classes), model.num_classes
        if count == classes:
            raise
        found = f"{count} {what_classes_are(source.called, count)} ({quoted(source.classes)})"
        raise DataError(
            f"{source.name!r} has {found}, the model's head has {classes} classes; type `num_classes={count}` beside "
            "an architecture's name to train a new head"
        ) from error


class _Run:
    """A fine-tune from its first step to its last."""

    def __init__(
        self,
        model: CompressedModel,
        source: Source,
        recipe: TrainingRecipe,
        setup: TrainingSetup,
        group: Group,
        folder: Path | None,
        judge: Judge | None,
        observer: Observer,
        *,
        force: bool = False,
    ) -> None:
        self.model, self.recipe, self.setup, self.group = model, recipe, setup, group
        self.folder, self.judge, self.observer = folder, judge, observer
        self.force = force
        self.class_map = training_classes(source, model)
        self.notes: list[str] = []
        self.held: Subset | None = None
        self.source = source = self._hold_out(source)
        self.images = images_for(model, source, self.class_map)
        if self.images.prepared.frames is not None:
            raise UsageError("fine-tuning reads images, and this model takes clips; train what `tokencut.compress` "
                             "returns in a loop of your own: it is a module with timm's parameters")  # fmt: skip
        self.order = Order(len(source), setup.batch_size, setup.accumulate, setup.seed, group.rank, group.size)
        self.epochs = recipe.epochs_for(self.order.steps)
        self.notes += self.images.notes()
        self.settings = self._objective_settings()
        self.unreadable: dict[int, Unreadable] = {}
        self.conditions = self._conditions()

    @property
    def _guarded(self) -> bool:
        return self.held is not None and self.setup.guard and not self.setup.new_head

    def _hold_out(self, source: Source) -> Source:
        """Holds images out to judge by, where that is wanted and there are enough; those to train on."""
        setup, total = self.setup, len(source)
        if setup.select == "best":
            source, self.held = hold_out(source, CHOICE, setup.seed)
        elif setup.guard and not setup.new_head:
            count = guard_size(total)
            if count:
                source, self.held = hold_out(source, count / total, setup.seed)
                self.notes.append(f"{count:,} of {total:,} training images are held out, to know whether the fine-tune "
                                  "does harm")  # fmt: skip
            elif self.judge is None:
                self.notes.append(f"{total:,} training images are too few to hold some out, so it will not be known "
                                  "whether the fine-tune does harm; `data='DIR'` tells")  # fmt: skip
        return source

    def _objective_settings(self) -> ObjectiveSettings:
        wanted = self.recipe.objective
        if not self.setup.new_head or without_teacher_logits(wanted) == wanted:
            return wanted
        self.notes.append(
            "the head is new, so there are no logits to distil from: distillation is off; `distill='features'` takes "
            "the pooled tokens of the uncompressed model"
        )
        return without_teacher_logits(wanted)

    def _conditions(self) -> dict[str, str]:
        """What another run must share to go on with the state of this one."""
        images = hashlib.sha256()
        for index, folder in enumerate(Subset(self.source, range(len(self.source))).folders()):
            images.update(f"{self.source.filename(index)}:{self.class_map.targets[folder]};".encode(errors="replace"))
        # One by one, as an argument where it is one: an error names those that changed, and no others.
        trained = {name: value for name, value in dataclasses.asdict(self.recipe).items() if name not in _MAY_GROW}
        run = {name: getattr(self.setup, name) for name in _OF_SETUP}
        reduced = {name: value for name, value in self.model.recipe.to_json().items() if name != "stages"}
        given = {**trained, **run, **reduced}
        return {
            **{f"`{name}`": value if isinstance(value, str) else json.dumps(value) for name, value in given.items()},
            "number of processes": str(self.group.size),
            "model": weights_digest(self.model),
            "training images": f"{len(self.source)} images {images.hexdigest()[:16]}",
        }

    def _made_trainer(self) -> Trainer:
        return Trainer(
            self.model, self.recipe, self.settings, self.order, self.epochs, self.group,
            precision=self.setup.precision, new_head=self.setup.new_head,
            compile_mode=self.setup.compile_mode if self.setup.compiled else None,
        )  # fmt: skip

    def plan(self) -> FinetunePlan:
        """What the run would come to; makes a few of its steps."""
        self.trainer = self._made_trainer()
        try:
            seconds = self._seconds_a_step()
        finally:
            self.trainer.objective.close()
        updates = self.epochs * self.order.steps
        macs = 3 * cost.total(predicted_macs(self.model))
        if self.settings.distill != "none":
            macs += cost.total(predicted_macs(self.model.model))
        return FinetunePlan(
            len(self.source), 0 if self.held is None else len(self.held), self.epochs, updates,
            macs / 1e9 * updates * self.order.per_step, updates * seconds,
        )  # fmt: skip

    def _seconds_a_step(self) -> float:
        """How long a step takes, images included; the first, which loads and compiles, counts if it is alone."""
        taken = []
        with closing(iter(self._loader(0, 0))) as batches:
            self.model.train()
            for step in range(min(REHEARSED, self.order.steps)):
                began = time.perf_counter()
                self.trainer.step(0, step, map(self._checked, batches))
                taken.append(time.perf_counter() - began)
        return min(taken[1:] or taken)

    def _loader(self, epoch: int, step: int) -> Loader:
        images = self.images.dataset(is_training=True, **self.recipe.augmentation)
        return training_loader(
            Augmented(images, self.setup.seed), self.order, epochs=self.epochs, epoch=epoch, step=step,
            workers=self.setup.workers, pin_memory=self.group.device.type == "cuda",
        )  # fmt: skip

    def train(self, *, resume: bool) -> FinetuneReport:
        """Runs to the end, or until told to stop."""
        found = self._found() if resume else None
        original = copy_of(self.model.state_dict()) if self._guarded else {}
        self.trainer = self._made_trainer()
        try:
            state = self._start(found)
            for text in self.notes:
                self.observer.note(text)
            if found is None and self._guarded:
                state.before = self._right(self.model)
            finished = self._epochs(state)
        except TrainingDivergedError:
            self._save(state)
            raise
        finally:
            self.trainer.objective.close()
        chosen, held_out = self._take_result(state, original) if finished else (state.epoch, None)
        skipped = len(set().union(*self.group.all_gather(set(self.unreadable))))
        notes = [f"training images skipped, since they could not be decoded: {skipped}"] if skipped else []
        if held_out is not None and held_out.is_worse:
            notes.append(held_out.warning(self.recipe.lr))
        return FinetuneReport(finished, self.epochs, tuple(state.history), chosen, held_out, tuple(notes))

    def _found(self) -> TrainingState | None:
        """The state in the folder, if there is one; none with `force`, where it is of no use."""
        if self.folder is None or not self.group.broadcast(has_state(self.folder)):
            return None
        return self.group.broadcast(self._loaded(self.folder) if self.group.main else None)

    def _loaded(self, folder: Path) -> TrainingState | None:
        try:
            found = load_state(folder, self.conditions)
            if (found.epoch, found.step) > (self.epochs, 0) or found.step > self.order.steps:
                at = f"epoch {found.epoch + 1}, step {found.step + 1}"
                raise ArtifactError(f"{folder} holds a run that is at {at}, and this one has {self.epochs} epochs; "
                                    f"type `epochs={found.epoch + 1}` or more, or `force=True` to start again"
                                    )  # fmt: skip
        except ArtifactError as error:
            if not self.force:
                raise
            self.notes.append(f"{str(error).rpartition(';')[0]}: starting again, as `force=True` says")
            return None
        return found

    def _start(self, found: TrainingState | None) -> TrainingState:
        """The state to begin with: the one found, with which the trainer goes on, or a new one."""
        if found is None:
            return TrainingState(self.conditions, 0, 0, {}, {}, epochs=self.epochs)
        updates = found.epoch * self.order.steps + found.step
        try:
            self.trainer.restore(found.model, found.optimizer, found.ema, updates)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:  # as torch has it
            raise damaged(self.folder or Path(), "its tensors are not those of this model") from error
        if found.epoch == self.epochs:
            self.notes.append(f"all {self.epochs} epochs are done")
        else:
            self.notes.append(f"going on at epoch {found.epoch + 1}, step {found.step + 1}")
        if found.epochs != self.epochs:
            self.notes.append(f"the run was started with {found.epochs} epochs and has {self.epochs} now: from here on "
                              f"the learning rate follows the schedule of {self.epochs}")  # fmt: skip
        found.epochs = self.epochs
        return found

    def _epochs(self, state: TrainingState) -> bool:
        """Trains until the end, or until told to stop: then it is not finished."""
        loader = self._loader(state.epoch, state.step)
        saved = time.monotonic()
        self.model.train()
        with closing(iter(loader)) as batches:
            while state.epoch < self.epochs:
                while state.step < self.order.steps:
                    stopped = not self._step(state, batches)
                    if stopped or self.group.any(self.observer.should_stop()):
                        self._save(state)
                        return False
                    if time.monotonic() - saved > SAVE_EVERY:
                        self._save(state)
                        saved = time.monotonic()
                self._end_epoch(state)
                saved = time.monotonic()
        return True

    def _step(self, state: TrainingState, batches: Generator[Batch, None, None]) -> bool:
        """One step; False where the processes that load images went down with a request to stop."""
        began = time.perf_counter()
        try:
            sums = self.trainer.step(state.epoch, state.step, map(self._checked, batches))
        except DataError:
            if self.group.size == 1 and self.observer.should_stop():
                return False
            raise
        state.step += 1
        for name, value in {**sums, "seconds": time.perf_counter() - began}.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
        now = self._progress(state, sums)
        values = {"epoch": now.epoch, **now.losses, "images_per_second": now.images_per_second,
                  "seconds_left": now.seconds_left}  # fmt: skip
        self.observer.progress(TASK, now.updates, self.epochs * self.order.steps, values)
        self.observer.step(now)
        return True

    def _checked(self, batch: Batch) -> Batch:
        self.unreadable |= {image.index: image for image in batch.unreadable}
        self.images.check_unreadable(self.unreadable.values())
        return batch

    def _progress(self, state: TrainingState, latest: dict[str, float]) -> TrainingProgress:
        rate = state.sums["images"] / max(state.sums["seconds"], 1e-9)
        left = (self.epochs - state.epoch) * self.order.steps - state.step
        seconds = left * self.order.per_step / max(rate, 1e-9)
        return TrainingProgress(
            state.epoch + 1, self.epochs, state.step, self.order.steps, term_means(state.sums), rate, seconds,
            updates=state.epoch * self.order.steps + state.step, latest=term_means(latest), lr=self.trainer.lr,
        )  # fmt: skip

    def _end_epoch(self, state: TrainingState) -> None:
        """Judges, logs and saves an epoch."""
        sums, number = state.sums, state.epoch + 1
        row: dict[str, float] = {"epoch": number, "updates": number * self.order.steps, "lr": self.trainer.lr}
        row |= term_means(sums)
        row |= {"images_per_second": sums["images"] / max(sums["seconds"], 1e-9), "seconds": sums["seconds"]}
        if self.setup.select == "best" or self.judge is not None:
            self._save(state)  # judging takes long, and may be interrupted: the next run begins with it
        if self.setup.select == "best":
            right = self._right(self.trainer.result)
            row["top1"] = top1_of(right)
            if state.best is None or row["top1"] > top1_of(state.best.right):
                state.best = Best(number, right, copy_of(self.trainer.result.state_dict()))
        elif self.judge is not None:
            row["top1"] = self.judge(self.trainer.result)
        self.model.train()
        state.history.append(row)
        state.epoch, state.step, state.sums = number, 0, {}
        # Told first: a run killed before it is saved does, and tells, all of it again.
        self.observer.epoch(state.history)
        self._save(state)

    def _right(self, model: CompressedModel) -> Right:
        """Which of the held-out images a model is right on."""
        assert self.held is not None
        report = evaluate_spread(
            self.group, model, self.held, batch_size=self.setup.batch_size, workers=self.setup.workers,
            precision=self.setup.precision, observer=self.observer,
        )  # fmt: skip
        return dict(zip(report.numbers, report.correct, strict=True))

    def _save(self, state: TrainingState) -> None:
        if self.folder is None or not self.group.main:
            return
        state.model, state.optimizer = self.model.state_dict(), self.trainer.optimizer.state_dict()
        state.ema = self.trainer.ema.module.state_dict() if self.trainer.ema else None
        self.observer.saving()
        save_state(self.folder, state)

    def _take_result(self, state: TrainingState, original: Weights) -> tuple[int, HeldOutComparison | None]:
        """Gives the model its final weights: the epoch they are of, and how they compare to those from before."""
        epoch = self.epochs
        if state.best is not None:
            self.model.load_state_dict(dict(state.best.weights))
            epoch = state.best.epoch
        elif self.trainer.ema:
            self.model.load_state_dict(self.trainer.ema.module.state_dict())
        if state.before is None or not self._guarded:
            return epoch, None
        found = compared(state.before, self._right(self.model) if state.best is None else state.best.right)
        if found.is_worse:
            self.model.load_state_dict(dict(original))
        return (0 if found.is_worse else epoch), found
