"""Tensors that are made of others, as quantised weights are of whole numbers and their scales: what they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_composite(tensor: Tensor) -> bool:
    """Whether a tensor has no memory of its own and is made of others."""
    known: Any = tensor  # else mypy takes torch's type guard for one that no tensor passes
    return bool(is_traceable_wrapper_subclass(known))


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors with memory of their own that a tensor is made of; itself where it is plain."""
    if not is_composite(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def all_finite(tensor: Tensor) -> bool:
    """Whether all numbers that a tensor holds are finite."""
    # torch has no isfinite for numbers of eight bits.
    parts = (part.float() if part.is_floating_point() and part.itemsize == 1 else part for part in plain_parts(tensor))
    return all(bool(torch.isfinite(part).all()) for part in parts)
