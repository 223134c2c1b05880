"""timm's description of a model (`pretrained_cfg`): read for what was built, and made true for it.

timm leaves there what the weights were made for, also where another input size or number of classes was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import resolve_input_data_config
from torch import nn

from tokencut.errors import ModelError

LabelNames = Sequence[str] | Mapping[int, str]

# What leads to files, what leads to weights and says whose they are, and what is told of those weights.
_PATHS = ("file", "source", "state_dict")
_SOURCES = ("url", "hf_hub_id", "hf_hub_filename", "tag", "license")
_NOTES = ("description", "origin_url", "paper_name", "paper_ids", "notes")


def description_of(model: nn.Module) -> dict[str, Any]:
    """A copy of timm's description of a model's weights and preprocessing; empty where there is none."""
    return dict(getattr(model, "pretrained_cfg", None) or {})


def name_of(model: nn.Module) -> str:
    """A model's architecture and the tag of its weights, as timm would take them; else its class."""
    config = description_of(model)
    parts = (config.get("architecture") or type(model).__name__, config.get("tag"))
    return ".".join(part for part in parts if part)


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's preprocessing, with the input size that the model was built for.

    Returns:
        `input_size` (channels, height, width in px), `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
    """
    config = {name: tuple(v) if isinstance(v, list) else v for name, v in resolve_input_data_config(model).items()}
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built_for:
        config["input_size"] = (config["input_size"][0], *built_for)
    return config


def fitting_label_names(model: nn.Module) -> tuple[str, ...] | dict[str, str] | None:
    """The classes' names in order or by index; None where there are none for a head of that many classes."""
    names, classes = description_of(model).get("label_names"), int(getattr(model, "num_classes", 0))
    if isinstance(names, Mapping):
        fits = all(str(index).isdecimal() and int(index) < classes for index in names)
        return {str(index): str(name) for index, name in names.items()} if names and fits else None
    return tuple(map(str, names)) if names and len(names) == classes else None


def make_true(model: nn.Module, *, own_weights: bool) -> None:
    """Makes timm's description true for what was built (input, classes, weights), and free of paths.

    Args:
        model: A timm model.
        own_weights: Whether the model has the weights that are described.
    """
    before = description_of(model)
    cfg = {**before, **data_config(model), "num_classes": int(getattr(model, "num_classes", 0))}
    if tuple(before["input_size"]) != cfg["input_size"]:
        cfg.pop("test_input_size", None)
        cfg.pop("test_crop_pct", None)
    if before.get("num_classes") != cfg["num_classes"]:
        cfg.pop("label_names", None)
        cfg.pop("label_descriptions", None)
    for name in _PATHS if own_weights else (*_PATHS, *_SOURCES, *_NOTES):
        cfg.pop(name, None)
    for name in ("pretrained_cfg", "default_cfg"):  # timm's two names for it
        setattr(model, name, cfg)


def label_names(model: nn.Module) -> LabelNames | None:
    """The label names in a model's `pretrained_cfg`, or None where it has none that fit its head.

    A model given another number of classes keeps the old names in its `pretrained_cfg`; those are not returned.
    """
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    classes = int(getattr(model, "num_classes", 0))
    if isinstance(names, Mapping):
        numbered = {int(index): str(name) for index, name in names.items()}  # JSON keys are strings
        return numbered if numbered and max(numbered) < classes else None
    return tuple(map(str, names)) if names and len(names) == classes else None


def require_head(model: nn.Module) -> int:
    """The number of a model's classes.

    Raises:
        ModelError: The model has no classification head, so there is no accuracy to measure.
    """
    classes = int(getattr(model, "num_classes", 0) or 0)
    if classes < 1:
        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
        raise ModelError(
            f"{name} has no classification head (num_classes=0), so there is no accuracy to measure; its cost is what "
            "tokencut profile tells. For a head name its architecture, with --num-classes N and a --checkpoint FILE "
            "that has one, or fine-tune it (tokencut compress --num-classes N --finetune-epochs 5 --train-data DIR)"
        )
    return classes
