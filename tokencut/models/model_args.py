"""The arguments that describe a timm architecture: typed by a user, kept in a file, and believed in neither case."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import timm
from timm.models import build_model_with_cfg

from tokencut.errors import UsageError
from tokencut.limits import check_number
from tokencut.messages import shorten

# Arguments of timm's factory that choose weights, files or wrappers rather than describe an architecture: a file that
# could set `checkpoint_path` or `pretrained_cfg` would make loading it read another file, or ask the network.
RESERVED = frozenset(
    {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    | {"device", "dtype", "feature_cls", "features_only", "out_indices", "pruned", "use_naflex"}
) - {"kwargs"}  # fmt: skip

# What to type instead of a reserved argument.
_INSTEAD = {
    "pretrained": "`pretrained=False` for random weights",
    "checkpoint_path": "`checkpoint='FILE'`",
    "pretrained_cfg": "a tag in the model's name, such as deit_tiny.fb_in1k",
    "model_name": "the name as MODEL",
    "dtype": "`precision`",
    "device": "`device`",
}

# Far above any real architecture's (widest 4,096; 1,024 px), far below what fills a memory.
_LARGEST = 1 << 16
_DEEPEST = 3
# Each within memory, and yet what some of them come to would take minutes.
_BOUNDED = ("depth", "img_size", "num_classes")
_PAIR = re.compile(r",(?=\s*[A-Za-z_]\w*\s*=)")
_WORDS = {"true": True, "false": False, "none": None}


def parse_model_kwargs(texts: Iterable[str]) -> dict[str, Any]:
    """Reads arguments for timm out of texts.

    Args:
        texts: Each `key=value`, or several joined by commas. Values are Python literals (`img_size=(32,64)`); true,
            false and none in any case; or else strings.

    Returns:
        Values by name.

    Raises:
        UsageError: Not of that form, a name twice, or a name that is not an architecture's argument.
    """
    found: dict[str, Any] = {}
    for text in texts:
        for pair in _PAIR.split(text):
            key, equals, value = (part.strip() for part in pair.partition("="))
            if not equals or not key.isidentifier() or not value:
                raise UsageError(f"`model_kwargs` {pair!r} is not key=value; type `model_kwargs='img_size=384'`")
            if key in found:
                raise UsageError(f"`model_kwargs` gives {key} twice; give it once, such as {key}={value}")
            found[key] = _literal(value)
    check_model_args(found)
    return found


def check_model_args(args: Mapping[str, Any]) -> None:
    """Refuses arguments that do not describe an architecture in plain values.

    Args:
        args: timm's arguments by name.

    Raises:
        UsageError: A name is reserved, or a value is not made of numbers, strings, true, false and none.
    """
    for name, value in args.items():
        if name in RESERVED:
            instead = f"; use {_INSTEAD[name]}" if name in _INSTEAD else "; leave it out"
            raise UsageError(f"{name} is not an argument of the architecture{instead}")
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if name in _BOUNDED and isinstance(number, (int, float)):
                check_number(name, number)
        problem = _problem(value, _DEEPEST)
        if problem:
            raise UsageError(f"the model's argument {name} is {shorten(value)}, which is {problem}; use numbers, "
                             "strings, true, false or none, or lists of them")  # fmt: skip


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _problem(value: Any, depth: int) -> str | None:
    """What is wrong with a value, or None."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        if not abs(value) <= _LARGEST:  # so written that nan is refused too
            return f"not a number from -{_LARGEST} to {_LARGEST}"
        return None
    if isinstance(value, str):
        return None if len(value) <= 1000 else "too long a string"
    if not isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__}, not a plain value"
    if depth == 0 or len(value) > 1000:
        return "too large a list"
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return "a dict whose keys are not strings"
        value = tuple(value.values())
    return next((found for item in value if (found := _problem(item, depth - 1))), None)
