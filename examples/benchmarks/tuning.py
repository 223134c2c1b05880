"""A model made, fine-tuned and judged: one task of a benchmark."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokencut import compress, evaluate
from tokencut.data.sampling import strided_subset
from tokencut.data.sources import Source, Subset, hold_out, open_source
from tokencut.errors import UsageError
from tokencut.model import predicted_gmacs
from tokencut.models.loading import load_model
from tokencut.runtime.devices import describe_device, resolve_device
from tokencut.runtime.distributed import single_process
from tokencut.training.recipe import TrainingRecipe, recipe_named
from tokencut.training.run import finetune
from tokencut.training.setup import TrainingSetup

DENSE = "dense"
HOLD_OUT_SEED = 0


@dataclass(frozen=True)
class Settings:
    """What all results of a file share."""

    model: str
    train_data: str
    data: str | None
    held_out: int | None
    train_limit: int | None
    limit: int | None
    recipe: str
    epochs: int | None
    batch_size: int
    precision: str


@dataclass(frozen=True)
class Resources:
    """What a task may use, and where the state of its training is kept."""

    device: str
    workers: int | None
    threads: int
    folder: str


@dataclass(frozen=True)
class Task:
    """One model to judge.

    Attributes:
        method: How it is reduced; `dense` for not at all.
        keep: Its keep rate.
        seed: Of its fine-tune; off the shelf where None.
        changes: Fields of the recipe and their values.
        settings: What all tasks share.
        resources: What it may use.
    """

    method: str
    keep: float
    seed: int | None
    changes: tuple[tuple[str, Any], ...]
    settings: Settings = field(compare=False, repr=False)
    resources: Resources = field(compare=False, repr=False)

    @property
    def variant(self) -> str:
        """Method and changed recipe, in words."""
        return " ".join([self.method, *(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                                        for name, value in self.changes)])  # fmt: skip

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.variant} at {self.keep:g}, " + ("off the shelf" if self.seed is None else f"seed {self.seed}")

    @property
    def state(self) -> Path:
        """Where its training can go on."""
        return Path(self.resources.folder) / self.key.replace(" ", "_").replace(",", "")


def recipe_of(settings: Settings, changes: Sequence[tuple[str, Any]]) -> TrainingRecipe:
    """The recipe of a task.

    Raises:
        UsageError: There is no such field, or a value is out of range.
    """
    known = TrainingRecipe.__dataclass_fields__
    strangers = [name for name, _ in changes if name not in known]
    if strangers:
        raise UsageError(f"--grid {strangers[0]} is no part of a recipe, expected one of {', '.join(known)}")
    epochs = {} if settings.epochs is None else {"epochs": settings.epochs}
    return recipe_named(settings.recipe).changed(**{**epochs, **dict(changes)})


def carry_out(task: Task) -> dict[str, Any]:
    """Compresses, fine-tunes where that is wanted, and judges."""
    settings, given = task.settings, task.resources
    torch.set_num_threads(given.threads)
    method, keep = ("topk", 1.0) if task.method == DENSE else (task.method, task.keep)
    model = compress(loaded_once(settings.model), keep=keep, method=method)
    recipe = None if task.seed is None else recipe_of(settings, task.changes)
    setup = TrainingSetup(
        batch_size=settings.batch_size, workers=given.workers, precision=settings.precision, seed=task.seed or 0
    )
    if recipe is not None:
        Path(given.folder).mkdir(exist_ok=True)
    return tuned_and_judged(
        model, *_images(settings), recipe, setup, resolve_device(given.device), precision=settings.precision,
        limit=settings.limit, state=task.state,
    )  # fmt: skip


def tuned_and_judged(
    model: nn.Module, train: Source, judged: Source, recipe: TrainingRecipe | None, setup: TrainingSetup,
    device: torch.device, *, precision: str, limit: int | None, state: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tunes a model on all images, whatever comes of it, and judges it.

    Args:
        model: It is changed.
        train: Images to train on.
        judged: Images to judge by.
        recipe: How it is fine-tuned; not at all where None.
        setup: How training runs; evaluation takes its batches and workers.
        device: Where.
        precision: Of the evaluation.
        limit: Judge by an evenly spread sample of so many images.
        state: Where training keeps its state, and goes on from one that is there.

    Returns:
        `gmacs`, `device`, `top1` in percent, `loss`, `images`, `correct` (1 or 0 for each image), and where it was
        fine-tuned the `history` of that.
    """
    told: dict[str, Any] = {"gmacs": predicted_gmacs(model), "device": describe_device(device)}
    if recipe is not None:
        resumed = {} if state is None else {"state": state, "resume": True}
        setup = replace(setup, guard=False)
        told["history"] = finetune(
            model, train, recipe=recipe, setup=setup, group=single_process(device), **resumed
        ).history
    score = evaluate(
        model, judged, batch_size=setup.batch_size, workers=setup.workers, device=device, precision=precision,
        limit=limit,
    )  # fmt: skip
    correct = "".join("01"[hit] for hit in score.correct)
    return {**told, "top1": score.top1, "loss": score.loss, "images": score.images, "correct": correct}


@functools.lru_cache(maxsize=1)
def loaded_once(name: str) -> nn.Module:
    """A dense model by its name, for the tasks that a process carries out one after the other; to be copied."""
    return load_model(name).dense


@functools.lru_cache(maxsize=1)
def _images(settings: Settings) -> tuple[Source, Source]:
    """The images to train on, and those to judge by."""
    train = open_source(settings.train_data, split="train")
    if settings.held_out is None:
        assert settings.data is not None
        judged = open_source(settings.data)
    else:
        train, judged = hold_out(train, settings.held_out / len(train), HOLD_OUT_SEED)
    return Subset(train, strided_subset(len(train), settings.train_limit)), judged
