"""One fine-tune of the benchmark and its evaluation, and the file that keeps what was found."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import tokencut
from tokencut import compress, cost, evaluate
from tokencut.data.sampling import evenly_spread
from tokencut.data.sources import Part, Source, hold_out, open_source
from tokencut.errors import TokencutError, UsageError
from tokencut.files import atomic_write
from tokencut.model import predicted_macs
from tokencut.models.loading import load_model
from tokencut.runtime.devices import describe_device, resolve_device
from tokencut.runtime.distributed import alone
from tokencut.training.recipe import TrainingRecipe, recipe_named
from tokencut.training.run import finetune
from tokencut.training.setup import TrainingSetup
from tokencut.training.state import remove_state

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
    device = resolve_device(given.device)
    method, keep = ("topk", 1.0) if task.method == DENSE else (task.method, task.keep)
    model = compress(_dense(settings.model), keep=keep, method=method)
    train, judged = _images(settings)
    told: dict[str, Any] = {"gmacs": cost.total(predicted_macs(model)) / 1e9, "device": describe_device(device)}
    if task.seed is not None:
        setup = TrainingSetup(
            batch_size=settings.batch_size, workers=given.workers, precision=settings.precision, seed=task.seed
        )
        Path(given.folder).mkdir(exist_ok=True)
        report = finetune(
            model, train, recipe=recipe_of(settings, task.changes), setup=setup, group=alone(device), state=task.state,
            resume=True,
        )  # fmt: skip
        told |= {"history": report.history}
    score = evaluate(
        model, judged, batch_size=settings.batch_size, workers=given.workers, device=device,
        precision=settings.precision, limit=settings.limit,
    )  # fmt: skip
    return {**told, "top1": score.top1, "loss": score.loss, "correct": "".join("01"[hit] for hit in score.correct)}


@functools.lru_cache(maxsize=1)
def _dense(name: str) -> nn.Module:
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
    return Part(train, evenly_spread(len(train), settings.train_limit)), judged


class Results:
    """What was found so far, in a JSON file that is whole at any moment."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Opens the file, or begins one.

        Raises:
            UsageError: It holds the results of other settings.
            TokencutError: It cannot be read.
        """
        self.path = path
        versions = {"torch": torch.__version__, "timm": timm.__version__, "tokencut": tokencut.__version__}
        self._versions = versions
        self.content: dict[str, Any] = {"settings": asdict(settings), "versions": dict(versions), "rows": {}}
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            held, self.content["rows"] = found["settings"], dict(found["rows"])
            self.content["versions"] = {**versions, **found["versions"]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise TokencutError(f"cannot read {path}: {error}; give another -o") from error
        others = [name for name, value in asdict(settings).items() if held.get(name) != value]
        if others:
            option = "model" if others[0] == "model" else "--" + others[0].replace("_", "-")
            raise UsageError(f"{path} holds results of another {option} ({held.get(others[0])}); give another -o")

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """What was found, by the task's key."""
        rows: dict[str, dict[str, Any]] = self.content["rows"]
        return rows

    def add(self, task: Task, found: dict[str, Any]) -> None:
        """Keeps a result, and lets go of the training's state."""
        self.rows[task.key] = found
        held = self.content["versions"]
        for name, version in self._versions.items():
            if version not in held[name].split(" and "):
                held[name] += f" and {version}"
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=1) + os.linesep, encoding="utf-8")
        remove_state(task.state)
