"""Weights of eight bits: made by torchao, told from others, and taken apart into plain tensors for a file.

The weight `(N, K)` of a linear layer is kept in `int8` or in `fp8` (e4m3), and what comes in is quantised when it
comes. In `int8` each row of a weight and each token has a scale of its own (torchao's
`Int8DynamicActivationInt8WeightConfig`). Numbers of fp8 have an exponent, so that one scale does for all of a weight,
and one for all tokens wherever they cannot be larger than a bound (`token_bounds`): a power of two, by which no digit
is lost, and for which no token has to be looked through before it is multiplied. Elsewhere fp8 has a scale for each row
and token too (`Float8DynamicActivationFloat8WeightConfig` by rows). Only linear layers inside blocks are quantised:
patches, norms, the classifier and all that a stage decides by stay as they are.

torchao has no stable form for files of its own, so a file holds the numbers and the scales, and says no more of torchao
than what kind they are.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencut.composite import is_composite
from tokencut.errors import ArtifactError, ModelError, UsageError
from tokencut.model import CompressedModel, require_compressed
from tokencut.models.token_bounds import largest_entering
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
            layer.weight = nn.Parameter(_from_weight(kind, layer.weight, bound), requires_grad=False)
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
                fixed = token_scale_of(known)
                if known.qdata.dtype == dtype and known.scale.shape == (tensor.shape[0] if fixed is None else 1, 1):
                    same = put_together(kind, known.qdata, known.scale, fixed, tensor.dtype)
                    if _description(same) == _description(known):
                        return kind
    raise ArtifactError(f"no file can hold {name}, which is of class {type(tensor).__name__}; quantise the model that "
                        "it was made from by `tokencut.quantize(model, 'int8')` or 'fp8', or save that")  # fmt: skip


def token_scale_of(weight: Tensor) -> Tensor | None:
    """What the numbers of all tokens are divided by before they are multiplied by a weight; None where each token has a
    scale of its own.
    """
    found: Tensor | None = getattr(weight, "token_scale", None)
    return found


def put_together(
    kind: str, numbers: Tensor, scale: Tensor, token_scale: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A quantised weight, which torch takes for one of another type.

    Args:
        kind: One of `KINDS`.
        numbers: `(N, K)`, of that type.
        scale: `(N, 1)`, or `(1, 1)` beside a token scale, fp32: what a row's numbers are multiplied with.
        token_scale: `()`, fp32; see `token_scale_of`. In fp8 alone.
        dtype: The type that it is taken for.
    """
    rows = 1 if token_scale is None else numbers.shape[0]
    settings = {"block_size": [rows, numbers.shape[1]], "dtype": dtype, "act_quant_kwargs": _activations(kind)}
    if kind == "int8":
        settings["zero_point"] = torch.zeros_like(scale, dtype=torch.int8)
    else:
        settings |= {"mm_config": _products(), "token_scale": token_scale}
    made: Tensor = _weight_class(kind)(numbers, scale, **settings)
    return made


def _from_weight(kind: str, weight: Tensor, bound: float | None) -> Tensor:
    """A weight in eight bits, for tokens of which no number is larger than a bound; None where that is not known."""
    ao = _torchao()
    least = {"hp_value_lb": LEAST_WEIGHT} if kind == "fp8" else {}
    rows = ao.PerRow() if bound is None else ao.PerTensor()
    made = getattr(ao, _CLASSES[kind]).from_hp(weight.detach(), granularity=rows, **least)
    token_scale = None
    if bound is not None:
        power = math.ceil(math.log2(max(bound, LEAST_TOKEN) / torch.finfo(KINDS[kind]).max))
        token_scale = torch.tensor(2.0**power, device=weight.device)
    return put_together(kind, made.qdata, made.scale, token_scale, weight.dtype)


@functools.cache
def _weight_class(kind: str) -> Any:
    """torchao's class, which also knows linear layers that are called by the names of their arguments.

    torchao 0.18 looks for them by their places alone: of `F.linear(x, weight, bias=b)`, as timm's EVA and BEiT call it,
    it would leave out the bias without a word. A weight in fp8 may have a token scale, which torchao's have not.
    """
    theirs: Any = getattr(_torchao(), _CLASSES[kind])

    class Weight(theirs):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is not F.linear:
                return super().__torch_function__(function, types, args, kwargs)
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            tokens, weight, bias = given["input"], given["weight"], given.get("bias")
            done = weight.multiplied(tokens, bias)
            return super().__torch_function__(function, types, (tokens, weight, bias), {}) if done is None else done

        def multiplied(self, tokens: Tensor, bias: Tensor | None) -> Tensor | None:
            """Tokens times the weight where that is not left to torchao, None else."""
            return None

    class WithTokenScale(Weight):
        optional_tensor_data_names: ClassVar = ["token_scale"]

        # In the order in which torchao gives them: tensors, those that may be none, and the rest.
        def __new__(
            cls, qdata: Tensor, scale: Tensor, token_scale: Tensor | None = None, *args: Any, **kwargs: Any
        ) -> Any:
            return super().__new__(cls, qdata, scale, *args, **kwargs)

        def __init__(
            self, qdata: Tensor, scale: Tensor, token_scale: Tensor | None = None, *args: Any, **kwargs: Any
        ) -> None:
            super().__init__(qdata, scale, *args, **kwargs)
            self.token_scale = token_scale

        def multiplied(self, tokens: Tensor, bias: Tensor | None) -> Tensor | None:
            if not _multiplies_fp8(tokens):
                return F.linear(_rounded(tokens, self.token_scale), self.dequantize(tokens.dtype), bias)
            if self.token_scale is None:
                return None
            # One power of two for all: to multiply by one over it is exact, and quicker than to divide.
            rounded = (tokens * self.token_scale.reciprocal()).to(self.qdata.dtype).flatten(0, -2)
            product = torch._scaled_mm(
                rounded, self.qdata.t(), scale_a=self.token_scale, scale_b=self.scale.view(()), bias=bias,
                out_dtype=tokens.dtype, use_fast_accum=self.mm_config.use_fast_accum,
            )  # fmt: skip
            return product.unflatten(0, tokens.shape[:-1])

    made = WithTokenScale if kind == "fp8" else Weight
    made.__name__ = made.__qualname__ = f"{_CLASSES[kind]}OfBlocks"
    return made


def _multiplies_fp8(tokens: Tensor) -> bool:
    """Whether torch multiplies fp8 where these are: on a CPU some builds do, others fail in oneDNN."""
    return tokens.is_cuda and torch.cuda.get_device_capability(tokens.device) >= (8, 9)


def _rounded(tokens: Tensor, scale: Tensor | None) -> Tensor:
    """What is left of tokens in fp8, with a scale for all, or each with one of its own."""
    most = torch.finfo(KINDS["fp8"]).max
    if scale is None:
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
        "torchao.quantization": ("Int8Tensor", "Float8Tensor", "PerRow", "PerTensor"),
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
