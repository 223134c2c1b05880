"""How a fine-tune runs beside its recipe, what it tells while it runs, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokencut.errors import UsageError
from tokencut.runtime.devices import check_batch_size
from tokencut.training.held_out import HeldOutComparison


@dataclass(frozen=True)
class TrainingSetup:
    """How a fine-tune runs, beside its recipe.

    Attributes:
        batch_size: Images a forward of each process.
        accumulate: Forwards that make one update.
        workers: Processes that decode images, for each process; one a processor, 4 at most, where None.
        precision: `fp32` or `bf16`.
        seed: Decides order, augmentation, dropout and what is held out.
        compiled: Whether to use `torch.compile`.
        select: `last` takes the last epoch, `best` the best one by images held out of the training images.
        guard: Whether to judge the model on held-out training images before and after, and to keep the weights from
            before where it got worse. Without effect with a new head, which knows nothing before.
        new_head: Whether the classifier starts from nothing, so that the teacher's logits mean nothing.
    """

    batch_size: int = 64
    accumulate: int = 1
    workers: int | None = None
    precision: str = "fp32"
    seed: int = 0
    compiled: bool = False
    select: str = "last"
    guard: bool = True
    new_head: bool = False

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        if self.accumulate < 1:
            raise UsageError(f"`accumulate={self.accumulate}` is too small, expected at least 1; type `accumulate=1`")
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"{self.workers} workers are too few, expected at least 0; type `workers=0`")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"training in {self.precision} is not supported, since its gradients underflow; type "
                             "`precision='bf16'`")  # fmt: skip
        if self.select not in ("last", "best"):
            raise UsageError(f"`select={self.select!r}` is not last or best; type `select='last'`")


@dataclass(frozen=True)
class TrainingProgress:
    """How far a fine-tune is.

    Attributes:
        epoch: The epoch, from 1 on.
        epochs: How many there are.
        step: Steps done in the epoch.
        steps: Steps an epoch.
        losses: `loss` and its terms per image, on average over the epoch so far.
        images_per_second: Trained on, over all processes, on average over the epoch so far.
        seconds_left: Estimated, for the whole run without its evaluations.
        updates: Steps done in the whole run.
        latest: As `losses`, of the last step alone.
        lr: The learning rate it has come to.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    losses: dict[str, float]
    images_per_second: float
    seconds_left: float
    updates: int
    latest: dict[str, float]
    lr: float


@dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tune came to.

    Attributes:
        finished: Whether it came to its end; otherwise its state was saved.
        epochs: Epochs in all.
        history: For each epoch done: `epoch`, `updates`, `lr`, `loss`, its terms, `images_per_second`, `seconds`, and
            `top1` where it was judged.
        chosen: The epoch whose weights were taken, from 1 on; 0 where those from before were kept.
        held_out: Before and after on held-out training images; None where that was not judged.
        notes: What a user should know.
    """

    finished: bool
    epochs: int
    history: tuple[dict[str, float], ...]
    chosen: int
    held_out: HeldOutComparison | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TrainingCallbacks:
    """Who is told how a fine-tune goes, and who may stop it.

    Attributes:
        on_start: Told the notes, before the first step.
        on_step: Told after each step.
        on_epoch: Told after each epoch, all the rows of the history so far.
        on_save: Told before the state is written: a run that is killed goes on from here.
        should_stop: Asked after each step.
    """

    on_start: Callable[[tuple[str, ...]], None] = lambda notes: None
    on_step: Callable[[TrainingProgress], None] = lambda progress: None
    on_epoch: Callable[[list[dict[str, float]]], None] = lambda history: None
    on_save: Callable[[], None] = lambda: None
    should_stop: Callable[[], bool] = lambda: False
