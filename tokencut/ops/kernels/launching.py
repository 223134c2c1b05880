"""Launching a Triton kernel without looking anew at what follows from the shapes of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import triton
from torch import Tensor

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# From Triton 3.3 on a compiled kernel takes its constants behind its arguments; and up to 3.8, the newest looked at, it
# is run in this way, which `compiled[grid](...)` takes three calls to come to.
_TAKE_CONSTANTS, _RUN_DIRECTLY = _VERSION >= (3, 3), (3, 3) <= _VERSION <= (3, 8)
# Launches are remembered by shapes; a service that sees ever new ones does not fill the memory with them.
REMEMBERED = 1024

Made = TypeVar("Made")


def by_shape(make: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator of a function of shapes, strides and settings that prepares launches: each is prepared once."""
    return functools.lru_cache(maxsize=REMEMBERED)(make)


class Kernel:
    """A Triton kernel whose arguments are tensors, then numbers, then constants.

    Triton looks at each argument of each launch and puts a key together, for which a host takes 37 us with 25 of them,
    longer than the kernel runs on small batches. Here numbers and constants, which follow from shapes, are given once
    (`prepare`, in a function decorated by `by_shape`), and a launch looks at nothing but its tensors.
    """

    def __init__(self, function: Any) -> None:
        """Takes a function decorated by `triton.jit`."""
        self.function = function

    def prepare(self, grid: tuple[int, ...], *numbers: float, **settings: Any) -> Launch:
        """A launch on a grid that lacks its tensors.

        Args:
            grid: How many programs, in up to three dimensions.
            numbers: The arguments behind the tensors.
            settings: The constants by name, and Triton's own `num_warps`, `num_stages`, ...
        """
        return Launch(self.function, grid, numbers, settings)


class Launch:
    """One launch of a kernel for tensors of certain shapes, to be called with the tensors.

    A compiled kernel is remembered by what else Triton specialises it for: types and alignment, and the device.
    """

    __slots__ = ("_behind", "_function", "_grid", "_numbers", "_ready", "_settings")

    def __init__(
        self, function: Any, grid: tuple[int, ...], numbers: tuple[float, ...], settings: dict[str, Any]
    ) -> None:
        self._function, self._numbers, self._settings = function, numbers, settings
        self._grid = (*grid, 1, 1)[:3]
        self._ready: dict[Any, Any] = {}
        self._behind = numbers
        # Triton's interpreter, for tests without a GPU, compiles nothing.
        if isinstance(function, triton.JITFunction):
            names = [parameter.name for parameter in function.params if parameter.is_constexpr]
            self._behind += tuple(settings[name] for name in names)

    def __call__(self, *tensors: Tensor) -> None:
        """Launches the kernel on the current device, which is that of the tensors."""
        device, addresses = tensors[0].get_device(), [tensor.data_ptr() for tensor in tensors]
        key = (device, *[tensor.dtype for tensor in tensors], *[address % 16 == 0 for address in addresses])
        ready = self._ready.get(key)
        if ready is None:
            compiled = self._function[self._grid](*tensors, *self._numbers, **self._settings)
            if _TAKE_CONSTANTS and isinstance(self._function, triton.JITFunction):
                stream_of = triton.runtime.driver.active.get_current_stream
                self._ready[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata, stream_of
            return
        compiled, run, function, metadata, stream_of = ready
        if _RUN_DIRECTLY:
            # Of a tensor Triton would ask the driver where it is, once for each.
            run(*self._grid, stream_of(device), function, metadata, None, None, None, *addresses, *self._behind)
        else:
            compiled[self._grid](*tensors, *self._behind)
