"""What each field of a tokencut file may hold: a rule is a test and its words, and looks at no other field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tokencut.messages import shorten
from tokencut.models.names import architectures
from tokencut.models.pretrained_cfg import LabelNames

ORIGINS = ("hub", "url", "checkpoint", "local-dir", "bundled", "random", "unverified")
MAX_BLOCKS = 1_000

# The test, and what was expected in words.
Rule = tuple[Callable[[Any], bool], str]


def problem(data: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> str | None:
    """The first field that is unknown, missing, or does not hold what it may.

    Args:
        data: A JSON object.
        rules: A rule for each of its fields.
        where: What stands before a field's name in the text.

    Returns:
        The end of a sentence that begins with "its metadata", or None.
    """
    for name in sorted(data.keys() ^ rules.keys()):
        return f" has {'an unknown' if name in data else 'no'} field {where}{shorten(name)[1:-1]}"
    for name, (test, expected) in rules.items():
        if not test(data[name]):
            return f"'s {where}{name} is {shorten(data[name])}, not {expected}"
    return None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_labels(value: Any) -> bool:
    by_index = isinstance(value, dict) and all(key.isdecimal() and isinstance(name, str) for key, name in value.items())
    return value is None or by_index or _is_texts(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 3 and all(type(item) is int and 0 < item < 65536 for item in value)


def is_numbers(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 1000 and all(map(is_number, value))


def _optional(rule: Rule) -> Rule:
    return (lambda value: value is None or rule[0](value)), f"{rule[1]} or null"


def _list_of(kind: type) -> Rule:
    return (
        lambda value: isinstance(value, list) and 0 < len(value) <= MAX_BLOCKS and all(type(v) is kind for v in value),
        f"a list of up to {MAX_BLOCKS} {kind.__name__}",
    )


def labels_to_json(names: LabelNames | None) -> Any:
    """Label names for a file: the keys of JSON's objects are strings."""
    return {str(index): name for index, name in names.items()} if isinstance(names, dict) else names


def labels_from_json(value: Any) -> LabelNames | None:
    """Label names out of a file, where the rule for them holds."""
    if isinstance(value, dict):
        return {int(index): name for index, name in value.items()}
    return None if value is None else tuple(value)


_TEXT: Rule = (lambda value: isinstance(value, str), "a string")
_TEXT_OR_LIST: Rule = (lambda value: isinstance(value, str) or _is_texts(value), "a string or a list of strings")
_OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")
_NUMBER: Rule = (is_number, "a number")
_SIZE: Rule = (_is_size, "a list of up to three positive whole numbers")
_INPUT: Rule = (lambda value: _is_size(value) and len(value) == 3, "channels, height and width")

FIELDS: dict[str, Rule] = {
    "type": _TEXT,
    "format": _NUMBER,
    "architecture": (lambda value: isinstance(value, str) and value in architectures(), "a supported model's name"),
    "model_args": _OBJECT,
    "recipe": _OBJECT,
    "keep_per_block": _list_of(float),
    "tokens_per_block": _list_of(int),
    "preprocessing": _OBJECT,
    "pretrained_cfg": _OBJECT,
    "label_names": (_is_labels, "a list of strings, strings by index, or null"),
    "origin": _OBJECT,
    "measured": _OBJECT,
}
PREPROCESSING: dict[str, Rule] = {
    "input_size": _INPUT,
    "interpolation": _TEXT,
    "mean": (is_numbers, "a list of numbers"),
    "std": (lambda value: is_numbers(value) and all(item > 0 for item in value), "a list of positive numbers"),
    "crop_pct": (lambda value: is_number(value) and value > 0, "a positive number"),
    "crop_mode": _TEXT,
}
# Of timm's description of its weights: no place to load from, and nothing that is said elsewhere.
PRETRAINED_CFG: dict[str, Rule] = {
    "tag": _optional(_TEXT),
    "fixed_input_size": _optional((lambda value: isinstance(value, bool), "true or false")),
    "first_conv": _optional(_TEXT_OR_LIST),
    "classifier": _optional(_TEXT_OR_LIST),
    "pool_size": _optional(_SIZE),
    "test_input_size": _optional(_INPUT),
    "test_crop_pct": _optional(_NUMBER),
    "min_input_size": _optional(_INPUT),
}
ORIGIN: dict[str, Rule] = {
    "kind": (lambda value: value in ORIGINS, f"one of {', '.join(ORIGINS)}"),
    "name": _optional(_TEXT),
    "sha256": _optional(_TEXT),
    "seed": _optional((lambda value: type(value) is int, "a whole number")),
    "licence": _optional(_TEXT),
}
