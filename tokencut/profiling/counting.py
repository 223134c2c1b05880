"""Multiply-adds of any model, counted by fvcore on a trace that computes nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from tokencut.flop_handles import COUNTED, MOVES, UNCOUNTED, Handle, plain_name
from tokencut.runtime.devices import weights_dtype


@dataclass(frozen=True)
class MacCount:
    """Multiply-adds of a forward, one counted as one.

    Attributes:
        total: Over the whole model.
        by_module: By the module's name, its children included; a product that no module of its own does (fused
            attention is a function) counts for the module around it.
        uncounted: Operators that nobody has a handle for, with how often they ran; normally empty.
        ignored: By group (`norms`, `softmax`, ...), the operators that ran and by convention are not counted.
    """

    total: int
    by_module: Mapping[str, int]
    uncounted: Mapping[str, int]
    ignored: Mapping[str, tuple[str, ...]]


def count_macs(model: nn.Module, input_size: Sequence[int]) -> MacCount:
    """Counts the multiply-adds of one image.

    The model is neither run nor changed: a copy without weights is traced on the meta device, so that even a giant
    costs no memory and no time. Where an operator does not run there, a copy is traced on the CPU.

    Args:
        model: Any model that takes one batch of images.
        input_size: `(C, H, W)` of an image.

    Returns:
        The count, as in evaluation mode.
    """
    dtype = weights_dtype(model)
    try:
        return _trace(_weightless(model), torch.zeros(1, *input_size, dtype=dtype, device="meta"))
    except (RuntimeError, NotImplementedError, TypeError):
        # Not on a GPU, whose kernels of ours the tracer would not see.
        return _trace(copy.deepcopy(model).cpu().eval(), torch.zeros(1, *input_size, dtype=dtype))


def _trace(model: nn.Module, images: Tensor) -> MacCount:
    seen: set[str] = set()
    analysis = _flop_count_analysis()(model, images)
    # Cleared first: fvcore lets its own handle for LayerNorm win over being told to ignore the operator.
    analysis.clear_op_handles()
    analysis.set_op_handle(**COUNTED, **{kind: _noting(kind, seen) for kind in UNCOUNTED}, **dict.fromkeys(MOVES))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad(), _PlainSizes():
        total = int(analysis.total())
    groups: dict[str, set[str]] = {}
    for kind in seen:
        groups.setdefault(UNCOUNTED[kind], set()).add(plain_name(kind))
    return MacCount(
        total=total,
        by_module={name: int(count) for name, count in analysis.by_module().items()},
        uncounted=dict(analysis.unsupported_ops()),
        ignored={group: tuple(sorted(names)) for group, names in sorted(groups.items())},
    )


def _flop_count_analysis() -> Callable[[nn.Module, Tensor], Any]:
    """fvcore's counter. Importing it warns seven times of the `torch.jit.script` it uses, which users cannot act on."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", category)
        from fvcore.nn import FlopCountAnalysis
    return FlopCountAnalysis


def _noting(kind: str, seen: set[str]) -> Handle:
    def note(inputs: list[Any], outputs: list[Any]) -> int:
        seen.add(kind)
        return 0

    return note


class _PlainSizes(TorchFunctionMode):
    """Under the tracer a tensor's sizes are tensors themselves; schedules and budgets are worked out with numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # `==`, since every look at `Tensor.shape` makes a new wrapper.
        if func == torch.Tensor.shape.__get__ or func == torch.Tensor.size:  # type: ignore[attr-defined]
            return torch.Size(map(int, result)) if isinstance(result, tuple) else int(result)
        return result


def _weightless(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in evaluation mode; convolutions stay on the CPU with one zero for all weights.

    The tracer records convolutions below where the meta device takes over, so that there they would be missing from the
    count without a word. A Vision Transformer has one, 1 to 3 % of its multiply-adds.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        device = "cpu" if isinstance(module, _ConvNd) else "meta"
        for weight in module.parameters(recurse=False):
            memo[id(weight)] = nn.Parameter(_hollow(weight, device), requires_grad=False)
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = _hollow(buffer, device)
    hollow = copy.deepcopy(model, memo).eval()
    for module in hollow.modules():
        if isinstance(module, _ConvNd):
            # Made from what comes in and goes out, so that the trace stays in one piece.
            module.register_forward_pre_hook(lambda _, inputs: (torch.zeros_like(inputs[0], device="cpu"),))
            module.register_forward_hook(lambda _, inputs, output: output.to("meta"))
    return hollow


def _hollow(tensor: Tensor, device: str) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
