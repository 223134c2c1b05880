"""What counts as a multiply-add and what does not: a handle for each product, and the list of operators left out.

Convention (fvcore's and the papers'): one multiply-add counts as one, over convolutions, linear layers, matrix products
and attention (QK' and PV). All counts follow from the shapes in a trace. fvcore's own handles are not used: its matmul
takes the first operand's shape where operands broadcast, its einsum rounds to four digits, it has none for fused
attention, and it counts LayerNorm as 5 per element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

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
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d",
}
# Copies, constants and shapes: nothing is computed. fvcore passes over most of them, and over these where it does not.
_MOVES = (
    "constant_pad_nd pad cat stack repeat repeat_interleave roll flip tril triu tile clone movedim unflatten expand_as "
    "view_as reshape_as swapaxes diagonal unfold fill zero copy alias lift_fresh "
    "arange full full_like zeros zeros_like ones ones_like new_zeros new_ones new_full empty empty_like eye "
    "scalar_tensor linspace"
)


def _both_forms(names: str) -> list[str]:
    return [f"aten::{name}{suffix}" for name in names.split() for suffix in ("", "_")]


UNCOUNTED: Mapping[str, str] = {kind: group for group, names in _GROUPS.items() for kind in _both_forms(names)}
MOVES: frozenset[str] = frozenset(_both_forms(_MOVES))


def plain_name(kind: str) -> str:
    """An operator's name for people: `aten::add_` is `add`."""
    return (kind.removesuffix("_") if kind.removesuffix("_") in UNCOUNTED else kind).removeprefix("aten::")
