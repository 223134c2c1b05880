"""What each field of a tokencut file may hold, an exported model's among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokencut.limits import LIMITS
from tokencut.messages import index_in
from tokencut.models.alterations import POOLS
from tokencut.schema import (
    LONGEST,
    NUMBER,
    POSITIVE,
    TEXT,
    TRUTH,
    WHOLE,
    Fields,
    Rule,
    is_list_of,
    is_number,
    is_whole,
    optional,
)

# In the order of the logits, or by their numbers.
LabelNames = tuple[str, ...] | dict[int, str]

# What timm's transforms know.
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")

# ImageNet-21k's label names are some 0.5 MB; nothing else in a file is near that.
MAX_LENGTH = 8_000_000
MAX_BLOCKS = LONGEST

ORIGINS = ("hub", "url", "checkpoint", "local-dir", "bundled", "random", "unverified")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_labels(value: Any) -> bool:
    # ImageNet-21k has 21,841 classes; the length of the whole is what limits them.
    if isinstance(value, dict):
        return all(index_in(key) is not None and _is_text(name) for key, name in value.items())
    return value is None or is_list_of(_is_text, value, most=MAX_LENGTH)


def _is_size(value: Any, least: int = 0) -> bool:
    return is_list_of(lambda item: is_whole(item, 1, 65535), value, least, 3)


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def labels_to_json(names: LabelNames | None) -> Any:
    """Label names for a file: the keys of JSON's objects are strings."""
    return {str(index): name for index, name in names.items()} if isinstance(names, dict) else names


def labels_from_json(value: Any) -> LabelNames | None:
    """Label names out of a file, where the rule for them holds."""
    if isinstance(value, dict):
        return {int(index): name for index, name in value.items()}
    return None if value is None else tuple(value)


def named_by(names: Any, classes: int) -> bool:
    """Whether names, in order or by number, are those of so many classes."""
    if isinstance(names, Mapping):
        numbers = [index_in(index) for index in names]
        return all(number is not None and number < classes for number in numbers)
    return isinstance(names, (list, tuple)) and len(names) == classes


def as_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The same with tuples for lists, as timm has them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def per_block(kind: type) -> Rule:
    """A list with a number of one kind for each block."""
    return Rule(lambda value: is_list_of(lambda item: type(item) is kind, value, 1, MAX_BLOCKS),
                f"a list of up to {MAX_BLOCKS} {kind.__name__}")  # fmt: skip


def preprocessing_problem(config: Mapping[str, Any]) -> str | None:
    """What is wrong with timm's data config, as a rule tells it; None where images can be prepared by it."""
    known = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    return PREPROCESSING.problem(known)


_TEXT_OR_LIST = Rule(lambda value: _is_text(value) or is_list_of(_is_text, value), "a string or a list of strings")
_INPUT = Rule(lambda value: _is_size(value, 3), "channels, height and width")

LABEL_NAMES = Rule(_is_labels, "a list of strings, strings by index, or null")
PREPROCESSING = Fields({
    "input_size": _INPUT,
    "interpolation": Rule(lambda value: value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "mean": Rule(lambda value: is_list_of(is_number, value, 1), "a list of numbers"),
    "std": Rule(lambda value: is_list_of(_is_positive, value, 1), "a list of positive numbers"),
    "crop_pct": Rule(LIMITS["crop_pct"].allow, LIMITS["crop_pct"].expected),
    "crop_mode": Rule(lambda value: value in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
})  # fmt: skip
# Of timm's description of its weights: no place to load from, and nothing that is said elsewhere.
PRETRAINED_CFG = Fields({
    "tag": optional(TEXT),
    "fixed_input_size": optional(TRUTH),
    "first_conv": optional(_TEXT_OR_LIST),
    "classifier": optional(_TEXT_OR_LIST),
    "pool_size": optional(Rule(_is_size, "a list of up to three positive whole numbers")),
    "test_input_size": optional(_INPUT),
    "test_crop_pct": optional(NUMBER),
    "min_input_size": optional(_INPUT),
}, partial=True)  # fmt: skip
ALTERATIONS = Fields({
    "norm_eps": POSITIVE,
    "pool": Rule(lambda value: value in POOLS, f"one of {', '.join(POOLS)}"),
}, partial=True)  # fmt: skip
# Read without torch, so named here: `quantized.KINDS` tells what they are.
QUANTIZED = Rule(lambda value: value in ("int8", "fp8"), "int8 or fp8")
ORIGIN = Fields({
    "kind": Rule(lambda value: value in ORIGINS, f"one of {', '.join(ORIGINS)}"),
    "name": optional(TEXT),
    "sha256": optional(TEXT),
    "seed": optional(WHOLE),
    "licence": optional(TEXT),
})  # fmt: skip
MEASURED = Fields(
    dict.fromkeys(("dense_gmacs", "gmacs", "dense_top1", "top1", "dense_top5", "top5", "images"), optional(NUMBER)),
    partial=True,
)
