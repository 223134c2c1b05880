"""Numbers and small tensors that follow from sizes alone: made once, and again where something records what is done."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Known = TypeVar("Known")

# Of so many sizes; those of one model are a handful.
KEPT = 256


def known(function: Callable[..., Known]) -> Callable[..., Known]:
    """Decorator of a function of plain numbers that each forward asks: it remembers what it has found.

    Not while the compiler traces, which reads the function itself.
    """
    remembered = lru_cache(maxsize=KEPT)(function)

    @wraps(function)
    def asked(*numbers: int) -> Known:
        return function(*numbers) if torch.compiler.is_compiling() else remembered(*numbers)

    return asked


def constant(make: Callable[..., Tensor], *sizes: Hashable, like: Tensor) -> Tensor:
    """A tensor of a few numbers that need not be computed anew in each forward, of which each took a dozen kernels.

    Args:
        make: Makes it in fp32 from the sizes and a device; a function of a module, by which it is known again.
        sizes: What it is made from.
        like: A tensor of the dtype and on the device that it is to have. The result is not to be written to.
    """
    if _is_recorded(like):
        return make(*sizes, like.device).to(like.dtype)
    return _kept(make, sizes, like.device, like.dtype)


@lru_cache(maxsize=KEPT)
def _kept(make: Callable[..., Tensor], sizes: tuple[Hashable, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # Made in a forward without gradients it would be no good for training.
    with torch.inference_mode(mode=False), torch.no_grad():
        return make(*sizes, device).to(dtype)


def _is_recorded(like: Tensor) -> bool:
    """Whether a compiler, a tracer or a CUDA graph is looking on, which may not find what others have made."""
    return is_traced() or (like.is_cuda and torch.cuda.is_current_stream_capturing())


def is_traced() -> bool:
    """The same of a compiler or a tracer alone."""
    return (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None
    )  # fmt: skip
