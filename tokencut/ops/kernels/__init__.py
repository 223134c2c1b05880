"""Triton kernels for what many small operations do slowly on a GPU; the package works the same without them.

Each module says which plain PyTorch function it stands in for. They run on CUDA only: not where a gradient is asked for
of one without a backward, not where Triton is missing or the GPU is too old for it, and not where the environment
variable `TOKENCUT_KERNELS` is 0.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, library

_FOUND = importlib.util.find_spec("triton") is not None and os.environ.get("TOKENCUT_KERNELS", "1") != "0"
# Compute capability from which Triton's compiler supports a GPU.
_OLDEST = (8, 0)

# Up to so many tokens `matching` numbers the groups of an image in one program.
MATCHED_AT_ONCE = 4096
# Up to so many scores one program chooses the highest; beyond, ranking them fills the GPU better.
CHOSEN_AT_ONCE = 512

Launch = TypeVar("Launch", bound=Callable[..., Any])


# The modules, which import Triton, and are imported when they are first asked for: `kernels.merging.merge(...)`.
_MODULES = ("attention", "clusters", "matching", "medoids", "merging", "rotation", "sorting")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def usable(*tensors: Tensor, backward: bool = False) -> bool:
    """Whether a kernel may stand in for PyTorch's own operations on these tensors.

    Args:
        tensors: What it would be given.
        backward: Whether it has a backward, so that it may run where a gradient is asked for.
    """
    if not _FOUND or not tensors[0].is_cuda:
        return False
    graded = torch.is_grad_enabled() and not backward
    for tensor in tensors:
        if not tensor.is_cuda or (graded and tensor.requires_grad):
            return False
    return _recent(tensors[0].device)


@torch.compiler.assume_constant_result
def _recent(device: torch.device) -> bool:
    return _capability(device) >= _OLDEST


@functools.cache  # asked before every launch
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def opaque(
    schema: str, shapes: Callable[..., Any], backward: tuple[Callable[..., Any], Callable[..., None]] | None = None
) -> Callable[[Launch], Launch]:
    """Decorator: makes a function that launches kernels an operator of its own while `torch.compile` traces.

    The compiler's own analysis of user-written kernels crashed on some of ours (torch 2.11). Elsewhere the function is
    called as it is, without the dispatcher's detour. Either way on the GPU of its first argument, which Triton would
    not ask for.

    Args:
        schema: Arguments and results in PyTorch's notation.
        shapes: A function of the same arguments that returns empty results of the right shapes.
        backward: How gradients go through, as torch's `register_autograd` takes it: the backward, and what keeps what
            it needs. None for an operator that no gradient goes through.
    """

    def wrap(launch: Launch) -> Launch:
        @functools.wraps(launch)
        def there(*args: Any) -> Any:
            with torch.cuda.device(args[0].device) if args[0].is_cuda else contextlib.nullcontext():
                return launch(*args)

        operator = library.custom_op(f"tokencut::{launch.__name__}", there, mutates_args=(), schema=schema)
        operator.register_fake(shapes)
        if backward is not None:
            operator.register_autograd(backward[0], setup_context=backward[1])

        @functools.wraps(launch)
        def call(*args: Any) -> Any:
            first = args[0]
            if torch.compiler.is_compiling() or (backward and torch.is_grad_enabled() and first.requires_grad):
                return operator(*args)
            # Entering the context takes a third of a launch's time, and nearly always the device is the current one.
            if first.is_cuda and first.get_device() != torch.cuda.current_device():
                return there(*args)
            return launch(*args)

        return call  # type: ignore[return-value]

    return wrap
