"""A process that makes, fine-tunes and judges models for claims.py: requests and results are lines of JSON.

It holds what all of them share (the dense models, the list of images), so that a fine-tune begins at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

import torch
from torch import nn
from worklist import DENSE, Task

from tokencut import cost
from tokencut.data.sources import open_source
from tokencut.errors import TokencutError
from tokencut.evaluation.accuracy import evaluate
from tokencut.model import compress, predicted_macs
from tokencut.models.loading import load_model
from tokencut.runtime.devices import describe_device, resolve_device
from tokencut.runtime.distributed import alone
from tokencut.training.recipe import TrainingRecipe
from tokencut.training.run import finetune
from tokencut.training.setup import TrainingSetup


def macs(model: nn.Module) -> int:
    """Multiply-adds an image, by the closed form."""
    return cost.total(predicted_macs(model))


def keep_for(dense: nn.Module, reduction: dict[str, Any], percent: float) -> float:
    """The highest keep rate, in hundredths, that saves so many percent of the multiply-adds."""
    for hundredths in range(99, 0, -1):
        if macs(compress(dense, keep=hundredths / 100, **reduction)) <= (1 - percent / 100) * macs(dense):
            return hundredths / 100
    raise TokencutError(f"no keep rate saves {percent:g} % of the multiply-adds")


class Judge:
    """Carries out tasks.

    Args:
        setup: `folders` of the models by label, `train` and `val`, `recipe`, `batch`, `workers`, `device`, `precision`
            of training, and `limit` of the images to judge by.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self.setup, self.device = setup, resolve_device(setup["device"])
        self.dense = {label: load_model(f"local-dir:{folder}").dense for label, folder in setup["folders"].items()}
        self.train, self.val = (open_source(setup[part], split="train") for part in ("train", "val"))

    def run(self, task: Task) -> dict[str, Any]:
        """Makes a model, fine-tunes it where epochs are asked for, and judges it in fp32."""
        began, dense = time.perf_counter(), self.dense[task.label]
        reduction = task.reduction()
        keep = task.keep
        if isinstance(keep, str):
            keep = keep_for(dense, reduction, float(keep.strip("-%")))
        model = compress(dense, keep=1.0 if task.method == DENSE else keep, layers=task.layers, **reduction)
        told: dict[str, Any] = {}
        if task.epochs:
            recipe = TrainingRecipe(epochs=task.epochs, alpha=task.alpha, beta=task.beta, **self.setup["recipe"])
            setup = TrainingSetup(batch_size=self.setup["batch"], workers=self.setup["workers"], seed=task.seed,
                                  precision=self.setup["precision"])  # fmt: skip
            report = finetune(model, self.train, recipe=recipe, setup=setup, group=alone(self.device))
            last = report.history[-1]
            told = {"loss": last["loss"], "images_per_second": last["images_per_second"]}
        score = evaluate(model, self.val, batch_size=self.setup["batch"], workers=self.setup["workers"],
                         device=self.device, limit=self.setup["limit"])  # fmt: skip
        return {
            **told, "top1": score.top1, "images": score.images, "keep": keep, "gmacs": macs(model) / 1e9,
            "dense_gmacs": macs(dense) / 1e9, "correct": "".join("01"[right] for right in score.correct),
            "seconds": time.perf_counter() - began, "device": describe_device(self.device),
            "classes": len(self.val.classes), "train_images": len(self.train),
        }  # fmt: skip


def serve(requests: TextIO, results: TextIO) -> None:
    """Answers each line with one; what cannot be done is told, and what breaks a GPU ends the process."""
    judge = Judge(json.loads(requests.readline()))
    for line in requests:
        words = json.loads(line)
        for name in ("keep", "layers"):
            words[name] = tuple(words[name]) if isinstance(words[name], list) else words[name]
        try:
            answer = judge.run(Task(**words))
        except (TokencutError, torch.cuda.OutOfMemoryError, ValueError, TypeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=results, flush=True)


if __name__ == "__main__":
    # Whatever is printed on the way must not come between the results.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    serve(sys.stdin, answers)
