"""What a process does for claims.py: models made, fine-tuned and judged; sweeps; searches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tuning import tuned_and_judged

from reference.worklist import DENSE, Job, Search, Sweep, Task
from tokencut.data.sources import Source, open_source
from tokencut.errors import TokencutError
from tokencut.model import compress, predicted_gmacs
from tokencut.models.loading import load_model
from tokencut.runtime.devices import resolve_device
from tokencut.search.run import SearchSettings, find_schedule
from tokencut.search.targets import Target
from tokencut.sweeping.run import SweepPlan, sweep
from tokencut.sweeping.state import load_state
from tokencut.training.recipe import TrainingRecipe
from tokencut.training.setup import TrainingSetup


def keep_for(dense: nn.Module, reduction: Mapping[str, Any], percent: float) -> float:
    """The highest keep rate, in hundredths, that saves so many percent of the multiply-adds."""
    for hundredths in range(99, 0, -1):
        if predicted_gmacs(compress(dense, keep=hundredths / 100, **reduction)) <= (
            1 - percent / 100
        ) * predicted_gmacs(dense):
            return hundredths / 100
    raise TokencutError(f"no keep rate saves {percent:g} % of the multiply-adds")


def swept(job: Sweep, work: Path) -> dict[str, Any] | None:
    """What a sweep has found so far; None where it has not begun."""
    state = load_state(job.folder(work))
    if state is None:
        return None
    rows = [
        {"method": row.method, "keep": row.keep, "gmacs": row.gmacs, "top1": row.top1,
         "correct": "".join("01"[right] for right in row.correct)} for row in state.rows.values()
    ]  # fmt: skip
    return {"rows": rows, "whole": job.complete(rows)}


@dataclass(frozen=True)
class Judge:
    """Carries out jobs, holding what all of them share, so that a fine-tune begins at once.

    Attributes:
        folders: Those of the models, by label.
        train: Images to fine-tune on.
        val: Images to judge by.
        recipe: Of every fine-tune.
        batch: Images a batch.
        workers: Processes that decode images.
        device: Where it runs.
        precision: Of training; judging is in fp32.
        limit: Judge by an evenly spread sample of so many images.
        work: The folder for sweeps under way.
    """

    folders: Mapping[str, str]
    train: str
    val: str
    recipe: Mapping[str, float]
    batch: int
    workers: int
    device: str
    precision: str
    limit: int | None
    work: Path

    @cached_property
    def dense(self) -> dict[str, nn.Module]:
        """The models, by label."""
        return {label: load_model(f"local-dir:{folder}").dense for label, folder in self.folders.items()}

    @cached_property
    def sources(self) -> tuple[Source, Source]:
        """The images to fine-tune on, and those to judge by."""
        return open_source(self.train, split="train"), open_source(self.val)

    def __call__(self, job: Job) -> dict[str, Any]:
        """Carries out a job.

        Raises:
            TokencutError: It came to nothing.
        """
        began = time.perf_counter()
        try:
            if isinstance(job, Task):
                found = self.judged(job)
            else:
                found = self.swept(job) if isinstance(job, Sweep) else self.searched(job)
        except (torch.cuda.OutOfMemoryError, ValueError, TypeError) as error:
            raise TokencutError(f"{type(error).__name__}: {error}") from error
        return {**found, "seconds": time.perf_counter() - began}

    def judged(self, task: Task) -> dict[str, Any]:
        """Makes a model, fine-tunes it where epochs are asked for, and judges it in fp32."""
        dense, reduction, keep = self.dense[task.label], task.reduction(), task.keep
        if isinstance(keep, str):
            keep = keep_for(dense, reduction, float(keep.strip("-%")))
        model = compress(dense, keep=1.0 if task.method == DENSE else keep, layers=task.layers, **reduction)
        recipe = None
        if task.epochs:
            recipe = TrainingRecipe(
                epochs=task.epochs, lr_scaling="none", alpha=task.alpha, beta=task.beta, **self.recipe
            )
        setup = TrainingSetup(batch_size=self.batch, workers=self.workers, seed=task.seed, precision=self.precision)
        train, val = self.sources
        found = tuned_and_judged(model, train, val, recipe, setup, resolve_device(self.device), precision="fp32",
                                 limit=self.limit)  # fmt: skip
        images = {"classes": len(val.classes), "train_images": len(train)}
        # The keep rate as it came out, not as it was asked for.
        return {**asdict(task), **found, "keep": keep, "dense_gmacs": predicted_gmacs(dense), **images}

    def swept(self, job: Sweep) -> dict[str, Any]:
        """Judges methods and keep rates off the shelf."""
        plan = SweepPlan(
            job.methods, job.keeps, prop_attn=job.prop_attn, limit=self.limit, batch_size=self.batch,
            workers=self.workers, device=self.device, latency=False,
        )  # fmt: skip
        sweep(self.dense[job.label], self.sources[1], job.folder(self.work), plan, name=job.label)
        found = swept(job, self.work)
        assert found is not None
        return found

    def searched(self, job: Search) -> dict[str, Any]:
        """Searches, and judges what was found as it is and fine-tuned."""
        began, dense = time.perf_counter(), self.dense[job.label]
        settings = SearchSettings(batch_size=self.batch, workers=self.workers, device=self.device)
        target = Target(gmacs=job.gmacs(predicted_gmacs(dense)))
        schedule = find_schedule(dense, self.sources[0], target, settings=settings).found
        searching = time.perf_counter() - began
        task = Task(job.label, "bat", tuple(schedule.keep), layers=tuple(schedule.layers))
        shelf, tuned = (self.judged(replace(task, epochs=epochs)) for epochs in (0, job.epochs))
        return {"keep": list(schedule.keep), "layers": list(schedule.layers), "searching": searching,
                "shelf": shelf, "tuned": tuned}  # fmt: skip
