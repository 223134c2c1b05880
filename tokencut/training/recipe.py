"""How a compressed model is fine-tuned: the recipes, and timm's optimizer and schedule made from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from timm.data import create_transform
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from tokencut.errors import UsageError
from tokencut.limits import LIMITS, check_number
from tokencut.model import CompressedModel
from tokencut.training.objective import DISTILL_KINDS, ObjectiveSettings

# Weights that start from nothing (a new head, the predictors of dyvit) learn this much faster than pretrained ones.
# Not measured: ten is customary for new heads.
NEW_WEIGHTS_LR = 10.0

LR_SCALINGS = ("rms", "none")
# AdamW moves every weight by about the learning rate, whatever the weight's size, so one rate suits weights of one size
# only. This is the root mean square that `lr` is for with `lr_scaling="rms"`: that of a DeiT's matrices is about 0.06,
# of a DINOv2's 0.017, which at DeiT's rate loses in one epoch what it knows.
REFERENCE_RMS = 0.05
# Factors are rounded to so many steps an octave, so that an update takes few kernels.
STEPS_AN_OCTAVE = 4


@dataclass(frozen=True)
class TrainingRecipe:
    """Everything that decides a fine-tune beside the model, the images, the batch and the seed.

    `alpha` and `beta` are 0: neither term helped where it was measured (docs/fine-tuning.md).

    Attributes:
        epochs: Passes over the training images.
        least_updates: Small sets get as many epochs as make so many updates.
        lr: Learning rate at a batch of `lr_batch`; it grows with the square root of the batch, as timm has it for
            AdamW.
        lr_batch: The batch that `lr` is for.
        lr_scaling: `rms` multiplies the learning rate of each pretrained weight matrix by the root mean square of its
            weights over `REFERENCE_RMS`, and that of all else that is pretrained by the matrices' geometric mean of
            that, both as they are before the first step; with `none` all have the same rate.
        min_lr: Where the cosine ends, as a share of the learning rate.
        warmup_epochs: Epochs (or a part of one) over which the learning rate rises linearly from 0.
        weight_decay: Not applied to norms, biases and tokens.
        layer_decay: Factor of the learning rate from each block to the one before it; 1 for none.
        clip_grad: Largest norm of the gradient; 0 for no limit.
        ema_decay: Decay of the running average of weights that becomes the result; 0 for none.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none.
        crop_scale: Smallest share of its area that a random crop takes from an image.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of colour jitter.
        auto_augment: timm's name for an augmentation policy, such as `rand-m9-mstd0.5-inc1`; empty for none.
        random_erasing: Probability of erasing a part of an image.
        keep_warmup: Epochs over which the keep rate falls from 1 to the model's own.
        label_smoothing: See `ObjectiveSettings`, also for the following.
        distill: Kind of distillation.
        distill_weight: Its weight.
        temperature: Of soft distillation.
        alpha: Weight of the importance term.
        beta: Weight of the diversity term.
    """

    epochs: int = 1
    least_updates: int = 0
    lr: float = 5e-5
    lr_batch: int = 256
    lr_scaling: str = "rms"
    min_lr: float = 0.05
    warmup_epochs: float = 0.0
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    clip_grad: float = 1.0
    ema_decay: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    crop_scale: float = 0.67
    hflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str = ""
    random_erasing: float = 0.0
    keep_warmup: float = 0.0
    label_smoothing: float = 0.0
    distill: str = "soft"
    distill_weight: float = 0.5
    temperature: float = 1.0
    alpha: float = 0.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.name in LIMITS:
                check_number(entry.name, getattr(self, entry.name))
        if self.auto_augment:
            _check_policy(self.auto_augment)
        for name, kinds in (("distill", DISTILL_KINDS), ("lr_scaling", LR_SCALINGS)):
            value = getattr(self, name)
            if value not in kinds:
                raise UsageError(f"`{name}={value!r}` is not one of {', '.join(kinds)}; type `{name}={kinds[0]!r}`")

    @property
    def objective(self) -> ObjectiveSettings:
        """The part that the objective takes."""
        return ObjectiveSettings(**{entry.name: getattr(self, entry.name) for entry in fields(ObjectiveSettings)})

    @property
    def augmentation(self) -> dict[str, object]:
        """The part that timm's training transform takes, as `Preprocessing.transform` wants it."""
        return {
            "scale": (self.crop_scale, 1.0),
            "hflip": self.hflip,
            "color_jitter": self.color_jitter or None,
            "auto_augment": self.auto_augment or None,
        }

    def changed(self, **values: Any) -> TrainingRecipe:
        """The same with some fields replaced; a number of epochs that was asked for is not raised for small sets."""
        if "epochs" in values:
            values.setdefault("least_updates", 0)
        return replace(self, **values)

    def epochs_for(self, updates_per_epoch: int) -> int:
        """Epochs for a set of a certain size."""
        return max(self.epochs, math.ceil(self.least_updates / updates_per_epoch))

    def lr_for(self, batch: int) -> float:
        """The learning rate for the images of one update."""
        return self.lr * math.sqrt(batch / self.lr_batch)


def _check_policy(name: str) -> None:
    """Refuses a name that timm does not know for a policy of augmentation."""
    try:
        create_transform(32, is_training=True, auto_augment=name)
    except Exception as error:  # timm asserts, and looks names up
        raise UsageError(f"`auto_augment={name!r}` is none of timm's policies; type "
                         "`auto_augment='rand-m9-mstd0.5-inc1'`, "
                         "or leave it out") from error  # fmt: skip


# Rate and scaling are those that won on held-out training images of three models (docs/fine-tuning.md). Little
# augmentation: one epoch shows each image once, and a flip would be wrong for digits or text.
SHORT = TrainingRecipe(least_updates=300)
# Learning rate, batch, schedule and epochs as in the published logs; what those leave open is as DeiT is trained.
PAPER = TrainingRecipe(
    epochs=30, lr=4e-5, lr_batch=1024, lr_scaling="none", min_lr=0.05, weight_decay=1e-6, clip_grad=0.0, mixup=0.8,
    cutmix=1.0, crop_scale=0.08, hflip=0.5, color_jitter=0.3, auto_augment="rand-m9-mmax9-mstd0.5-inc1",
    random_erasing=0.25, label_smoothing=0.1,
)  # fmt: skip
RECIPES = {"short": SHORT, "paper": PAPER}


def recipe_named(name: str) -> TrainingRecipe:
    """A recipe by its name.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}, expected {' or '.join(RECIPES)}; type `recipe='short'`")
    return RECIPES[name]


def make_optimizer(model: CompressedModel, recipe: TrainingRecipe, batch: int, *, new_head: bool) -> Optimizer:
    """timm's AdamW over the model's weights, and over what its stages learn.

    Args:
        model: The model to train.
        recipe: Learning rate, its scaling, decay and layer decay.
        batch: Images of one update, over all processes.
        new_head: Whether the classifier starts from nothing.
    """
    lr = recipe.lr_for(batch)
    pretrained, fresh = _apart(_pretrained_groups(model.model, recipe), _fresh(model, new_head=new_head))
    if recipe.lr_scaling == "rms":
        pretrained = _scaled_by_rms(pretrained)
    groups = [
        {"params": group.weights, "weight_decay": recipe.weight_decay * group.matrices, "lr_scale": group.lr_scale}
        for group in (*pretrained, *fresh) if group.weights
    ]  # fmt: skip
    optimizer: Optimizer = create_optimizer_v2(groups, opt="adamw", lr=lr, weight_decay=recipe.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr  # the schedule's own, to which it applies lr_scale
    return optimizer


@dataclass(frozen=True)
class _Group:
    """Weights that are updated alike.

    Attributes:
        weights: The weights.
        matrices: Whether they are weight matrices: neither norms, biases nor tokens.
        lr_scale: Factor of the learning rate.
    """

    weights: list[nn.Parameter]
    matrices: bool
    lr_scale: float


def _pretrained_groups(model: Any, recipe: TrainingRecipe) -> list[_Group]:
    # Patterns beside timm's own list: any token, whatever a family calls it.
    own = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    spared = {*own, "*token", "*pos_embed"}
    # A decay of 1 marks what decays where there is none, too.
    if recipe.layer_decay < 1:
        found = param_groups_layer_decay(
            model, weight_decay=1.0, no_weight_decay_list=spared, layer_decay=recipe.layer_decay
        )
    else:
        found = param_groups_weight_decay(model, weight_decay=1.0, no_weight_decay_list=spared)
    return [_Group(group["params"], bool(group["weight_decay"]), group.get("lr_scale", 1.0)) for group in found]


def _fresh(model: CompressedModel, *, new_head: bool) -> list[nn.Parameter]:
    """Weights that start from nothing."""
    heads = model.model.get_classifier() if new_head else ()
    modules = [*(heads if isinstance(heads, Sequence) else (heads,)), model.stages]
    return [weight for module in modules for weight in module.parameters()]


def _apart(groups: list[_Group], fresh: list[nn.Parameter]) -> tuple[list[_Group], list[_Group]]:
    """The groups without the fresh weights, and groups of these with a higher learning rate."""
    apart = {id(weight) for weight in fresh}
    rest = [replace(group, weights=[w for w in group.weights if id(w) not in apart]) for group in groups]
    return rest, [
        _Group([w for w in fresh if w.ndim > 1], True, NEW_WEIGHTS_LR),
        _Group([w for w in fresh if w.ndim <= 1], False, NEW_WEIGHTS_LR),
    ]


def _scaled_by_rms(groups: list[_Group]) -> list[_Group]:
    """The groups split by the factor of their learning rate that the size of their weights gives.

    Norms, biases and tokens have scales of their own (gains of 1, biases of 0), which say nothing of how far they may
    move: they move as the matrices do on average.
    """
    octaves = {id(w): _octaves(w) for group in groups if group.matrices for w in group.weights}
    known = [octave for octave in octaves.values() if octave is not None]
    average = sum(known) / len(known) if known else 0.0
    found = []
    for group in groups:
        by_step: dict[int, list[nn.Parameter]] = {}
        for weight in group.weights:
            octave = octaves.get(id(weight))
            by_step.setdefault(round(STEPS_AN_OCTAVE * (average if octave is None else octave)), []).append(weight)
        found += [
            replace(group, weights=weights, lr_scale=group.lr_scale * 2 ** (step / STEPS_AN_OCTAVE))
            for step, weights in by_step.items()
        ]
    return found


def _octaves(weight: nn.Parameter) -> float | None:
    """Logarithm to base 2 of how large weights are beside the reference; None where that says nothing, as of zeros."""
    rms = weight.detach().to("cpu", torch.float64).square().mean().sqrt().item()
    return math.log2(rms / REFERENCE_RMS) if 0 < rms < math.inf else None


def make_scheduler(optimizer: Optimizer, recipe: TrainingRecipe, *, batch: int, epochs: int, updates: int) -> Scheduler:
    """timm's cosine, stepped at every update.

    Args:
        optimizer: What `make_optimizer` made.
        recipe: Warm-up, and where the cosine ends.
        batch: Images of one update.
        epochs: Epochs in all.
        updates: Updates an epoch.
    """
    lr = recipe.lr_for(batch)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, warmup_lr=0.0,
        warmup_epochs=recipe.warmup_epochs,  # type: ignore[arg-type]  # parts of an epoch do as well
        min_lr=lr * recipe.min_lr, step_on_epochs=False, updates_per_epoch=updates,
    )  # fmt: skip
    return scheduler
