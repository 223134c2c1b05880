"""Saves a compressed model in one safetensors file, and loads it again without running anything from the file.

The tensors carry timm's own names, so that `timm.create_model(name, checkpoint_path=FILE)` takes them. What timm's
model does not have is stored under `tokencut.`: what a stage has learned, and quantised weights, as numbers of eight
bits with their scales, in place of timm's own. The metadata is one key, see `metadata.py`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import get_model_args
from torch import Tensor, nn

from tokencut.adapters import refuse_sharded
from tokencut.composite import all_finite
from tokencut.errors import ArtifactError, TokencutError, UsageError
from tokencut.files import atomic_write, check_writable, user_path, with_ending
from tokencut.messages import listed, one_line
from tokencut.model import CompressedModel, require_compressed
from tokencut.models.alterations import alter, alterations_of
from tokencut.models.checkpoints import differences, not_finite, wrong_types
from tokencut.models.fields import PRETRAINED_CFG
from tokencut.models.header import KEY, SUFFIX, info_of, open_artifact, open_safetensors
from tokencut.models.metadata import ArtifactInfo, Origin, check_measured, info_from_text
from tokencut.models.model_args import check_model_args
from tokencut.models.pretrained_cfg import data_config, description_of, label_names
from tokencut.models.quantized import EightBits, put_in, quantized_weights

# The prefix of tensors that timm's model does not have.
PREFIX = f"{KEY}."
# Those of a quantised weight, before its own name.
NUMBERS, SCALES, TOKEN_SCALES = f"{PREFIX}quantized.", f"{PREFIX}scale.", f"{PREFIX}token_scale."
# How safetensors calls the types of `quantized.KINDS`.
_EIGHT_BITS = {"I8": "int8", "F8_E4M3": "fp8"}

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Where a timm model keeps its origin: beside what timm itself keeps there, so that a copy of the model has it too.
_ORIGIN = "_tokencut_origin"


def mark_origin(model: nn.Module, origin: Origin) -> None:
    """Notes on a timm model where its weights came from; `compress` carries that along, and `save` writes it."""
    setattr(model, _ORIGIN, origin)


def origin_of(model: nn.Module) -> Origin:
    """Where a timm model's weights came from; `unverified` for one that was made elsewhere."""
    cfg = description_of(model)
    return getattr(model, _ORIGIN, None) or Origin("unverified", cfg.get("hf_hub_id"), licence=cfg.get("license"))


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Refuses a file that `save` could not write, before any work is done for it.

    Raises:
        UsageError: The name does not end in `.safetensors`, by which timm tells the format.
        ArtifactError: The folder does not exist, or the file exists and `force` is off.
    """
    target = user_path(path)
    if target.suffix != SUFFIX:
        raise UsageError(f"{target} does not end in {SUFFIX}, by which timm and others tell the format; type "
                         f"`path={str(with_ending(target, SUFFIX, 'out'))!r}`")  # fmt: skip
    return check_writable(target, force=force)


def save(
    model: CompressedModel,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    measured: Mapping[str, float | None] | None = None,
    origin: Origin | None = None,
) -> ArtifactInfo:
    """Writes a compressed model to one file: all of it, or nothing. The same model gives the same bytes.

    Args:
        model: What `compress` returned.
        path: The file, `*.safetensors`.
        force: Whether a file of that name may be replaced.
        dtype: The type to store the weights in; fp32 where None.
        measured: What was measured, some of `metadata.MEASURED`.
        origin: Where the weights came from; what `mark_origin` noted where None.

    Returns:
        What was written about the model.

    Raises:
        UsageError: An argument is wrong.
        ArtifactError: The model cannot be built again from timm's arguments, or the file cannot be written.

    Example:
        >>> import timm, tokencut
        >>> model = tokencut.compress(timm.create_model("test_vit"), keep=0.5)
        >>> tokencut.save(model, "out.safetensors").recipe.keep
        0.5
    """
    model = require_compressed(model, "save")
    refuse_sharded(model)
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}; type dtype='bf16'")
    target = check_output(path, force=force)
    eight = {_stored_name(name): weight for name, weight in quantized_weights(model).items()}
    tensors = {_stored_name(name): tensor for name, tensor in model.state_dict().items()}
    _refuse_wrapped_weights(tensors)
    parts = {f"{name.removesuffix('weight')}{part}" for name in eight for part in ("numbers", "scale", "token_scale")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in parts | set(eight)}
    found = {weight.kind for weight in eight.values()}
    if len(found) > 1:
        raise ArtifactError(f"the model has weights in {' and '.join(sorted(found))}, and a file holds one kind; "
                            "quantise all in one, by `tokencut.quantize(model, 'int8')` or 'fp8'")  # fmt: skip
    stored_in = dtype or "fp32"
    info = dataclasses.replace(
        _describe(model),
        measured=check_measured(measured or {}),
        origin=origin or origin_of(model.model),
        quantized=next(iter(found), None),
        dtype="+".join(sorted({stored_in, *found})),
    )
    text = info.to_text()
    try:
        info_from_text(text)
    except ArtifactError as error:  # timm checks little of what a description holds
        raise ArtifactError(f"{target} would not load again: {error}") from error
    rebuilt = {_stored_name(name): tensor for name, tensor in _skeleton(info).state_dict().items()}
    types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    shapes = _shapes(tensors) | {name: tuple(weight.numbers.shape) for name, weight in eight.items()}
    problem = differences(_shapes(rebuilt), shapes) or wrong_types(rebuilt, types)
    if problem:
        raise ArtifactError(f"{target} would not load again: the model was changed after timm.create_model built it "
                            f"({problem}); make the change with timm's own arguments")  # fmt: skip
    ready = _apart({
        **{name: _for_storage(name, tensor, _DTYPES[stored_in], cast=True) for name, tensor in tensors.items()},
        **{name: _for_storage(name, part, _DTYPES[stored_in], cast=False)
           for whole, weight in eight.items() for name, part in _parts(whole, weight).items()},
    })  # fmt: skip
    with atomic_write(target, force=force) as temporary:
        try:
            save_file(ready, temporary, metadata={KEY: text})
        except SafetensorError as error:
            raise _as_os_error(error) from error
    return dataclasses.replace(info, parameters=sum(tensor.numel() for tensor in ready.values()))


def is_artifact(path: Path) -> bool:
    """Whether a file of weights is one that `save` wrote, damaged or not."""
    try:
        with open_safetensors(path) as file:
            return KEY in (file.metadata() or {})
    except ArtifactError:
        return False


def read_info(path: str | os.PathLike[str]) -> ArtifactInfo:
    """Reads what a file says about its model, without building the model.

    Raises:
        ArtifactError: Not a tokencut file, or damaged, or of a newer format.
    """
    source = user_path(path)
    with open_artifact(source) as file:
        return info_of(file, source)


def load(path: str | os.PathLike[str]) -> CompressedModel:
    """Loads a compressed model, in eval mode, on the CPU and in fp32 whatever it is stored in.

    Args:
        path: A file that `save` wrote.

    Raises:
        ArtifactError: Not a tokencut file, damaged, of a newer format, or its tensors are not its model's: then all
            that are missing, unexpected, of another shape or type, or not finite are named.

    Example:
        >>> import timm, tokencut
        >>> info = tokencut.save(tokencut.compress(timm.create_model("test_vit"), keep=0.5), "out.safetensors")
        >>> tokencut.load("out.safetensors").recipe == info.recipe
        True
    """
    source = user_path(path)
    with open_artifact(source) as file:
        info = info_of(file, source)
        try:
            model = _skeleton(info)
            expected = {_stored_name(name): tensor for name, tensor in model.state_dict().items()}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            stored = {name: tuple(part.get_shape()) for name, part in slices.items()}
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            eight = {name.removeprefix(NUMBERS) for name in stored if name.startswith(NUMBERS)}
            eight &= _linear_weights(model.model)
            fixed = eight & {name.removeprefix(TOKEN_SCALES) for name in stored if info.quantized == "fp8"}
            problem = differences(_with_quantized(_shapes(expected), eight, fixed), stored, named=None)
            if problem:
                raise ArtifactError(f"its tensors are not those of its model: {problem}; compress the model again")
            problem = wrong_types(expected, kinds) or _wrong_eight_bits(eight, kinds, info.quantized)
            if problem:
                raise ArtifactError(f"its tensors are not as they were written: {problem}; compress the model again")
            # Buffers that no file holds are lost without storage: a model with such is built again, with memory.
            if set(dict(model.named_buffers())) - set(model.state_dict()):
                model = _skeleton(info, device="cpu")
            weights = {name: _eight_bits(file, name, info) for name in eight}
            tensors = {
                name: file.get_tensor(_stored_name(name)).to(tensor.dtype, copy=True)
                for name, tensor in model.state_dict().items() if _stored_name(name) not in eight
            }  # fmt: skip
            wrong = {name: part for name, weight in weights.items() for part in (weight.numbers, weight.scale)
                     if not all_finite(part)}  # fmt: skip
            problem = not_finite({_stored_name(name): tensor for name, tensor in tensors.items()} | wrong)
            if problem:
                raise ArtifactError(f"its weights cannot be used: {problem}; compress a model with other weights")
        except TokencutError as error:
            raise ArtifactError(f"cannot load {source}: {error}") from error
    put_in(model.model, weights)
    model.load_state_dict(model.state_dict() | tensors, strict=True, assign=True)
    mark_origin(model.model, info.origin)
    return model.eval()


def _describe(compressed: CompressedModel) -> ArtifactInfo:
    """What can be told from the model itself."""
    model = compressed.model
    cfg = description_of(model)
    if not timm.is_model(cfg.get("architecture") or "") or not hasattr(model, "_model_args"):
        raise ArtifactError(
            f"this {type(model).__name__} was not built by timm.create_model, so no file could tell how to build it; "
            f"build the same by `new = timm.create_model({_by_name(compressed)})`, give it the weights by "
            "`new.load_state_dict(model.model.state_dict())`, and save `tokencut.CompressedModel(new, model.recipe)`"
        )
    args = {**get_model_args(model), **compressed.adapter.looked_up(model), "num_classes": compressed.num_classes}
    try:
        check_model_args(args)
    except UsageError as error:
        raise ArtifactError(f"the model cannot be saved: {error}") from error
    return ArtifactInfo(
        architecture=cfg["architecture"],
        model_args={name: value for name, value in args.items() if value is not None},
        recipe=compressed.recipe,
        depth=_depth(compressed),
        preprocessing=data_config(model),
        pretrained_cfg={name: cfg[name] for name in PRETRAINED_CFG.checks if cfg.get(name) is not None},
        label_names=label_names(model),
        alterations=alterations_of(model),
    )


def _by_name(compressed: CompressedModel) -> str:
    """What to give timm.create_model for a model like this one, as far as its parts tell."""
    if compressed.adapter.hierarchical:
        example = timm.list_models(module=list(compressed.adapter.timm_modules))[-1]
        return f"{example!r}, img_size={compressed.adapter.input_size(compressed.model)}, depths=..., ..."
    model, blocks = compressed.model, compressed.adapter.blocks(compressed.model)
    size = compressed.adapter.input_size(model)
    heads = next((part.num_heads for part in blocks[0].modules() if hasattr(part, "num_heads")), None)
    told = {
        "img_size": size[0] if size and size[0] == size[1] else size,
        "patch_size": compressed.adapter.patch_size(model)[0],
        "in_chans": getattr(model, "in_chans", None),
        "num_classes": compressed.num_classes,
        "embed_dim": getattr(model, "embed_dim", None),
        "depth": len(blocks),
        "num_heads": heads,
    }
    given = ", ".join(f"{name}={value}" for name, value in told.items() if value is not None)
    return f"'vit_base_patch16_224', {given}, ..."


def _skeleton(info: ArtifactInfo, device: str = "meta") -> CompressedModel:
    """The model that a description describes; on `meta` it has shapes and takes no memory."""
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            model = timm.create_model(
                info.architecture, pretrained=False, pretrained_cfg=info.timm_description(), **info.model_args
            )
            alter(model, info.alterations)
            compressed = CompressedModel(model, info.recipe)
            depth, tokens = _depth(compressed), compressed.adapter.cost(model).patches
    except TokencutError:
        raise
    except Exception as error:  # timm asserts and raises as it likes over arguments that do not go together
        raise ArtifactError(f"timm cannot build {info.architecture} with the arguments {dict(info.model_args)}: "
                            f"{one_line(error)}; compress the model again") from error  # fmt: skip
    if (depth, tokens) != (info.depth, info.recipe.tokens):
        raise ArtifactError(f"its recipe is for {info.depth} blocks and {info.recipe.tokens} image tokens, its model "
                            f"has {depth} and {tokens}; compress the model again")  # fmt: skip
    return compressed


def _depth(compressed: CompressedModel) -> int:
    return len(compressed.adapter.blocks(compressed.model))


def _stored_name(name: str) -> str:
    """A tensor's name in the file, from its name in a `CompressedModel`, whose blocks may be compiled."""
    name = name.replace("_orig_mod.", "")
    return name.removeprefix("model.") if name.startswith("model.") else PREFIX + name


# How the names of tensors tell that weights are made of others, and how these become weights again.
_WRAPPED = {
    ".parametrizations.": "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')",
    ".lora_": "peft's model.merge_and_unload()",
    ".base_layer.": "peft's model.merge_and_unload()",
    ".weight_g": "torch.nn.utils.remove_weight_norm(module)",
    ".weight_orig": "torch.nn.utils.remove_spectral_norm(module), or torch.nn.utils.prune.remove(module, 'weight')",
}


def _refuse_wrapped_weights(tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights that are computed from others: a file holds what timm's own model would load."""
    for name in tensors:
        how = next((how for sign, how in _WRAPPED.items() if sign in name and not name.startswith(PREFIX)), None)
        if how is not None:
            raise ArtifactError(f"the model cannot be saved while {name} and others make up its weights; join them by "
                                f"{how}, then save it")  # fmt: skip


def _parts(name: str, weight: EightBits) -> dict[str, Tensor]:
    """The tensors that a file holds of a weight in eight bits."""
    parts = {NUMBERS: weight.numbers, SCALES: weight.scale, TOKEN_SCALES: weight.token_scale}
    return {prefix + name: part for prefix, part in parts.items() if part is not None}


def _with_quantized(
    shapes: Mapping[str, tuple[int, ...]], quantized: set[str], fixed: set[str]
) -> dict[str, tuple[int, ...]]:
    """The shapes that a file has of a model's tensors, where it has quantised some, a few of them with token scales."""
    expected = {name: shape for name, shape in shapes.items() if name not in quantized}
    for name in quantized:
        rows = 1 if name in fixed else shapes[name][0]
        expected |= {NUMBERS + name: shapes[name], SCALES + name: (rows, 1)}
    return expected | {TOKEN_SCALES + name: () for name in fixed}


def _linear_weights(model: nn.Module) -> set[str]:
    """The weights that may be quantised, by their names in a file, which are timm's."""
    return {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def _wrong_eight_bits(quantized: set[str], types: Mapping[str, str], kind: str | None) -> str | None:
    """What of a file's quantised weights is not of the type that its description says; None where all is."""
    wrong = [name for name in sorted(quantized)
             if _EIGHT_BITS.get(types[NUMBERS + name]) != kind or types[SCALES + name] != "F32"
             or types.get(TOKEN_SCALES + name, "F32") != "F32"]  # fmt: skip
    if wrong or bool(quantized) != (kind is not None):
        others = f", and {len(wrong)} are of another type: {listed(wrong)}" if wrong else ""
        return f"{len(quantized)} weights are quantised where its description says {kind or 'none'}{others}"
    return None


def _eight_bits(file: Any, name: str, info: ArtifactInfo) -> EightBits:
    """A weight in eight bits out of a file.

    Raises:
        ArtifactError: Its scale for tokens is no number above zero.
    """
    assert info.quantized is not None
    numbers, scale = (file.get_tensor(prefix + name).clone() for prefix in (NUMBERS, SCALES))
    token_scale = file.get_tensor(TOKEN_SCALES + name).clone() if TOKEN_SCALES + name in file.keys() else None  # noqa: SIM118
    if token_scale is not None and not 0 < float(token_scale) < float("inf"):
        raise ArtifactError(f"{TOKEN_SCALES}{name} is {float(token_scale):g}, and nothing can be divided by that; "
                            "compress the model again")  # fmt: skip
    return EightBits(info.quantized, numbers, scale, token_scale)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory, as tied weights do: a file holds one for each name."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            tensors[name] = tensor.clone()
        seen.add(place)
    return tensors


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _for_storage(name: str, tensor: Tensor, dtype: torch.dtype, *, cast: bool) -> Tensor:
    ready = tensor.detach().cpu()
    if ready.is_floating_point() and cast:
        ready = ready.to(dtype)
        if dtype == torch.float16 and torch.isinf(ready).any() and not torch.isinf(tensor).any():
            raise ArtifactError(f"{name} holds values beyond fp16's largest, 65504; type `dtype='bf16'` instead")
    # safetensors refuses tensors that share memory, as views do.
    return ready.contiguous() if ready.untyped_storage().nbytes() == ready.nbytes else ready.clone()


def _as_os_error(error: SafetensorError) -> OSError:
    """safetensors hides the system's error in a text: `I/O error: ... (os error 28)`."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(one_line(error))
