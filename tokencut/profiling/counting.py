"""Multiply-adds of any model, counted by fvcore on a trace that computes nothing: a handle for each product.

Convention (fvcore's and the papers'): one multiply-add counts as one, over convolutions, linear layers, matrix products
and attention (QK' and PV). All counts follow from the shapes in a trace. fvcore's own handles are not used: its matmul
takes the first operand's shape where operands broadcast, its einsum rounds to four digits, it has none for fused
attention, and it counts LayerNorm as 5 per element.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tokencut.runtime.devices import weights_dtype

# A handle takes the input and output values of a traced operator (`torch._C.Value`) and returns its multiply-adds.
Handle = Callable[[list[Any], list[Any]], int]


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a traced tensor.

    Raises:
        ValueError: The trace does not know it; the count would be wrong without a word.
    """
    sizes = value.type().sizes() if value.isCompleteTensor() else None
    if sizes is None:
        raise ValueError(f"the trace has no shape for {value.debugName()}")
    return tuple(sizes)


def _product(left: int) -> Handle:
    """Matrix products: each number that comes out took as many multiply-adds as the left operand has columns.

    The output's shape has the broadcast batch sizes in it, the operands' may not.

    Args:
        left: Which input is the left operand.
    """
    return lambda inputs, outputs: prod(shape_of(outputs[0])) * shape_of(inputs[left])[-1]


def _linear(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(shape_of(outputs[0])) * shape_of(inputs[1])[-1]


def _summed_products(inputs: list[Any], outputs: list[Any]) -> int:
    """`addbmm`: a batch of products `(b, n, k) @ (b, k, m)` added up to `(n, m)`."""
    return prod(shape_of(inputs[1])) * shape_of(inputs[2])[-1]


def _convolution(inputs: list[Any], outputs: list[Any]) -> int:
    """Each number that comes out (goes in, if transposed) meets one filter: `in / groups` channels times kernel."""
    transposed = bool(inputs[6].toIValue())
    return prod(shape_of(inputs[0] if transposed else outputs[0])) * prod(shape_of(inputs[1])[1:])


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """QK' and PV of `(..., L, E)` queries, `(..., S, E)` keys and `(..., S, V)` values; a mask saves nothing."""
    queries, keys = shape_of(inputs[0]), shape_of(inputs[1])
    *batch, rows, width = shape_of(outputs[0])
    return prod(batch) * rows * keys[-2] * (queries[-1] + width)


COUNTED: Mapping[str, Handle] = {
    "aten::_convolution": _convolution,
    "aten::linear": _linear,
    "aten::matmul": _product(left=0),
    "aten::mm": _product(left=0),
    "aten::_int_mm": _product(left=0),
    "aten::_scaled_mm": _product(left=0),
    "aten::bmm": _product(left=0),
    "aten::mv": _product(left=0),
    "aten::dot": _product(left=0),
    "aten::addmm": _product(left=1),
    "aten::addmv": _product(left=1),
    "aten::baddbmm": _product(left=1),
    "aten::addbmm": _summed_products,
    "aten::scaled_dot_product_attention": _attention,
}

# What a model and its stages run that is by convention not counted, in groups for people. In-place forms (`add_`) are
# in the same group. Whatever stands neither here nor above, and moves more than data, is reported.
_GROUPS = {
    "norms": "layer_norm group_norm batch_norm instance_norm rms_norm linalg_vector_norm norm var rsqrt",
    "softmax": "softmax log_softmax",
    "activations": "gelu relu silu sigmoid tanh hardswish hardsigmoid hardtanh relu6 softplus leaky_relu elu mish "
    "log_sigmoid",
    "sorting and extremes": "sort argsort topk argmax argmin max min amax amin",
    "gathers and scatters": "gather take_along_dim scatter scatter_add scatter_reduce index index_select index_add "
    "index_put embedding one_hot where masked_fill",
    "sums and means": "sum mean cumsum any all",
    "element by element": "add sub rsub mul div reciprocal pow square sqrt exp log log1p log2 expm1 neg abs sign floor "
    "ceil round clamp clamp_min clamp_max maximum minimum lerp addcmul addcdiv floor_divide remainder fmod erf sin cos "
    "eq ne lt le gt ge isfinite isnan logical_and logical_or logical_not bitwise_and bitwise_or bitwise_xor "
    "bitwise_not __and__ __or__ __xor__ __lshift__ __rshift__ bitwise_left_shift bitwise_right_shift",
    "pooling and resizing": "avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d adaptive_avg_pool1d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d grid_sampler "
    "upsample_linear1d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
}
# Copies, constants and shapes: nothing is computed. fvcore passes over most of them, and over these where it does not.
_MOVES = (
    "constant_pad_nd pad cat stack repeat repeat_interleave roll flip tril triu tile clone movedim unflatten expand_as "
    "view_as reshape_as swapaxes diagonal unfold fill zero copy alias lift_fresh "
    "arange full full_like zeros zeros_like ones ones_like new_zeros new_ones new_full empty empty_like eye "
    "scalar_tensor linspace meshgrid _assert_async"
)


def _both_forms(names: str) -> list[str]:
    return [f"aten::{name}{suffix}" for name in names.split() for suffix in ("", "_")]


UNCOUNTED: Mapping[str, str] = {kind: group for group, names in _GROUPS.items() for kind in _both_forms(names)}
MOVES: frozenset[str] = frozenset(_both_forms(_MOVES))


def plain_name(kind: str) -> str:
    """An operator's name for people: `aten::add_` is `add`."""
    return (kind.removesuffix("_") if kind.removesuffix("_") in UNCOUNTED else kind).removeprefix("aten::")


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
        input_size: `(C, H, W)` of an image, or `(C, frames, H, W)` of a clip.

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
    with torch.no_grad():
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
