"""Weights of eight bits in a model's blocks: made, told from others, and put into a model that is read from a file.

Only linear layers inside blocks are quantised, as `quantized_linear` says: patches, norms, the classifier and all that
a stage decides by stay as they are. A file holds numbers and scales, and says no more than what kind they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokencut.composite import is_composite
from tokencut.errors import ArtifactError, ModelError, UsageError
from tokencut.model import CompressedModel, require_compressed
from tokencut.models.quantized_linear import FP8, LEAST_WEIGHT, MOST, QuantizedLinear, rounded_weight
from tokencut.models.token_bounds import largest_entering

KINDS: Mapping[str, torch.dtype] = {"int8": torch.int8, "fp8": FP8}
# torchao's classes of weights that are stored alike, by rows.
_CLASSES = {"int8": "Int8Tensor", "fp8": "Float8Tensor"}
# What the products of a GPU take: torch._int_mm multiples of 8, torch._scaled_mm of 16.
MULTIPLE = 16


def quantize(model: CompressedModel, kind: str) -> CompressedModel:
    """Makes a model smaller: the weights of its blocks take a quarter of their memory. To be done after it was reduced.

    It is for a GPU, in bf16 and compiled (quantise first, then `torch.compile`): int8 from compute capability 8.0 on,
    fp8 from 8.9 on. Eagerly, and elsewhere, it computes the same several times slower. Which of them is faster than
    bf16 depends on the width (`docs/deployment.md`): time your own model.

    Args:
        model: What `compress` or `load` returned; with `keep=1.0` for a dense one. It is copied, and stays as it was.
        kind: `int8` or `fp8`.

    Returns:
        The copy, which `tokencut.save` writes as it is. It cannot be trained or exported.

    Raises:
        UsageError: There is no such kind, or the model is quantised already.
        ModelError: None of its linear layers has sizes that are multiples of 16.

    Example:
        >>> import timm, tokencut
        >>> model = tokencut.compress(timm.create_model("test_vit"), keep=0.5)
        >>> info = tokencut.save(tokencut.quantize(model, "int8"), "out.safetensors")
        >>> info.quantized, info.dtype
        ('int8', 'fp32+int8')
    """
    model = require_compressed(model, "quantize")
    check_kind(kind)
    refuse_quantized(model, "quantised again")
    quantized = copy.deepcopy(model)
    layers = [
        (block, part)
        for block in quantized.adapter.blocks(quantized.model)
        for part in block.modules()
        if isinstance(part, nn.Linear) and not any(size % MULTIPLE for size in part.weight.shape)
    ]
    if not layers:
        raise ModelError(f"no linear layer in the blocks of this {type(model.model).__name__} has sizes that are "
                         f"multiples of {MULTIPLE}, as the kernels for eight bits need; keep it as it is")  # fmt: skip
    with torch.no_grad():
        # In the order in which they run: the bound of a layer is told by the weights before it as they are by then.
        for block, layer in layers:
            bound = largest_entering(block, layer) if kind == "fp8" else None
            numbers, scale = rounded_weight(KINDS[kind], layer.weight, by_rows=bound is None)
            token_scale = None if bound is None else _power_of_two(bound / MOST[FP8], scale.device)
            QuantizedLinear.take(layer, numbers, scale, token_scale)
    return quantized


def _power_of_two(least: float, device: torch.device) -> Tensor:
    """The lowest power of two that is no lower."""
    return torch.tensor(2.0 ** math.ceil(math.log2(max(least, LEAST_WEIGHT))), device=device)


def check_kind(kind: str) -> None:
    """Refuses a kind that does not exist.

    Raises:
        UsageError: With those that do.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind of quantised weights {kind!r}, expected {' or '.join(KINDS)}; type "
                         "`quantize='int8'`")  # fmt: skip


def refuse_quantized(model: nn.Module, done: str) -> None:
    """Refuses a model whose weights are no plain numbers, whoever quantised them.

    Args:
        model: Any model.
        done: What is to be done to it, as the message ends: `exported`.

    Raises:
        ModelError: Naming the first such weight.
    """
    packed = next((f"{name} is of class {type(part).__name__}" for name, part in model.named_modules()
                   if isinstance(part, QuantizedLinear) or type(part).__module__.startswith(("torch.ao.nn", "torchao"))
                   ), None)  # fmt: skip
    odd = next((f"{name} is of class {type(weight.data).__name__}" for name, weight in model.named_parameters()
                if is_composite(weight) or not (weight.is_floating_point() or weight.is_complex())), None)  # fmt: skip
    found = packed or odd
    if found is not None:
        raise ModelError(f"the model's weights are quantised ({found}), and only plain ones can be {done}; do that "
                         "with the model that it was made from")  # fmt: skip


@dataclass(frozen=True)
class EightBits:
    """A weight in eight bits, as `QuantizedLinear` has it."""

    kind: str
    numbers: Tensor
    scale: Tensor
    token_scale: Tensor | None = None


def quantized_weights(model: nn.Module) -> dict[str, EightBits]:
    """The weights in eight bits of a model, by the names of whole ones: ours, and torchao's that compute alike.

    Raises:
        ArtifactError: The model has quantised weights of another kind.
    """
    found = {}
    for name, part in model.named_modules():
        for own, weight in part.named_parameters(recurse=False):
            if is_composite(weight):
                found[_joined(name, own)] = _of_torchao(_joined(name, own), weight.data)
        if isinstance(part, QuantizedLinear):
            kind = next(kind for kind, dtype in KINDS.items() if dtype == part.numbers.dtype)
            found[_joined(name, "weight")] = EightBits(kind, part.numbers.data, part.scale, part.token_scale)
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise _no_file(name, value)
    return found


def put_in(model: nn.Module, weights: Mapping[str, EightBits]) -> None:
    """Gives linear layers weights in eight bits.

    Args:
        model: Its other weights may be anywhere.
        weights: By name, `blocks.0.attn.qkv.weight`.
    """
    for name, weight in weights.items():
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        QuantizedLinear.take(layer, weight.numbers, weight.scale, weight.token_scale)


def _of_torchao(name: str, tensor: Any) -> EightBits:
    """A tensor of torchao's, if it computes as ours do that have a scale for each row and token.

    Raises:
        ArtifactError: It does not.
    """
    given = getattr(tensor, "act_quant_kwargs", None)
    by_rows = type(getattr(given, "granularity", None)).__name__ == "PerRow" and tensor.scale.shape == (len(tensor), 1)
    settings = [getattr(tensor, part, None) for part in ("act_quant_scale", "act_pre_scale", "act_quant_zero_point")]
    zero = getattr(tensor, "zero_point", None)
    plain = by_rows and all(setting is None for setting in settings) and (zero is None or not bool(zero.any()))
    for kind, dtype in KINDS.items():
        if plain and type(tensor).__name__ == _CLASSES[kind] and tensor.qdata.dtype == dtype:
            return EightBits(kind, tensor.qdata, tensor.scale.float())
    raise _no_file(name, tensor)


def _no_file(name: str, found: object) -> ArtifactError:
    name = name.removeprefix("model.")
    return ArtifactError(f"no file can hold {name}, which is of class {type(found).__name__}; quantise the model that "
                         "it was made from by `tokencut.quantize(model, 'int8')` or 'fp8', or save that")  # fmt: skip


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
