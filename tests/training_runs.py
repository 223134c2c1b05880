"""A small model and how it is fine-tuned in tests."""

from __future__ import annotations

from typing import Any

import timm
import torch
from observing import Seen
from torch import Tensor, nn

from tokencut.model import CompressedModel, compress
from tokencut.runtime.distributed import single_process
from tokencut.training.recipe import TrainingRecipe
from tokencut.training.run import finetune
from tokencut.training.setup import FinetuneReport, TrainingSetup

CPU = single_process(torch.device("cpu"))
# Everything random that there is.
WILD = TrainingRecipe(
    epochs=2, lr=1e-2, hflip=0.5, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5, mixup=0.8,
    cutmix=1.0, label_smoothing=0.1, ema_decay=0.9, warmup_epochs=0.5, layer_decay=0.8, keep_warmup=1.0, alpha=0.1,
    beta=0.1,
)  # fmt: skip


def model(method: str = "evit", **args: Any) -> CompressedModel:
    """A tiny model for digits, random but always the same: 16 image tokens, then 8, then 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=10, depth=3, **args)
        return compress(dense, keep=0.5, layers=[1, 2], method=method).eval()


def setup(**changes: Any) -> TrainingSetup:
    """How it runs: in batches of 8, without further processes."""
    return TrainingSetup(**{"batch_size": 8, "workers": 0, **changes})


def weights(trained: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers, as they are now."""
    return {name: tensor.clone() for name, tensor in trained.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether they are equal to the bit."""
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def stop_after(steps: int) -> Seen:
    """Asks to stop once so many steps are done."""
    return Seen(lambda seen: len(seen.steps) >= steps)


def run(trained: CompressedModel, data: Any, recipe: TrainingRecipe = WILD, **options: Any) -> FinetuneReport:
    """Fine-tunes in place, with everything random that there is unless told otherwise."""
    return finetune(trained, data, **{"recipe": recipe, "setup": setup(), "group": CPU, **options})
