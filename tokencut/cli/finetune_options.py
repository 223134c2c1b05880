"""The options of a fine-tune, and what they come to."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokencut.cli.options import DATA_HELP, MODE_HELP, bounded
from tokencut.errors import UsageError

if TYPE_CHECKING:
    from tokencut.training.recipe import TrainingRecipe
    from tokencut.training.setup import TrainingSetup

tuning_option = functools.partial(typer.Option, rich_help_panel="Fine-tuning")

EPOCHS_HELP = "Fine-tune so many epochs."
TRAIN_HELP = f"Images to fine-tune on. {DATA_HELP}"
RECIPE_HELP = "short (1 epoch, at least 300 updates) or paper (30 epochs as published). The options below change it."
LR_HELP = "Learning rate at a batch of 256 (paper: 1024). It grows with the square root of the batch."
LR_SCALING_HELP = "rms: --lr times the size of each matrix's weights, so that it suits any model; none: as it is."
SELECT_HELP = "The epoch to keep: last, or best on a tenth of the training images that is held out."
RESUME_HELP = "Go on with a run that was stopped. Type the options it was started with."
TENSORBOARD_HELP = "Write losses and top-1 for TensorBoard, into a sub-folder named after the output."
DISTILL_HELP = (
    "From the uncompressed model: soft (its probabilities), hard (its choice), features (its pooled tokens) or none."
)


@dataclass(frozen=True)
class FinetuneOptions:
    """How a compressed model is fine-tuned, as typed."""

    finetune_epochs: Annotated[
        int | None, tuning_option("--finetune-epochs", **bounded("epochs"), help=EPOCHS_HELP)
    ] = None
    train_data: Annotated[str | None, tuning_option("--train-data", metavar="DIR", help=TRAIN_HELP)] = None
    recipe: Annotated[str | None, tuning_option("--recipe", metavar="short|paper", help=RECIPE_HELP)] = None
    resume: Annotated[bool | None, tuning_option("--resume", help=RESUME_HELP)] = None
    select: Annotated[str | None, tuning_option("--select", metavar="last|best", help=SELECT_HELP)] = None
    accumulate: Annotated[
        int | None, tuning_option("--accumulate", **bounded("accumulate"), help="Batches that make one update.")
    ] = None
    compile_model: Annotated[bool | None, tuning_option("--compile", help="Train through torch.compile.")] = None
    compile_mode: Annotated[str | None, tuning_option("--compile-mode", metavar="MODE", help=MODE_HELP)] = None
    tensorboard: Annotated[Path | None, tuning_option("--tensorboard", metavar="DIR", help=TENSORBOARD_HELP)] = None
    distill: Annotated[str | None, tuning_option("--distill", metavar="KIND", help=DISTILL_HELP)] = None
    distill_weight: Annotated[
        float | None,
        tuning_option(
            "--distill-weight", **bounded("distill_weight", "F"), help="Share of the task loss that is distillation."
        ),
    ] = None
    temperature: Annotated[
        float | None, tuning_option("--temperature", **bounded("temperature", "F"), help="Of soft distillation.")
    ] = None
    alpha: Annotated[
        float | None, tuning_option("--alpha", **bounded("alpha", "F"), help="Weight of the importance term.")
    ] = None
    beta: Annotated[
        float | None, tuning_option("--beta", **bounded("beta", "F"), help="Weight of the diversity term.")
    ] = None
    lr: Annotated[float | None, tuning_option("--lr", **bounded("lr", "F"), help=LR_HELP)] = None
    lr_scaling: Annotated[str | None, tuning_option("--lr-scaling", metavar="rms|none", help=LR_SCALING_HELP)] = None
    min_lr: Annotated[
        float | None,
        tuning_option("--min-lr", **bounded("min_lr", "F"), help="Where the cosine ends, as a share of --lr."),
    ] = None
    warmup_epochs: Annotated[
        float | None,
        tuning_option("--warmup-epochs", **bounded("warmup_epochs", "F"), help="Epochs of rising learning rate."),
    ] = None
    keep_warmup: Annotated[
        float | None,
        tuning_option("--keep-warmup", **bounded("keep_warmup", "F"), help="Epochs over which keep falls from 1."),
    ] = None
    weight_decay: Annotated[
        float | None,
        tuning_option(
            "--weight-decay", **bounded("weight_decay", "F"), help="Of AdamW; spares norms, biases and tokens."
        ),
    ] = None
    layer_decay: Annotated[
        float | None,
        tuning_option(
            "--layer-decay", **bounded("layer_decay", "F"), help="Factor of --lr from block to block, downwards."
        ),
    ] = None
    clip_grad: Annotated[
        float | None,
        tuning_option("--clip-grad", **bounded("clip_grad", "F"), help="Largest norm of a gradient; 0 for any."),
    ] = None
    ema_decay: Annotated[
        float | None,
        tuning_option(
            "--ema-decay", **bounded("ema_decay", "F"), help="Keep a running average of weights; 0 for none."
        ),
    ] = None
    label_smoothing: Annotated[
        float | None,
        tuning_option("--label-smoothing", **bounded("label_smoothing", "F"), help="Share of a label for all classes."),
    ] = None
    mixup: Annotated[
        float | None, tuning_option("--mixup", **bounded("mixup", "F"), help="Alpha of mixup; 0 for none.")
    ] = None
    cutmix: Annotated[
        float | None, tuning_option("--cutmix", **bounded("cutmix", "F"), help="Alpha of cutmix; 0 for none.")
    ] = None
    crop_scale: Annotated[
        float | None,
        tuning_option(
            "--crop-scale", **bounded("crop_scale", "F"), help="Smallest share of an image in a random crop."
        ),
    ] = None
    hflip: Annotated[float | None, tuning_option("--hflip", **bounded("hflip", "F"), help="Probability of a flip.")] = (
        None
    )
    color_jitter: Annotated[
        float | None, tuning_option("--color-jitter", **bounded("color_jitter", "F"), help="Its strength.")
    ] = None
    auto_augment: Annotated[
        str | None, tuning_option("--auto-augment", metavar="NAME", help="timm's, such as rand-m9-mstd0.5-inc1.")
    ] = None
    random_erasing: Annotated[
        float | None,
        tuning_option("--random-erasing", **bounded("random_erasing", "F"), help="Probability of erasing a part."),
    ] = None

    def given(self) -> tuple[str, ...]:
        """The options that were typed."""
        typed = [entry.name for entry in fields(self) if getattr(self, entry.name) is not None]
        return tuple("--compile" if name == "compile_model" else "--" + name.replace("_", "-") for name in typed)

    def requested(self) -> bool:
        """Whether there is to be a fine-tune.

        Raises:
            UsageError: There is, and no images for it.
        """
        if self.given() and self.train_data is None:
            raise UsageError(
                f"{self.given()[0]} needs images to fine-tune on; add --train-data DIR, a folder with one sub-folder a "
                "class or a .tar of one, or --train-data digits"
            )
        return self.train_data is not None

    def training_recipe(self) -> TrainingRecipe:
        """The recipe with what was typed beside it.

        Raises:
            UsageError: A value is out of range.
        """
        from tokencut.training.recipe import TrainingRecipe, recipe_named

        known = {entry.name for entry in fields(TrainingRecipe)}
        typed = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name in known}
        changes = {"epochs": self.finetune_epochs, **typed}
        changes = {name: value for name, value in changes.items() if value is not None}
        return recipe_named(self.recipe or "short").changed(**changes)

    def training_setup(
        self, *, batch_size: int, workers: int | None, precision: str, seed: int, new_head: bool
    ) -> TrainingSetup:
        """How it runs.

        Raises:
            UsageError: A value is out of range.
        """
        from tokencut.training.setup import TrainingSetup

        return TrainingSetup(
            batch_size=batch_size, accumulate=1 if self.accumulate is None else self.accumulate, workers=workers,
            precision=precision, seed=seed, select=self.select or "last", new_head=new_head,
            compiled=bool(self.compile_model or self.compile_mode), compile_mode=self.compile_mode or "default",
        )  # fmt: skip
