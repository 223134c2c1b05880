"""What an exported file says about its model: one JSON object, written sorted, read back believing nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from tokencut.adapters import adapter_for
from tokencut.data.preprocessing import Preprocessing, preprocessing_of
from tokencut.model import CompressedModel, predicted_gmacs
from tokencut.models.artifact import origin_of
from tokencut.models.fields import (
    LABEL_NAMES,
    MAX_BLOCKS,
    MAX_LENGTH,
    ORIGIN,
    PREPROCESSING,
    QUANTIZED,
    LabelNames,
    as_tuples,
    labels_from_json,
    labels_to_json,
)  # fmt: skip
from tokencut.models.metadata import Origin
from tokencut.models.pretrained_cfg import class_count, label_names, name_of
from tokencut.recipe import Recipe, recipe_from_json
from tokencut.schema import COUNT, OBJECT, POSITIVE, TEXT, TRUTH, Fields, Form, Rule, is_whole, optional

# Where a file keeps it: a key of an .onnx file's metadata_props, and of a .pt2 file's extra files.
KEY = "tokencut"
FORM = Form(
    type="exported-model",
    format=1,
    fields=Fields({
        "model": TEXT,
        "recipe": optional(OBJECT),
        "depth": Rule(lambda value: is_whole(value, 1, MAX_BLOCKS), f"a whole number from 1 to {MAX_BLOCKS}"),
        "preprocessing": PREPROCESSING,
        "normalises": TRUTH,
        "batch_size": optional(Rule(lambda value: is_whole(value, 1), "a positive number")),
        "num_classes": COUNT,
        "label_names": LABEL_NAMES,
        "origin": ORIGIN,
        "gmacs": POSITIVE,
        "dense_gmacs": POSITIVE,
        "params": COUNT,
        "dense_params": COUNT,
        "frames": Rule(lambda value: is_whole(value, 1, 65535), "a positive number"),
        "quantized": QUANTIZED,
    }, partial=frozenset({"frames", "quantized"})),
    called="metadata",
    otherwise="export the model again",
    most=MAX_LENGTH,
)  # fmt: skip


@dataclass(frozen=True)
class ExportInfo:
    """An exported file without its graph and weights.

    Attributes:
        model: What reports call the model.
        recipe: What was done to it; None for a dense model.
        depth: Its number of blocks.
        preprocessing: As timm resolves it: `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
        normalises: Whether the file normalises images itself, so that it takes RGB from 0 to 1.
        batch_size: The one number of images that the file takes; None if it takes any.
        num_classes: Classes of the head, 0 for none.
        label_names: The classes' names, in the order of the logits or by index, if known.
        origin: Where the weights came from, and their licence.
        gmacs: Multiply-adds per image, in units of 1e9.
        dense_gmacs: The same of the model without its recipe.
        params: Number of parameters.
        dense_params: The same of the model without its recipe.
        frames: Frames of the clips that the file takes, `(B, C, frames, H, W)`; None for images.
        quantized: What its weights are quantised to, such as `int8`; None where they are not.
    """

    model: str
    recipe: Recipe | None
    depth: int
    preprocessing: Mapping[str, Any]
    normalises: bool
    batch_size: int | None
    num_classes: int
    label_names: LabelNames | None
    origin: Origin
    gmacs: float
    dense_gmacs: float
    params: int
    dense_params: int
    frames: int | None = None
    quantized: str | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """What the file takes one of: `(C, H, W)`, or `(C, frames, H, W)`."""
        return Preprocessing(dict(self.preprocessing), self.frames).input_shape

    def timm_description(self) -> dict[str, Any]:
        """A `pretrained_cfg` for what the file takes, from which `preprocessing_of` finds how to make it."""
        channels = self.preprocessing["input_size"][0]
        plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels} if self.normalises else {}
        return {
            "architecture": self.model,
            **self.preprocessing,
            **plain,
            "num_classes": self.num_classes,
            "label_names": self.label_names,
            "license": self.origin.licence,
            "frames": self.frames,
        }

    def to_text(self) -> str:
        """Sorted JSON on one line: the same for the same model."""
        recipe = self.recipe and self.recipe.to_json()
        told = {**asdict(self), "recipe": recipe, "label_names": labels_to_json(self.label_names)}
        for name in ("frames", "quantized"):
            if told[name] is None:
                del told[name]
        return FORM.write(told)


def describe_export(
    model: nn.Module, *, name: str | None = None, normalises: bool = False, batch_size: int | None = None
) -> ExportInfo:
    """What a file of this model will say.

    Args:
        model: Dense or compressed.
        name: What reports call it; by default its architecture and tag.
        normalises: Whether the file normalises images itself.
        batch_size: The one number of images that the file takes; None if it takes any.

    Raises:
        ModelError: The model's family is not supported.
    """
    compressed = model if isinstance(model, CompressedModel) else None
    inner = compressed.model if compressed else model
    adapter = adapter_for(inner)
    prepared = preprocessing_of(model)
    return ExportInfo(
        model=name or name_of(inner),
        recipe=compressed.recipe if compressed else None,
        depth=len(adapter.blocks(inner)),
        preprocessing={key: prepared.config[key] for key in PREPROCESSING.checks},
        normalises=normalises,
        batch_size=batch_size,
        num_classes=class_count(inner),
        label_names=label_names(inner),
        origin=origin_of(inner),
        gmacs=predicted_gmacs(model),
        dense_gmacs=predicted_gmacs(inner),
        params=_parameters(model),
        dense_params=_parameters(inner),
        frames=prepared.frames,
    )


def _parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def export_info_from_text(text: str) -> ExportInfo:
    """Reads the JSON of a file back.

    Raises:
        ArtifactError: Not JSON, too large, of a newer format, or a field is missing, unknown, or does not hold what it
            should.
    """
    data = FORM.read(text)
    return ExportInfo(
        **{
            **data,
            "recipe": data["recipe"] and recipe_from_json(data["recipe"], data["depth"]),
            "preprocessing": as_tuples(data["preprocessing"]),
            "label_names": labels_from_json(data["label_names"]),
            "origin": Origin(**data["origin"]),
        }
    )
