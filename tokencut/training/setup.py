"""How a fine-tune runs beside its recipe, what it tells while it runs, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass

from tokencut.errors import UsageError
from tokencut.limits import check_number
from tokencut.runtime.compiling import check_mode
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
        compile_mode: torch's mode for that. `reduce-overhead` also records CUDA graphs, so that a step of a small model
            takes what the GPU works, and not what the host takes to start it.
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
    compile_mode: str = "default"
    select: str = "last"
    guard: bool = True
    new_head: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "seed", *(() if self.workers is None else ("workers",))):
            check_number(name, getattr(self, name))
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"training in {self.precision} is not supported, since its gradients underflow; type "
                             "`precision='bf16'`")  # fmt: skip
        check_mode(self.compile_mode)
        if self.compile_mode != "default" and self.accumulate > 1:
            raise UsageError(f"`compile_mode={self.compile_mode!r}` records CUDA graphs, in which gradients have the "
                             f"same memory in each pass, so that `accumulate={self.accumulate}` has nothing to add to; "
                             "leave one of them out")  # fmt: skip
        if self.select not in ("last", "best"):
            raise UsageError(f"`select={self.select!r}` is not last or best; type `select='last'`")


@dataclass(frozen=True)
class FinetunePlan:
    """What a fine-tune would come to.

    Attributes:
        images: Training images, of one epoch.
        held_out: Training images that are held out to judge by.
        epochs: Epochs in all.
        updates: Updates in all.
        gmacs: Multiply-adds in all, in units of 1e9: a backward pass counted as two forward passes, the teacher's
            forward passes counted where there is one, evaluations not counted.
        seconds: How long it would take here, without evaluations, by a few steps that were made for it.
    """

    images: int
    held_out: int
    epochs: int
    updates: int
    gmacs: float
    seconds: float


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
