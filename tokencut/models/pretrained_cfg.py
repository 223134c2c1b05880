"""timm's description of a model (`pretrained_cfg`): read for what was built, and made true for it.

timm leaves there what the weights were made for, also where another input size or number of classes was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from tokencut.adapters import known_adapter
from tokencut.errors import ModelError, UsageError
from tokencut.limits import LIMITS
from tokencut.models.fields import INTERPOLATIONS, LabelNames, named_by

EXAMPLES = {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225", "crop_pct": "0.9"}

# What leads to files, what leads to weights and says whose they are, and what is told of those weights.
_PATHS = ("file", "source", "state_dict")
_SOURCES = ("url", "hf_hub_id", "hf_hub_filename", "tag", "license")
_NOTES = ("description", "origin_url", "paper_name", "paper_ids", "notes")


def description_of(model: nn.Module) -> dict[str, Any]:
    """A copy of timm's description of a model's weights and preprocessing; empty where there is none."""
    return dict(getattr(model, "pretrained_cfg", None) or {})


def architecture_of(model: nn.Module) -> str:
    """timm's name of a model's architecture; else its class."""
    return description_of(model).get("architecture") or type(model).__name__


def name_of(model: nn.Module) -> str:
    """A model's architecture and the tag of its weights, as timm would take them; else its class."""
    return ".".join(part for part in (architecture_of(model), description_of(model).get("tag")) if part)


def class_count(model: nn.Module) -> int:
    """The number of a model's classes, also of a head that was put there by hand; 0 without a head."""
    adapter = known_adapter(model)
    return adapter.num_classes(model) if adapter else int(getattr(model, "num_classes", 0) or 0)


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's preprocessing, with the input size and the channels that the model was built for.

    Args:
        model: A timm model, or one around it.

    Returns:
        `input_size` (channels, height and width in px), `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
    """
    found = resolve_data_config(pretrained_cfg=description_of(model), model=model)
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    channels, *size = config["input_size"]
    inner = _inner(model)
    config["input_size"] = (_channels(inner) or channels, *(_built_for(inner) or size))
    return config


def frames_of(model: nn.Module) -> int | None:
    """Frames of the clips that a model takes, `(B, C, frames, H, W)`; None for one of images."""
    told = description_of(model).get("frames")
    inner = _inner(model)
    adapter = None if told else known_adapter(inner)
    return told if adapter is None else adapter.frames(inner)


def _inner(model: nn.Module) -> nn.Module:
    """The timm model inside others, such as a compressed one."""
    inside = getattr(model, "model", None)
    return _inner(inside) if isinstance(inside, nn.Module) and known_adapter(model) is None else model


def _built_for(model: nn.Module) -> tuple[int, int] | None:
    """The height and width of images that a model takes, where it tells; models of other families as most of timm's."""
    adapter = known_adapter(model)
    return adapter.input_size(model) if adapter else getattr(getattr(model, "patch_embed", None), "img_size", None)


def _channels(model: nn.Module) -> int | None:
    """The channels that a model's first convolution takes, where timm says which that is."""
    first = description_of(model).get("first_conv")
    try:
        return getattr(model.get_submodule(first), "in_channels", None) if isinstance(first, str) else None
    except AttributeError:
        return None


def check_preprocessing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks what is to take the place of a model's own preprocessing.

    Args:
        given: Some of `mean` and `std` (a number, or one a channel), `crop_pct` and `interpolation`.

    Returns:
        The same as timm's description holds it.

    Raises:
        UsageError: A value that no preprocessing has.
    """
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name == "interpolation":
            if value not in INTERPOLATIONS:
                raise UsageError(f"interpolation {value!r} is none of {', '.join(INTERPOLATIONS)}; give bicubic")
            checked[name] = value
            continue
        numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        limits = LIMITS[name]
        if len(numbers) not in ((1,) if name == "crop_pct" else (1, 3)) or not all(map(limits.allow, numbers)):
            shown, many = ",".join(map(str, numbers)), "" if name == "crop_pct" else ", one or three of them"
            raise UsageError(f"{name} {shown} is not {limits.expected}{many}; give such as "
                             f"{EXAMPLES[name]}")  # fmt: skip
        checked[name] = numbers[0] if name == "crop_pct" else numbers * (3 // len(numbers))
    return checked


def sync_pretrained_cfg(model: nn.Module, *, own_weights: bool) -> None:
    """Makes timm's description true for what was built (input, classes, weights), and free of paths.

    Args:
        model: A timm model.
        own_weights: Whether the model has the weights that are described.
    """
    before = description_of(model)
    cfg = {**before, **data_config(model), "num_classes": class_count(model)}
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
    """The names of a model's classes, in order or by number; None where there are none that fit its head.

    A model given another number of classes keeps the old names in its `pretrained_cfg`; those are not returned.
    """
    names, classes = description_of(model).get("label_names"), class_count(model)
    if not names or not named_by(names, classes):
        return None
    if isinstance(names, Mapping):  # JSON keys are strings
        return {int(index): str(name) for index, name in names.items()}
    return tuple(map(str, names))


def require_head(model: nn.Module, lacking: str = "accuracy to measure") -> int:
    """The number of a model's classes.

    Args:
        model: The model.
        lacking: What there is not without a head.

    Raises:
        ModelError: The model has no classification head.
    """
    classes = class_count(model)
    if classes < 1:
        raise ModelError(
            f"{architecture_of(model)} has no classification head (num_classes=0), so there is no {lacking}; "
            "its cost is what `tokencut.profile` tells. For a head name its architecture, with `num_classes=N` and "
            "a `checkpoint='FILE'` that has one, or fine-tune a new one (`num_classes=N, epochs=5, train_data='DIR'`)"
        )
    return classes
