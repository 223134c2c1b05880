"""Weights from elsewhere into a timm model: other names, another size of image, channels or classes.

timm's own `checkpoint_filter_fn` does most of it for pretrained weights; what it does not know is added here.
"""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv, is_model, model_entrypoint
from torch import Tensor, nn

from tokencut.errors import ModelError
from tokencut.messages import listed, one_line
from tokencut.models.building import capture_timm_messages
from tokencut.models.checkpoints import load_strictly
from tokencut.models.pretrained_cfg import architecture_of, class_count, description_of

Tensors = dict[str, Tensor]

# What a source is known to carry beside a model, or around it, by the names that are left over.
_EXTRAS = (
    ("the decoder", r"^decoder[._]"),
    ("the mask token", r"^mask_token$"),
    ("register tokens", r"^register_tokens$"),
    ("the pooler", r"^(pooler|pre_logits|attn_pool)\."),
    ("the projector", r"^(projector|projection|predictor|prototypes|proj_head|mlp_head|dino_head|ibot_head|head\.(mlp|"
                      r"last_layer|\d+)|queue|center)\b"),
    ("the text model", r"^(text|token_embedding|transformer\.resblocks|ln_final|positional_embedding|logit_scale|"
                       r"logit_bias)"),
    ("what its reduction has learned", r"^(tokencut\.|stages\.\d+\.)"),
)  # fmt: skip
_TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
_MMPRETRAIN = (
    (r"^(?:backbone\.)?patch_embed\.projection\.", "patch_embed.proj."),
    (r"^(?:backbone\.)?layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"^(?:backbone\.)?layers\.(\d+)\.attn\.", r"blocks.\1.attn."),
    (r"^(?:backbone\.)?layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^(?:backbone\.)?layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"^(?:backbone\.)?layers\.(\d+)\.ffn\.gamma2\.weight$", r"blocks.\1.ls2.gamma"),
    (r"^(?:backbone\.)?ln1\.", "norm."),
    (r"^head\.(?:layers\.head|fc)\.", "head."),
    (r"^backbone\.", ""),
)
# Sources of which no prefix alone makes timm's names: names that stand together, and what goes before them for timm.
_MARKS = (
    (("visual.class_embedding", "visual.conv1.weight"), ""),  # open_clip
    (("visual.trunk.blocks.0.norm1.weight",), ""),  # open_clip with an image tower of timm's
    (("class_embedding", "conv1.weight"), "visual."),  # open_clip's image tower alone
    (("class_token", "conv_proj.weight"), ""),  # torchvision
    (("backbone.layers.0.ln1.weight", "backbone.patch_embed.projection.weight"), ""),  # mmpretrain
    (("layers.0.ln1.weight", "patch_embed.projection.weight"), ""),  # its backbone alone
)
# Of two copies of a model, these are the better, as timm has it.
_AVERAGED = re.compile(r"(^|[._])(teacher|ema)([._]|$)")


def load_fitted(
    model: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, new_head: bool, tell_head: bool = True
) -> tuple[tuple[str, ...], bool]:
    """Loads weights from wherever into a model, strictly but for what is told.

    Args:
        model: A timm model, with its description; it gets the weights.
        tensors: By the source's names.
        path: Where they were read from, for messages.
        new_head: Whether a head of another number of classes, or none, is made up for by a random one.
        tell_head: Whether to tell of that.

    Returns:
        What a user should be told (prefixes taken off, what was resized, adapted or left out), and whether the head is
        a new one.

    Raises:
        ModelError: They are not weights of this model.
    """
    own = model.state_dict()
    ready, notes = _without_prefix(_without_chunks(dict(tensors)), own.keys(), str(path))
    before = {name: tuple(tensor.shape) for name, tensor in ready.items()}
    ready = _filtered(model, _renamed(ready), path)
    notes += _resized(before, ready)
    notes += _adapt_channels(model, ready, own)
    made = new_head and _needs_head(model, ready, own)
    if made:
        _replace_head(model, ready, own)
        notes += [_new_head_note(class_count(model))] if tell_head else []
    elif class_count(model) == 0 and _head_names(model, ready):
        _replace_head(model, ready, own)
        notes.append(f"the head in {path} is left out, as num_classes=0 has none")
    left = [name for name in ready if name not in own]
    told: dict[str, int] = {}
    for name in left:
        extra = next((word for word, pattern in _EXTRAS if re.search(pattern, name)), None)
        if extra is not None:
            del ready[name]
            told[extra] = told.get(extra, 0) + 1
    if told:
        notes.append(f"left out of {path}: {' and '.join(told)} ({sum(told.values())} tensors)")
    load_strictly(model, ready, path)
    return tuple(notes), made


def load_adapted(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Loads weights under timm's names strictly, save that the first convolution is adapted to the model's channels,
    and that a head of another number of classes than they are for stays as it is.

    Args:
        model: A timm model whose description says how many classes the weights are for.
        tensors: By timm's names.
        path: Where they were read from, for messages.

    Raises:
        ModelError: They are not the model's.
    """
    own, ready = model.state_dict(), dict(tensors)
    _adapt_channels(model, ready, own)
    if class_count(model) != description_of(model).get("num_classes"):
        _replace_head(model, ready, own)
    load_strictly(model, ready, path)


def pooling_of(tensors: Collection[str], wanted: Collection[str], args: Collection[str]) -> str | None:
    """The pooling that weights were made for, where that shows and is not what the model has; None otherwise.

    Args:
        tensors: Their names.
        wanted: The names of the model's.
        args: The names of the arguments that were asked for, which are not gone against.
    """
    before = next((name.removesuffix("fc_norm.weight") for name in tensors if name.endswith("fc_norm.weight")), None)
    if before is None or f"{before}norm.weight" in tensors or "global_pool" in args:
        return None
    return "avg" if "norm.weight" in wanted and "fc_norm.weight" not in wanted else None


def load_npz(model: Any, path: Path, *, new_head: bool) -> tuple[tuple[str, ...], bool]:
    """Loads weights of Google's JAX checkpoints, by timm's own reader.

    Args:
        model: A timm model, which gets them.
        path: A file `*.npz`.
        new_head: Whether a head of another number of classes, or none, is made up for by a random one.

    Returns:
        As `load_fitted`.

    Raises:
        ModelError: They are not weights of this model.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as held:
            names = {name: held[name].shape for name in held.files if name.endswith(("bias", "scale"))}
    except Exception as error:  # whatever a damaged archive leads numpy to
        raise ModelError(f"{path} is no .npz file that can be read ({one_line(error)}); copy it again") from error
    numbers = [re.search(r"encoderblock_(\d+)/", name) for name in names]
    joined = next((shape[0] for name, shape in names.items() if "encoderblock/LayerNorm_0" in name), 0)
    depth = 1 + max((int(number[1]) for number in numbers if number), default=joined - 1)
    head = next((shape[-1] for name, shape in names.items() if re.search(r"(^|/)head/bias$", name)), 0)
    blocks = len(getattr(model, "blocks", ()))
    if not hasattr(model, "load_pretrained") or depth != blocks:
        raise ModelError(f"{path} does not fit this model: it has {depth} blocks, and the model {blocks}; name the "
                         "model it was made for")  # fmt: skip
    classes = class_count(model)
    if classes not in (0, head) and not new_head:
        raise ModelError(f"{path} does not fit this model: its head has {head} classes, and the model's {classes}; "
                         f"type `num_classes={head}`")  # fmt: skip
    try:
        with capture_timm_messages():
            model.load_pretrained(str(path))
    except Exception as error:  # timm copies what it finds, and raises as it likes over what it does not
        traceback.clear_frames(error.__traceback__)  # in which timm leaves the archive open
        raise ModelError(f"{path} does not fit this model ({one_line(error)}); name the model it was made for, with "
                         "the arguments it was trained with (`img_size`, `model_kwargs`)") from error  # fmt: skip
    made = classes not in (0, head)
    return ((_new_head_note(classes),) if made else ()), made


def _new_head_note(classes: int) -> str:
    return f"the head of {classes} classes is new: its weights are random until it is trained"


def _without_chunks(tensors: Tensors) -> Tensors:
    """Names as they are where blocks do not come in chunks, in which DINOv2 trains them."""
    chunk = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
    if not all(chunk.search(name) for name in tensors if re.search(r"(^|\.)blocks\.\d+\.", name)):
        return tensors
    return {chunk.sub(r"\1blocks.\2.", name): tensor for name, tensor in tensors.items()}


def _without_prefix(tensors: Tensors, wanted: Collection[str], where: str) -> tuple[Tensors, list[str]]:
    """The tensors under the prefix that makes most names the model's, and what is said about it and the others."""
    found = _marked(tensors)
    if found is None:
        counts = Counter(name.removesuffix(end) for name in tensors for end in _ends(name) if end in wanted)
        best = max(counts.values(), default=0)
        if counts[""] == best or best * 4 < len(wanted):
            return tensors, []
        copies = [prefix for prefix, count in counts.items() if count == best]
        found = next((prefix for prefix in copies if _AVERAGED.search(prefix)), copies[0]), ""
    prefix, before = found
    inside = {before + name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    outside = [name for name in tensors if not name.startswith(prefix)]
    notes = [f"{where} has the model under {prefix!r}, which is taken off"] if prefix else []
    if outside:
        notes.append(f"left out of {where}: {len(outside)} tensors beside the model, {listed(outside)}")
    return inside, notes


def _marked(tensors: Tensors) -> tuple[str, str] | None:
    """The prefix of a source that is known by its names, and what goes before them for timm."""
    for marks, before in _MARKS:
        for name in tensors:
            prefix = name.removesuffix(marks[0])
            fits = name.endswith(marks[0]) and (not prefix or prefix.endswith("."))
            if fits and all(prefix + mark in tensors for mark in marks):
                return prefix, before
    return None


def _ends(name: str) -> list[str]:
    """A name, and what is left of it without its first parts."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _renamed(tensors: Tensors) -> Tensors:
    """Names that timm's own filters do not know."""
    if "class_token" in tensors and "conv_proj.weight" in tensors:
        return {_by_rules(name, _TORCHVISION): tensor for name, tensor in tensors.items()}
    if any(name.endswith("patch_embed.projection.weight") for name in tensors):
        return {_by_rules(name, _MMPRETRAIN): tensor for name, tensor in tensors.items()}
    if "register_tokens" in tensors:  # by which timm tells DINOv2's
        tensors = {"mask_token": torch.zeros(1), **tensors}
    return tensors


def _by_rules(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in rules:
        changed, count = re.subn(pattern, ours, name)
        if count:
            return changed
    return name


def _filtered(model: nn.Module, tensors: Tensors, path: Path) -> Tensors:
    """What timm makes of the tensors before it loads pretrained weights of this architecture."""
    name = architecture_of(model)
    module = sys.modules[model_entrypoint(name).__module__] if is_model(name) else None
    filter_fn: Callable[..., Any] | None = getattr(module, "checkpoint_filter_fn", None)
    if filter_fn is None:
        return tensors
    options: dict[str, Any] = {"adapt_layer_scale": True}
    if "flexi" in name:
        options |= {"interpolation": "bilinear", "antialias": False}
    taken = {key: value for key, value in options.items() if key in inspect.signature(filter_fn).parameters}
    try:
        with capture_timm_messages():
            return dict(filter_fn(tensors, model, **taken))
    except Exception as error:  # timm reshapes and indexes as it likes
        raise ModelError(f"{path} does not fit this model: timm cannot convert it ({one_line(error)}); name the model "
                         "it was made for, with the arguments it was trained with (`img_size`, `model_kwargs`)"
                         ) from error  # fmt: skip


def _resized(before: Mapping[str, tuple[int, ...]], tensors: Tensors) -> list[str]:
    told = []
    for name, what in (("pos_embed", "positions are resized from {} to {}"),
                       ("patch_embed.proj.weight", "the patch embedding is resized from {} to {} px")):  # fmt: skip
        old, new = before.get(name), tensors.get(name)
        if old is None or new is None or len(old) != new.ndim:
            continue
        sides = (old[1], new.shape[1]) if name == "pos_embed" else (old[-1], new.shape[-1])
        if sides[0] != sides[1]:
            told.append(what.format(*sides))
    return told


def _adapt_channels(model: nn.Module, tensors: Tensors, own: Mapping[str, Tensor]) -> list[str]:
    told = []
    for name in _listed(description_of(model).get("first_conv")):
        key = f"{name}.weight"
        weight = tensors.get(key)
        if weight is None or key not in own or weight.ndim != 4 or weight.shape[1] == own[key].shape[1]:
            continue
        channels = own[key].shape[1]
        tensors[key] = adapt_input_conv(channels, weight, base_chans=weight.shape[1])
        told.append(f"{key} is adapted from {weight.shape[1]} channels to {channels}")
    return told


def _head_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of a classifier's tensors, of those that there are."""
    names = _listed(description_of(model).get("classifier"))
    return [key for name in names for key in (f"{name}.weight", f"{name}.bias") if key in tensors]


def _needs_head(model: nn.Module, tensors: Tensors, own: Mapping[str, Tensor]) -> bool:
    """Whether the tensors have no head, or one of another number of classes, and the model has one."""
    names = _head_names(model, own)
    return not all(name in tensors and tensors[name].shape == own[name].shape for name in names)


def _replace_head(model: nn.Module, tensors: Tensors, own: Mapping[str, Tensor]) -> None:
    """Puts the model's own classifier, if it has one, in the place of the file's."""
    for name in _head_names(model, tensors):
        del tensors[name]
    tensors.update({name: own[name] for name in _head_names(model, own)})


def _listed(names: object) -> tuple[str, ...]:
    """timm's description has one name, or several."""
    if isinstance(names, str):
        return (names,)
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()
