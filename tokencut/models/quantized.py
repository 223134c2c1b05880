"""Weights of eight bits: made by torchao, told from others, and taken apart into plain tensors for a file.

The weight `(N, K)` of a linear layer is kept in `int8` or in `fp8` (e4m3), each row with a scale of its own; what comes
in is quantised when it comes, each token with a scale of its own (torchao's `Int8DynamicActivationInt8WeightConfig`,
and its `Float8DynamicActivationFloat8WeightConfig` by rows). Only linear layers inside blocks are: patches, norms, the
classifier and all that a stage decides by stay as they are.

torchao has no stable form for files of its own, so a file holds the numbers and the scales, and says no more of torchao
than what kind they are.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencut.composite import is_composite
from tokencut.errors import ArtifactError, ModelError, UsageError
from tokencut.model import CompressedModel, require_compressed
from tokencut.runtime import extras
from tokencut.runtime.quiet import quiet_libraries

KINDS: Mapping[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_CLASSES = {"int8": "Int8Tensor", "fp8": "Float8Tensor"}
# The least number that the largest of a row counts for: torchao's fp8 would make NaN of a row of zeros.
LEAST_WEIGHT, LEAST_TOKEN = 1e-12, 1e-6
# What the products of a GPU take: torch._int_mm multiples of 8, torch._scaled_mm of 16.
MULTIPLE = 16


def quantize(model: CompressedModel, kind: str) -> CompressedModel:
    """Makes a model smaller: the weights of its blocks take a quarter of their memory. To be done after it was reduced.

    It is for a GPU, in bf16 and compiled (quantise first, then `torch.compile`): int8 from compute capability 8.0 on,
    fp8 from 8.9 on. Eagerly, and elsewhere, it computes the same several times slower. It was no faster than bf16 at
    the one width that was measured (`docs/deployment.md`): time your own model.

    Args:
        model: What `compress` or `load` returned; with `keep=1.0` for a dense one. It is copied, and stays as it was.
        kind: `int8` or `fp8`.

    Returns:
        The copy, which `tokencut.save` writes as it is. It cannot be trained or exported.

    Raises:
        UsageError: There is no such kind, or the model is quantised already.
        ModelError: None of its linear layers has sizes that are multiples of 16.
        TokencutError: torchao is not installed.

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
        part
        for block in quantized.adapter.blocks(quantized.model)
        for part in block.modules()
        if isinstance(part, nn.Linear) and not any(size % MULTIPLE for size in part.weight.shape)
    ]
    if not layers:
        raise ModelError(f"no linear layer in the blocks of this {type(model.model).__name__} has sizes that are "
                         f"multiples of {MULTIPLE}, as the kernels for eight bits need; keep it as it is")  # fmt: skip
    with torch.no_grad():
        for layer in layers:
            layer.weight = nn.Parameter(_from_weight(kind, layer.weight), requires_grad=False)
    return quantized


def check_kind(kind: str) -> None:
    """Refuses a kind that does not exist, and any where torchao is missing.

    Raises:
        UsageError: There is no such kind.
        TokencutError: torchao is not installed.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind of quantised weights {kind!r}, expected {' or '.join(KINDS)}; type "
                         "`quantize='int8'`")  # fmt: skip
    require_torchao("weights of eight bits need")


def require_torchao(needing: str) -> None:
    """Refuses to go on without torchao.

    Args:
        needing: What needs it, with its verb.

    Raises:
        TokencutError: It is not installed.
    """
    extras.require(needing, "torchao", extra="quantize")


def refuse_quantized(model: nn.Module, done: str) -> None:
    """Refuses a model whose weights are no plain numbers, whoever quantised them.

    Args:
        model: Any model.
        done: What is to be done to it, as the message ends: `exported`.

    Raises:
        ModelError: Naming the first such weight.
    """
    odd = next((f"{name} is of class {type(weight.data).__name__}" for name, weight in model.named_parameters()
                if is_composite(weight) or not (weight.is_floating_point() or weight.is_complex())), None)  # fmt: skip
    packed = next((f"{name} is of class {type(part).__name__}" for name, part in model.named_modules()
                   if type(part).__module__.startswith(("torch.ao.nn", "torchao"))), None)  # fmt: skip
    found = odd or packed
    if found is not None:
        raise ModelError(f"the model's weights are quantised ({found}), and only plain ones can be {done}; do that "
                         "with the model that it was made from")  # fmt: skip


def stored_as(name: str, tensor: Any) -> str | None:
    """How a file keeps a weight: as one of `KINDS`; None for a plain tensor.

    Args:
        name: The weight's name, for messages.
        tensor: The weight.

    Raises:
        ArtifactError: As neither.
    """
    if isinstance(tensor, Tensor) and not is_composite(tensor):
        return None
    if isinstance(tensor, Tensor):
        for kind, dtype in KINDS.items():
            if isinstance(tensor, getattr(_torchao(), _CLASSES[kind])):
                known: Any = tensor
                if known.qdata.dtype == dtype and known.scale.shape == (tensor.shape[0], 1):
                    same = put_together(kind, known.qdata, known.scale, tensor.dtype)
                    if _description(same) == _description(known):
                        return kind
    raise ArtifactError(f"no file can hold {name}, which is of class {type(tensor).__name__}; quantise the model that "
                        "it was made from by `tokencut.quantize(model, 'int8')` or 'fp8', or save that")  # fmt: skip


def put_together(kind: str, numbers: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A quantised weight, which torch takes for one of another type.

    Args:
        kind: One of `KINDS`.
        numbers: `(N, K)`, of that type.
        scale: `(N, 1)`, fp32: what a row's numbers are multiplied with.
        dtype: The type that it is taken for.
    """
    settings = {"block_size": [1, numbers.shape[1]], "dtype": dtype, "act_quant_kwargs": _activations(kind)}
    if kind == "int8":
        settings["zero_point"] = torch.zeros_like(scale, dtype=torch.int8)
    else:
        settings["mm_config"] = _products()
    made: Tensor = _weight_class(kind)(numbers, scale, **settings)
    return made


def _from_weight(kind: str, weight: Tensor) -> Tensor:
    ao = _torchao()
    least = {"hp_value_lb": LEAST_WEIGHT} if kind == "fp8" else {}
    made = getattr(ao, _CLASSES[kind]).from_hp(weight.detach(), granularity=ao.PerRow(), **least)
    return put_together(kind, made.qdata, made.scale, weight.dtype)


@functools.cache
def _weight_class(kind: str) -> Any:
    """torchao's class, which also knows linear layers that are called by the names of their arguments.

    torchao 0.18 looks for them by their places alone: of `F.linear(x, weight, bias=b)`, as timm's EVA and BEiT call it,
    it would leave out the bias without a word. Where nothing multiplies fp8, the same is computed of what was rounded.
    """
    theirs: Any = getattr(_torchao(), _CLASSES[kind])

    class Weight(theirs):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is not F.linear:
                return super().__torch_function__(function, types, args, kwargs)
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            tokens, weight, bias = given["input"], given["weight"], given.get("bias")
            if kind == "fp8" and not _multiplies_fp8(tokens):
                return F.linear(_rounded(tokens), weight.dequantize(tokens.dtype), bias)
            return super().__torch_function__(function, types, (tokens, weight, bias), {})

    Weight.__name__ = Weight.__qualname__ = f"{_CLASSES[kind]}ByRow"
    return Weight


def _multiplies_fp8(tokens: Tensor) -> bool:
    """Whether torch multiplies fp8 by rows where these are: on a CPU some builds do, others fail in oneDNN."""
    return tokens.is_cuda and torch.cuda.get_device_capability(tokens.device) >= (8, 9)


def _rounded(tokens: Tensor) -> Tensor:
    """What is left of tokens in fp8, each with a scale of its own."""
    most = torch.finfo(KINDS["fp8"]).max
    scale = tokens.abs().amax(-1, keepdim=True).float().clamp(min=LEAST_TOKEN) / most
    left = (tokens.float() / scale).clamp(-most, most).to(KINDS["fp8"])
    return (left.float() * scale).to(tokens.dtype)


def _activations(kind: str) -> Any:
    """How what comes in is quantised: each token by its largest number."""
    ao = _torchao()
    if kind == "int8":
        return ao.QuantizeTensorToInt8Kwargs(granularity=ao.PerRow())
    return ao.QuantizeTensorToFloat8Kwargs(granularity=ao.PerRow(), hp_value_lb=LEAST_TOKEN)


def _products() -> Any:
    return _torchao().Float8MMConfig(use_fast_accum=True)


@functools.cache
def _torchao() -> SimpleNamespace:
    """What is used of torchao. Not its configurations: they change settings of torch.compile for all models.

    What torchao says when it is imported (what torch will do to it, for which torch its C++ is) helps no user.
    """
    homes = {
        "torchao.quantization": ("Int8Tensor", "Float8Tensor", "PerRow"),
        "torchao.quantization.quantize_.workflows": ("QuantizeTensorToInt8Kwargs", "QuantizeTensorToFloat8Kwargs"),
        "torchao.float8.inference": ("Float8MMConfig",),
    }
    with quiet_libraries():
        found = {name: getattr(importlib.import_module(home), name) for home, names in homes.items() for name in names}
    return SimpleNamespace(**found)


def _description(tensor: Any) -> tuple[Any, ...]:
    """What a quantised weight is, without its numbers, for a comparison."""
    parts, settings = tensor.__tensor_flatten__()
    activations = settings["act_quant_kwargs"]
    if getattr(activations, "hp_value_lb", ...) is None:  # torchao's default, which ours differs from for zeros alone
        settings["act_quant_kwargs"] = dataclasses.replace(activations, hp_value_lb=LEAST_TOKEN)
    zero = getattr(tensor, "zero_point", None)
    return parts, settings, zero is None or not bool(zero.any())
