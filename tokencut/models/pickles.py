"""What `torch.save` wrote, read without running anything that the file names.

A pickle calls whatever it names. torch's `weights_only` refuses a file that names anything but tensors, and so refuses
most training checkpoints, which hold their settings too. Here everything unknown is stood in for by an empty object,
which keeps what the file gives it and does nothing.
"""

from __future__ import annotations

import collections
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class StandIn(dict[Any, Any]):
    """In place of an object whose class must not be looked up; it has the object's items, and its state.

    Attributes:
        state: What the file says are the object's attributes; empty where it says nothing that is known.
    """

    state: Mapping[str, Any] = {}

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        """Whatever the arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, Mapping) else {}

    def __call__(self, *_: Any, **__: Any) -> StandIn:
        return StandIn()

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def append(self, _: Any) -> None:
        """As of a list, or a set; what is in them is of no use here."""

    add = extend = append


class _Called:
    """A function that is known to be harmless, with no attribute that a file could replace."""

    __slots__ = ("_function",)
    _function: Any

    def __init__(self, function: Any) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"{name} of {self._function} cannot be set")

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


# How torch writes tensors.
_REBUILD = (
    "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter",
    "_rebuild_parameter_with_state",
)  # fmt: skip
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Called(collections.OrderedDict),
    ("torch", "Size"): _Called(torch.Size),
    ("torch", "device"): _Called(torch.device),
    **{
        ("torch._utils", name): _Called(getattr(torch._utils, name)) for name in _REBUILD if hasattr(torch._utils, name)
    },
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get((module, name))
        return StandIn if found is None else found


class _Pickle:
    """What `torch.load` takes for the module `pickle`."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()


class TorchScriptError(Exception):
    """The file is a TorchScript archive, whose content is code."""


def read_pickle(path: Path) -> Any:
    """What a file of `torch.save` holds, on the CPU.

    Args:
        path: An existing file, in either of torch's two formats.

    Returns:
        The object, with a `StandIn` for all but tensors, numbers, texts and plain containers.

    Raises:
        TorchScriptError: It is a TorchScript archive.
        Exception: Whatever torch raises over a damaged file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is told here in other words
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_Pickle)
        except RuntimeError as error:  # before anything of it is read
            if "TorchScript" in str(error):
                raise TorchScriptError(str(path)) from error
            raise


def state_dict_of(model: StandIn, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a module that was pickled whole, by the names that its `state_dict` has.

    Args:
        model: What stands in for it.
        prefix: What its names begin with.
    """
    found: dict[str, Tensor] = {}
    passing = model.state.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, (set, frozenset)) else frozenset()
    for kind in ("_parameters", "_buffers"):
        held = model.state.get(kind)
        for name, tensor in held.items() if isinstance(held, Mapping) else ():
            if isinstance(tensor, Tensor) and name not in passing:
                found[f"{prefix}{name}"] = tensor.detach()
    parts = model.state.get("_modules")
    for name, part in parts.items() if isinstance(parts, Mapping) else ():
        if isinstance(part, StandIn):
            found |= state_dict_of(part, f"{prefix}{name}.")
    return found
