"""Launching a Triton kernel without asking anew what it was compiled for."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

# Before Triton 3.3 a compiled kernel took its constants in another way.
_COMPILED_TAKE_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
# What was launched is remembered by shapes; a service that sees ever new ones does not fill the memory with them.
REMEMBERED = 1024


class Kernel:
    """A Triton kernel, launched as Triton launches it: `kernel[grid](*arguments, **settings)`.

    Triton looks at each argument of each launch and puts a key together, for which a host takes 37 us with 25 of them,
    longer than the kernel runs on small batches. Here the compiled kernel is remembered by what it was specialised
    for: the shapes (which follow from the numbers given), the types and the alignment of the tensors, and the device.
    """

    def __init__(self, function: Any) -> None:
        """Takes a function decorated by `triton.jit`."""
        self.function = function
        self._compiled: dict[Any, Any] = {}
        # Triton's interpreter, for tests without a GPU, has nothing compiled to remember.
        self._remembers = _COMPILED_TAKE_CONSTANTS and isinstance(function, triton.JITFunction)
        self._names = [parameter.name for parameter in function.params] if self._remembers else []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return _Launch(self, grid) if self._remembers else self.function[grid]


class _Launch:
    """One launch of a kernel on a grid."""

    __slots__ = ("grid", "kernel")

    def __init__(self, kernel: Kernel, grid: tuple[int, ...]) -> None:
        self.kernel, self.grid = kernel, grid

    def __call__(self, *arguments: Any, **settings: Any) -> None:
        kernel = self.kernel
        key = (
            torch.cuda.current_device(), *settings.values(),
            *[
                (argument.dtype, argument.data_ptr() % 16 == 0) if isinstance(argument, Tensor) else argument
                for argument in arguments
            ],
        )  # fmt: skip
        ready = kernel._compiled.get(key)
        if ready is None:
            compiled = kernel.function[self.grid](*arguments, **settings)
            if len(kernel._compiled) >= REMEMBERED:
                kernel._compiled.clear()
            # Constants follow the arguments, in the order of the function's own parameters.
            behind = tuple(settings[name] for name in kernel._names[len(arguments) :])
            kernel._compiled[key] = (compiled, behind)
            return
        compiled, behind = ready
        x, y, z = (*self.grid, 1, 1)[:3]
        compiled[x, y, z](*arguments, *behind)
