"""One step of a fine-tune: forward, backward, and the update, over all passes and processes that make it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import nn

from tokencut.data.loading import Batch
from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import ModelError, UsageError
from tokencut.methods import make_method, methods
from tokencut.model import CompressedModel
from tokencut.recipe import Recipe
from tokencut.runtime.devices import autocast, enough_memory
from tokencut.runtime.distributed import Group
from tokencut.schedule import TokensOut
from tokencut.training.objective import Losses, Objective, ObjectiveSettings
from tokencut.training.order import Order, seed_all
from tokencut.training.recipe import TrainingRecipe, make_optimizer, make_scheduler

# The losses that there can be, each reported by name where it counts.
TERMS = ("task", "distillation", "importance", "diversity", "ratio", "tokens")
# In how many equal steps a warm-up lowers the keep rate: each has shapes of its own, which costs a compiler time, and
# some versions of torch compile a function for no more than eight.
WARMUP_LEVELS = 6


class TrainingDivergedError(ModelError):
    """The loss or its gradient is no longer a finite number; the weights are those before the step."""


class Trainer:
    """A model with everything that changes it."""

    def __init__(
        self,
        model: CompressedModel,
        recipe: TrainingRecipe,
        settings: ObjectiveSettings,
        order: Order,
        epochs: int,
        group: Group,
        *,
        precision: str = "fp32",
        compile_mode: str | None = None,
        new_head: bool = False,
    ) -> None:
        """Prepares a model, which is where it is to be trained, for training.

        Args:
            model: The model.
            recipe: How it is trained.
            settings: The objective, as far as it applies to this model.
            order: Which images make which step.
            epochs: Epochs in all.
            group: The processes that train it.
            precision: What forwards compute in, `fp32` or `bf16`.
            compile_mode: The mode of `torch.compile`; None for not at all.
            new_head: Whether the classifier starts from nothing.

        Raises:
            UsageError: The recipe does not go with the model or the number of epochs.
        """
        self.model, self.recipe, self.order, self.epochs, self.group = model, recipe, order, epochs, group
        self.precision = precision
        self.target = model.recipe
        if recipe.keep_warmup and (self.target.schedule.keep is None or methods()[self.target.method].needs_training):
            raise UsageError(f"`keep_warmup` lowers a keep rate, which method {self.target.method} with "
                             "`reduce_by` or learned stages does not follow; leave it out")  # fmt: skip
        for name, warmup in (("keep_warmup", recipe.keep_warmup), ("warmup_epochs", recipe.warmup_epochs)):
            if warmup and warmup >= epochs:
                raise UsageError(f"`{name}` {warmup:g} is no part of {epochs} epoch{'s' * (epochs != 1)}, so that the "
                                 f"run would end before it is warm; give less, such as {epochs / 5:g}")  # fmt: skip
        group.broadcast_parameters(model)
        self.ema: Any = None
        if recipe.ema_decay:
            self.ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
        self.objective = Objective(model, settings, compile_mode=compile_mode)
        per_step = order.per_step
        self.optimizer = make_optimizer(model, recipe, per_step, new_head=new_head)
        self.scheduler = make_scheduler(self.optimizer, recipe, batch=per_step, epochs=epochs, updates=order.steps)
        self.preprocessing = preprocessing_of(model)
        self.mixup = _mixup(recipe, model.num_classes)
        self.erasing = RandomErasing(recipe.random_erasing, mode="pixel", device=group.device)

    @property
    def result(self) -> CompressedModel:
        """The model that is judged and kept: the running average where there is one."""
        chosen: CompressedModel = self.ema.module if self.ema else self.model
        return chosen

    @property
    def lr(self) -> float:
        """The learning rate of the last step, before the factors of the groups."""
        first = self.optimizer.param_groups[0]
        rate: float = first["lr"] / first["lr_scale"]
        return rate

    def restore(self, model: Any, optimizer: dict[str, Any], ema: Any, updates: int) -> None:
        """Goes back to a state that was saved after so many updates."""
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.step_update(updates)
        if self.ema:
            self.ema.module.load_state_dict(ema)

    def step(self, epoch: int, step: int, batches: Iterator[Batch]) -> dict[str, float]:
        """Updates the weights once.

        Args:
            epoch: The epoch, from 0 on.
            step: The step in it, from 0 on.
            batches: Gives a batch for each backward pass.

        Returns:
            `images`, and `loss` and each term of `TERMS` that counts, times the images; over all processes.

        Raises:
            TrainingDivergedError: The loss or the gradient is not finite; the weights are as before the step.
            TokencutError: The batch does not fit in memory.
        """
        sums = dict.fromkeys(("images", "loss", *TERMS), torch.zeros((), device=self.group.device))
        used: set[str] = set()
        self.optimizer.zero_grad(set_to_none=True)
        with self._warming(epoch, step), self._enough_memory():
            for number in range(self.order.accumulate):
                batch = next(batches)
                if not len(batch):
                    continue
                seed_all(self.order.seed, 2, epoch, step, self.group.rank, number)
                losses = self._backward(batch)
                used |= set(losses.terms)
                for name, value in {"loss": losses.total.detach(), **losses.terms}.items():
                    sums[name] = sums[name] + value.float() * len(batch)
                sums["images"] = sums["images"] + len(batch)
        numbers: list[float] = self.group.all_reduce(torch.stack(list(sums.values()))).tolist()
        total = dict(zip(sums, numbers, strict=True))
        if total["images"]:
            self._update(epoch, step, total)
        return {name: value for name, value in total.items() if name in ("images", "loss") or name in used}

    def _backward(self, batch: Batch) -> Losses:
        """Adds the gradient of a batch, summed over its images."""
        device = self.group.device
        images = self.erasing(self.preprocessing.normalise(batch.images, device))
        targets = batch.targets.to(device)
        if self.mixup is not None and len(batch) % 2 == 0:
            images, targets = self.mixup(images, targets)
        with autocast(device, self.precision):
            losses = self.objective(images, targets)
        (losses.total * len(batch)).backward()
        return losses

    def _update(self, epoch: int, step: int, total: dict[str, float]) -> None:
        self.group.all_reduce_gradients(self.model)
        weights = [weight for weight in self.model.parameters() if weight.grad is not None]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        torch._foreach_div_(gradients, total["images"])
        norm = nn.utils.clip_grad_norm_(weights, self.recipe.clip_grad or math.inf)
        if not (math.isfinite(total["loss"]) and bool(norm.isfinite())):
            what = "gradient" if math.isfinite(total["loss"]) else "loss"
            raise TrainingDivergedError(
                f"the {what} is not a finite number at epoch {epoch + 1}, step {step + 1} of {self.order.steps}; type "
                f"a smaller learning rate, such as `lr={self.recipe.lr / 4:.2g}`"
                + (", or `precision='fp32'`" if self.precision != "fp32" else "")
            )
        self.optimizer.step()
        updates = epoch * self.order.steps + step + 1
        self.scheduler.step_update(updates)
        if self.ema:
            self.ema.update(self.model, step=updates)

    @contextmanager
    def _warming(self, epoch: int, step: int) -> Iterator[None]:
        """Gives the model, for a step, the keep rate that a warm-up has come to."""
        done = (epoch * self.order.steps + step) / max(1.0, self.recipe.keep_warmup * self.order.steps)
        if not self.recipe.keep_warmup or done >= 1:
            yield
            return
        share = math.floor(done * WARMUP_LEVELS) / WARMUP_LEVELS
        self.model.recipe = warmed(self.target, share, self.model.possible_counts())
        try:
            yield
        finally:
            self.model.recipe = self.target

    def _enough_memory(self) -> AbstractContextManager[None]:
        batch, passes = self.order.batch, self.order.accumulate
        advice = f"`batch_size={batch // 2}, accumulate={passes * 2}`" if batch > 1 else "`device='cpu'`"
        return enough_memory(batch, self.group.device, f"type {advice}, which trains alike")


def warmed(recipe: Recipe, share: float, tokens_out: TokensOut | None = None) -> Recipe:
    """The recipe with only a share of its reduction: keep 1 at share 0, its own keep rates at share 1.

    Args:
        recipe: The recipe.
        share: From 0 to 1.
        tokens_out: How many tokens can leave a stage, of a family that says so (`Adapter.tokens_out`).
    """
    keep = recipe.schedule.keep
    rates = keep if isinstance(keep, tuple) else (keep or 1.0,) * len(recipe.schedule.layers)
    eased = tuple(round(1 - share * (1 - rate), 6) for rate in rates)
    schedule = replace(recipe.schedule, keep=eased)
    tokens_out = tokens_out or make_method(recipe.method, dict(recipe.method_options)).tokens_out
    return replace(recipe, schedule=schedule, stages=schedule.resolve(recipe.tokens, tokens_out))


def _mixup(recipe: TrainingRecipe, classes: int) -> Mixup | None:
    if not recipe.mixup and not recipe.cutmix:
        return None
    smoothing = recipe.label_smoothing
    return Mixup(mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, label_smoothing=smoothing, num_classes=classes)


def term_means(sums: dict[str, float]) -> dict[str, float]:
    """Losses per image, of what `Trainer.step` gave, summed up."""
    names: Sequence[str] = [name for name in ("loss", *TERMS) if name in sums]
    return {name: sums[name] / max(1.0, sums["images"]) for name in names}
