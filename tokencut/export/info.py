"""What an exported file says about its model: one JSON object, written sorted, read back believing nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from tokencut import cost
from tokencut.adapters import adapter_for
from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import ArtifactError
from tokencut.model import CompressedModel, predicted_macs
from tokencut.models.artifact import origin_of
from tokencut.models.metadata import MAX_LENGTH, Origin
from tokencut.models.pretrained_cfg import LabelNames, class_count, label_names, name_of
from tokencut.models.schema import (
    FIELDS,
    MAX_BLOCKS,
    ORIGIN,
    PREPROCESSING,
    Rule,
    is_number,
    labels_from_json,
    labels_to_json,
    problem,
)
from tokencut.recipe import Recipe, recipe_from_json

# Where a file keeps it: a key of an .onnx file's metadata_props, and of a .pt2 file's extra files.
KEY = "tokencut"
TYPE = "exported-model"
FORMAT = 1

_COST: Rule = (lambda value: is_number(value) and value > 0, "a positive number")
_COUNT: Rule = (lambda value: type(value) is int and value >= 0, "a whole number of at least 0")
_RULES: dict[str, Rule] = {
    "type": (lambda value: value == TYPE, f"{TYPE!r}"),
    "format": (lambda value: value == FORMAT and type(value) is int, str(FORMAT)),
    "model": (lambda value: isinstance(value, str), "a string"),
    "recipe": (lambda value: value is None or isinstance(value, dict), "an object or null"),
    "depth": (lambda value: type(value) is int and 0 < value <= MAX_BLOCKS, f"a whole number from 1 to {MAX_BLOCKS}"),
    "preprocessing": FIELDS["preprocessing"],
    "normalises": (lambda value: isinstance(value, bool), "true or false"),
    "batch_size": (lambda value: value is None or (type(value) is int and value > 0), "a positive number or null"),
    "num_classes": _COUNT,
    "label_names": FIELDS["label_names"],
    "origin": FIELDS["origin"],
    "gmacs": _COST,
    "dense_gmacs": _COST,
    "params": _COUNT,
    "dense_params": _COUNT,
}


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
        }

    def to_text(self) -> str:
        """Sorted JSON on one line: the same for the same model."""
        data = {
            **asdict(self),
            "type": TYPE,
            "format": FORMAT,
            "recipe": self.recipe and self.recipe.to_json(),
            "label_names": labels_to_json(self.label_names),
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


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
    prepared = preprocessing_of(model).config
    return ExportInfo(
        model=name or name_of(inner),
        recipe=compressed.recipe if compressed else None,
        depth=len(adapter.blocks(inner)),
        preprocessing={key: prepared[key] for key in PREPROCESSING},
        normalises=normalises,
        batch_size=batch_size,
        num_classes=class_count(inner),
        label_names=label_names(inner),
        origin=origin_of(inner),
        gmacs=cost.total(predicted_macs(model)) / 1e9,
        dense_gmacs=cost.total(predicted_macs(inner)) / 1e9,
        params=_parameters(model),
        dense_params=_parameters(inner),
    )


def _parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def export_info_from_text(text: str) -> ExportInfo:
    """Reads the JSON of a file back.

    Raises:
        ArtifactError: Not JSON, too large, of a newer format, or a field is missing, unknown, or does not hold what it
            should.
    """
    data = _parse(text)
    version = data.get("format") if isinstance(data, dict) else None
    if type(version) is int and version > FORMAT:
        raise ArtifactError(f"the file has format {version}, and this tokencut reads up to {FORMAT}; type "
                            "pip install --upgrade tokencut")  # fmt: skip
    if not isinstance(data, dict):
        raise _damaged("its metadata is not an object")
    wrong = (
        problem(data, _RULES, "")
        or problem(data["preprocessing"], PREPROCESSING, "preprocessing.")
        or problem(data["origin"], ORIGIN, "origin.")
    )
    if wrong:
        raise _damaged(f"its metadata{wrong}")
    fields = {name: value for name, value in data.items() if name not in ("type", "format")}
    images = {name: tuple(v) if isinstance(v, list) else v for name, v in data["preprocessing"].items()}
    return ExportInfo(
        **{
            **fields,
            "recipe": data["recipe"] and recipe_from_json(data["recipe"], data["depth"]),
            "preprocessing": images,
            "label_names": labels_from_json(data["label_names"]),
            "origin": Origin(**data["origin"]),
        }
    )


def _parse(text: str) -> Any:
    if len(text) > MAX_LENGTH:
        raise _damaged(f"its metadata has {len(text)} characters, more than {MAX_LENGTH}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged("its metadata is not JSON") from error


def _damaged(what: str) -> ArtifactError:
    return ArtifactError(f"the file is damaged or was not written by tokencut: {what}; export the model again")
