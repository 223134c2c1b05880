"""The training loop: phases of fewer tokens, a schedule that fits a time limit, resuming at any epoch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.layers import DropPath, PatchDropout
from timm.loss import SoftTargetCrossEntropy
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from reference.augment import Augmentation, augment, centre
from reference.pixels import Held
from tokencut.errors import TokencutError
from tokencut.runtime.devices import autocast

# To measure how long a step takes: steps to compile and warm up by, and steps to time, in each phase.
WARM_STEPS, TIMED_STEPS = 5, 20
# Of the time that is left, what goes to training in the plan: the rest is for evaluations, saving and slower steps.
PLANNED_SHARE = 0.93
JUDGED_AT_ONCE = 500


def blocks_of(model: nn.Module) -> list[Any]:
    """timm's blocks, through all stages of those that have some."""
    return [module for module in model.modules() if hasattr(module, "drop_path1") and hasattr(module, "drop_path2")]


def can_drop_patches(model: nn.Module) -> bool:
    """Whether image tokens can be left out: where a model turns or biases them by position, they lose their places."""
    return isinstance(model, VisionTransformer)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        epochs: Passes over the images, over which the learning rate falls.
        batch: Images a step.
        lr: Highest learning rate.
        min_lr: Lowest, at the end.
        warmup: Epochs of rising learning rate.
        weight_decay: Of AdamW; spares norms, biases, tokens and positions.
        drop_path: Probability of leaving out a residual branch, the same in every block.
        patch_drop: Share of the image tokens that are left out in the first phase.
        patch_drop_share: The share of the epochs that are of the first phase.
        small: Height and width of the images in the first epochs, px; 0 for the model's own throughout.
        small_share: The share of the epochs that take small images.
        enlarge: How many times crops are enlarged for the model.
        mixup: Alpha of mixup.
        cutmix: Alpha of cutmix.
        smoothing: Share of a label that goes to all classes.
        clip: Largest norm of the gradient.
        ema_decay: Decay of the running average of weights.
        seed: Decides weights, order and augmentation.
    """

    epochs: int
    batch: int
    lr: float
    min_lr: float
    warmup: int
    weight_decay: float
    drop_path: float
    patch_drop: float
    patch_drop_share: float
    small: int
    small_share: float
    enlarge: int
    mixup: float
    cutmix: float
    smoothing: float
    clip: float
    ema_decay: float
    seed: int


@dataclass
class Training:
    """A model under training.

    Attributes:
        model: timm's model, on its device.
        train: Images to train on, on the device.
        val: Images to judge by, on the device.
        size: Height and width that the model takes, px.
        recipe: How it is trained.
        augmentation: What is done to images.
        note: Told, in a line, what happens.
        epoch: Epochs done.
        rows: The log, a row an epoch.
    """

    model: Any
    train: Held
    val: Held
    size: int
    recipe: Recipe
    augmentation: Augmentation
    note: Callable[[str], None]
    epoch: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = self.train.images.device
        statistics = self.train.statistics()
        self.mean, self.std = (torch.tensor(values, device=self.device) for values in statistics)
        self.loss = SoftTargetCrossEntropy()
        recipe = self.recipe
        mixed = 1.0 if recipe.mixup or recipe.cutmix else 0.0
        self.mixup = Mixup(recipe.mixup, recipe.cutmix, prob=mixed, label_smoothing=recipe.smoothing,
                           num_classes=len(self.train.classes))  # fmt: skip
        for block in blocks_of(self.model) if recipe.drop_path else ():
            # timm's rate grows from block to block; DeiT III's is the same in all, so that one compiled block serves.
            block.drop_path1, block.drop_path2 = DropPath(recipe.drop_path), DropPath(recipe.drop_path)
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True)
        self._prepare()

    @property
    def steps(self) -> int:
        """Steps an epoch; what is left over waits for the next, whose order is another."""
        return len(self.train.images) // self.recipe.batch

    def _prepare(self) -> None:
        """Makes optimizer and schedule for the recipe's epochs."""
        recipe = self.recipe
        fused: dict[str, Any] = {"fused": True} if self.device.type == "cuda" else {}
        self.optimizer = create_optimizer_v2(
            self.model, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay, **fused
        )
        warmup = min(recipe.warmup, recipe.epochs // 3)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched="cosine", num_epochs=recipe.epochs, warmup_epochs=warmup,
            warmup_lr=recipe.lr / 1000, min_lr=recipe.min_lr, step_on_epochs=False, updates_per_epoch=self.steps,
        )  # fmt: skip

    def phase(self, epoch: int) -> tuple[int, float]:
        """Height and width of small images (0 for none), and the share of tokens that are left out, of an epoch."""
        recipe, done = self.recipe, epoch / self.recipe.epochs
        return (
            recipe.small if done < recipe.small_share else 0,
            recipe.patch_drop if done < recipe.patch_drop_share else 0.0,
        )

    def _enter(self, drop: float) -> None:
        if can_drop_patches(self.model):
            self.model.patch_drop = PatchDropout(drop, self.model.num_prefix_tokens) if drop else nn.Identity()

    def compile(self) -> bool:
        """Compiles the blocks, all of a shape by one piece of code; False where that does not work here."""
        for block in blocks_of(self.model):
            block.compile(dynamic=False)
        try:
            self._time(*self.phase(0), steps=1)
        except Exception as error:  # noqa: BLE001 (a compiler can fail in any way, and training goes on without it)
            self.note(
                f"torch.compile does not work here ({type(error).__name__}), going on without: {str(error)[:300]}"
            )
            for block in blocks_of(self.model):
                block._compiled_call_impl = None
            return False
        return True

    def plan(self, most: int, seconds: float) -> int:
        """Epochs that fit into some seconds, `most` at most, by the time that steps take in each phase."""
        phases: dict[tuple[int, float], int] = {}
        for hundredth in range(100):
            key = self.phase(hundredth * self.recipe.epochs // 100)
            phases[key] = phases.get(key, 0) + 1
        epoch_seconds = 0.0
        began = time.monotonic()
        for (small, drop), hundredths in phases.items():
            taken = self._time(small, drop)
            epoch_seconds += hundredths / 100 * taken * self.steps
            self.note(f"{self.recipe.batch / taken:,.0f} images/s with images of {small or self.size} px, "
                      f"{drop:.0%} of the tokens left out")  # fmt: skip
        left = PLANNED_SHARE * (seconds - (time.monotonic() - began))
        return max(3, min(most, math.floor(left / epoch_seconds)))

    def _time(self, small: int, drop: float, steps: int = TIMED_STEPS) -> float:
        """Seconds a step, with the model left as it was."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.train()
        self._enter(drop)
        order = torch.arange(self.recipe.batch, device=self.device)
        for _ in range(WARM_STEPS if steps > 1 else 0):
            self._step(order, small)
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            self._step(order, small)
        self._wait()
        seconds = (time.perf_counter() - began) / steps
        self.model.load_state_dict(before)
        self._prepare()
        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _step(self, chosen: Tensor, small: int) -> Tensor:
        """One update, by the images of these numbers; returns the loss, still on the device."""
        pixels = augment(self.train.images[chosen], self.size, self.mean, self.std, self.augmentation, small,
                         self.recipe.enlarge)  # fmt: skip
        images, targets = self.mixup(pixels, self.train.labels[chosen])
        with autocast(self.device, "bf16"):
            logits = self.model(images)
        loss = self.loss(logits.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        detached: Tensor = loss.detach()
        return detached

    def run_epoch(self) -> dict[str, float]:
        """Trains one epoch, and notes it in the log.

        Raises:
            TokencutError: The loss is no longer a finite number.
        """
        began, epoch = time.perf_counter(), self.epoch
        torch.manual_seed(self.recipe.seed * 100_003 + epoch + 1)
        np.random.seed((self.recipe.seed * 100_003 + epoch + 1) % 2**32)  # noqa: NPY002 (timm's mixup draws from it)
        small, drop = self.phase(epoch)
        self.model.train()
        self._enter(drop)
        order = torch.randperm(len(self.train.images), device=self.device)
        total = torch.zeros((), device=self.device)
        for step in range(self.steps):
            total += self._step(order[step * self.recipe.batch : (step + 1) * self.recipe.batch], small)
            updates = epoch * self.steps + step + 1
            self.scheduler.step_update(updates)
            self.ema.update(self.model, step=updates)
        loss = total.item() / self.steps
        if not math.isfinite(loss):
            raise TokencutError(f"the loss is {loss} in epoch {epoch + 1}; try a smaller learning rate, such as "
                                f"--lr {self.recipe.lr / 2:g}")  # fmt: skip
        self.epoch += 1
        seconds = time.perf_counter() - began
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        row = {"epoch": self.epoch, "loss": loss, "lr": lr, "px": small or self.size, "left_out": drop,
               "images_per_second": self.steps * self.recipe.batch / seconds, "seconds": seconds}  # fmt: skip
        self.rows.append(row)
        return row

    def judge(self) -> dict[str, float]:
        """Top-1 in percent of the weights (`top1_raw`) and of their running average (`top1`)."""
        # A copy is not compiled: for two passes over the validation images compiling would not pay.
        plain, ema = copy.deepcopy(self.model), self.ema.module
        for model in (plain, ema):
            if can_drop_patches(model):
                model.patch_drop = nn.Identity()
        return {"top1": self.accuracy(ema), "top1_raw": self.accuracy(plain)}

    @torch.no_grad()
    def accuracy(self, model: nn.Module, precision: str = "bf16") -> float:
        """Top-1 of a model on the validation images, in percent."""
        model.eval()
        right = 0
        for images, labels in zip(
            self.val.images.split(JUDGED_AT_ONCE), self.val.labels.split(JUDGED_AT_ONCE), strict=True
        ):
            with autocast(self.device, precision):
                logits = model(centre(images, self.size, self.mean, self.std, self.recipe.enlarge))
            right += int((logits.argmax(dim=1) == labels).sum())
        return 100 * right / len(self.val.labels)

    def state(self) -> dict[str, Any]:
        """What is needed to go on."""
        return {
            "epoch": self.epoch, "rows": self.rows, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "ema": self.ema.module.state_dict(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a state."""
        self.epoch, self.rows = state["epoch"], state["rows"]
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.step_update(self.epoch * self.steps)
