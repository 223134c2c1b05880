"""May this run go on with what an earlier one left: the same conditions, and the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tokencut.composite import plain_parts
from tokencut.errors import ArtifactError

# Longer values, such as digests, say nothing to people.
TOLD = 40


def require_same(what: str, made: Mapping[str, str], now: Mapping[str, str], otherwise: str) -> None:
    """Refuses to go on with what was made under other conditions.

    Args:
        what: What was found, and where; the beginning of the error.
        made: The conditions it was made under, by the words that name them.
        now: Those of the run that wants to go on.
        otherwise: What to do instead; the end of the error.

    Raises:
        ArtifactError: Naming all that differ, with their values where they are short.
    """
    changed = [name for name, value in now.items() if made.get(name) != value]
    if changed:
        others = " and ".join(f"other {name}{_told(made.get(name, 'nothing'), now[name])}" for name in changed)
        raise ArtifactError(f"{what} made with {others}; {otherwise}")


def _told(before: str, after: str) -> str:
    return f" ({before}, not {after})" if max(len(before), len(after)) <= TOLD else ""


def weights_digest(module: nn.Module, *beside: object) -> str:
    """SHA-256 of all weights and buffers, by name, in hexadecimal.

    Args:
        module: The model.
        beside: What it has beside them, such as its number of heads, with a `repr` that is the same in every process.
    """
    digest = hashlib.sha256(repr(beside).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in plain_parts(tensor.detach()):
            numbers: Any = part.cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(numbers)
    return digest.hexdigest()
