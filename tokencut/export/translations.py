"""How torch's operators become ONNX's where torch.onnx knows none, or one whose output's shape only a runtime can tell.

What prepares a file for static quantisation or TensorRT infers shapes first (`onnxruntime.tools.symbolic_shape_infer`).
It has no rule for reductions whose axes are an input, as they are since opset 18, save sums and means.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch


def translations() -> dict[Any, Callable[..., Any]]:
    """The translations, as `torch.onnx.export` takes them, by torch's operators."""
    aten = torch.ops.aten
    return {
        aten.sort.stable: _stable_sort,
        aten.amin.default: _lowest,
        aten.amax.default: _highest,
        aten.min.dim: _lowest_and_where,
        aten.max.dim: _highest_and_where,
        aten.linalg_vector_norm.default: _vector_norm,
    }


def _op() -> Any:
    return importlib.import_module("onnxscript").opset18


def _stable_sort(self: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
    """TopK puts the lower index first among equals, as a stable sort does."""
    op = _op()
    length = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, length, axis=dim, largest=int(descending), sorted=1)


def _extreme(values: Any, dim: int, keepdim: bool, largest: bool) -> tuple[Any, Any]:
    """The extreme along an axis and its lowest index, by one operator whose output's shape is plain."""
    op = _op()
    found, index = op.TopK(values, op.Constant(value_ints=[1]), axis=dim, largest=int(largest), sorted=1)
    if keepdim:
        return found, index
    axes = op.Constant(value_ints=[dim])
    return op.Squeeze(found, axes), op.Squeeze(index, axes)


def _lowest_and_where(self: Any, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
    return _extreme(self, dim, keepdim, largest=False)


def _highest_and_where(self: Any, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
    return _extreme(self, dim, keepdim, largest=True)


def _over_axes(values: Any, dim: Sequence[int], keepdim: bool, largest: bool) -> Any:
    op = _op()
    if not len(dim):  # all: without axes
        return (op.ReduceMax if largest else op.ReduceMin)(values, keepdims=int(keepdim))
    for axis in dim:
        values, _ = _extreme(values, axis, True, largest)
    return values if keepdim else op.Squeeze(values, op.Constant(value_ints=list(dim)))


def _lowest(self: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    return _over_axes(self, dim, keepdim, largest=False)


def _highest(self: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    return _over_axes(self, dim, keepdim, largest=True)


def _vector_norm(
    self: Any, ord: float = 2.0, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: int = -1  # noqa: A002
) -> Any:  # fmt: skip
    """The Euclidean length and the sum of absolute values, by a sum."""
    if ord not in (1, 2) or not dim or dtype != -1:
        theirs = importlib.import_module("onnxscript.function_libs.torch_lib.ops.linalg")
        return theirs.aten_linalg_vector_norm(self, ord, dim, keepdim, dtype)
    op = _op()
    axes = op.Constant(value_ints=list(dim))
    if ord == 1:
        return op.ReduceSum(op.Abs(self), axes, keepdims=int(keepdim))
    return op.Sqrt(op.ReduceSum(op.Mul(self, self), axes, keepdims=int(keepdim)))
