"""The weights among what a checkpoint holds, whatever training program wrote it, and what other files are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tokencut.errors import ModelError
from tokencut.messages import listed, shorten
from tokencut.models.pickles import StandIn, state_dict_of

# Where programs keep a model's weights, the averaged ones first, as timm has it, and a teacher's before a student's.
_KEYS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "teacher", "target_encoder", "state_dict",
    "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights", "backbone", "encoder",
    "student",
)  # fmt: skip
# What wrappers put before, or into, the names of the modules that they hold: torch.compile, FSDP, checkpointing, EMA.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."
_COUNTERS = re.compile(r"(^|\.)(n_averaged|num_batches_tracked_ema|num_updates|decay)$")

# What weights are that no model of timm's has, by a name among them, and what to do.
_OTHERS = (
    (r"\.lora_[AB]\.|\.lora_embedding_[AB]", "holds adapters (LoRA)",
     "load them with the model they belong to, call model.merge_and_unload() and save that"),
    (r"\.parametrizations\.\w+\.original", "holds parametrised weights",
     "call torch.nn.utils.parametrize.remove_parametrizations on them and save the state_dict again"),
    (r"\.(absmax|quant_map|quant_state\.|SCB$|qweight$|qzeros$|g_idx$)", "holds quantised weights",
     "name the weights they were made of"),
    (r"(^|\.)_flat_param(_\d+)?$|(^|\.)flat_param", "holds a part of an FSDP model",
     "save a full state_dict (StateDictType.FULL_STATE_DICT)"),
    (r"^(bert|roberta|gpt2|transformer\.(wte|h\.0\.)|model\.embed_tokens|encoder\.embed_tokens|lm_head|"
     r"distilbert|electra|albert|shared\.weight|embeddings\.word_embeddings)", "holds a model of text",
     "name weights of a Vision Transformer"),
)  # fmt: skip


def find_weights(content: Any, where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Finds a model's weights.

    Args:
        content: What a file holds.
        where: The file, for messages.

    Returns:
        The tensors by name, without what wrappers put into the names, and what a user should be told.

    Raises:
        ModelError: There are none, or they are of a kind that cannot be taken, which is named.
    """
    path: list[str] = []
    notes: tuple[str, ...] = ()
    while (tensors := _tensors(content)) is None:
        held = {key: value for key, value in content.items() if isinstance(value, (Mapping, StandIn))
                } if isinstance(content, Mapping) else {}  # fmt: skip
        named = [key for key in _KEYS if key in held and _holds_tensors(held[key])]
        if not named:
            named = [key for key, value in held.items() if isinstance(key, str) and _holds_tensors(value)]
            if len(named) != 1:
                raise _nothing(content, named, where)
        others = [key for key in named[1:] if key != named[0]]
        if others:
            notes = (*notes, f"taking {named[0]!r} of {where}, which holds {listed(others)} too")
        path.append(named[0])
        content = held[named[0]]
        if len(path) > 4:
            raise _nothing(content, [], where)
    refuse_others(tensors, where)
    return without_wrappers(tensors), notes


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without what torch.compile, DDP, FSDP and checkpointing put into names, and without their counters."""
    named = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    while named and all(name.startswith(_PARALLEL) or _COUNTERS.search(name) for name in named):
        if all(_COUNTERS.search(name) for name in named):
            break
        named = {name.removeprefix(_PARALLEL): tensor for name, tensor in named.items() if not _COUNTERS.search(name)}
    return named


def refuse_others(names: Iterable[str], where: str) -> None:
    """Names weights that no model of timm's has for what they are.

    Raises:
        ModelError: They are such.
    """
    known = list(names)
    for pattern, what, instead in _OTHERS:
        found = next((name for name in known if re.search(pattern, name)), None)
        if found is not None:
            raise ModelError(f"{where} {what}, such as {found}; {instead}")


def _tensors(content: Any) -> dict[str, Tensor] | None:
    """The tensors of a state dict, or of a module that was saved whole; None for anything else."""
    if isinstance(content, StandIn) and "_modules" in content.state:
        return state_dict_of(content) or None
    if not isinstance(content, Mapping):
        return None
    found = {name: value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)}
    # Beside the weights a state dict may hold a version or a counter; beside settings a checkpoint may hold a tensor.
    return found if len(found) * 2 > len(content) and any("." in name for name in found) else None


def _holds_tensors(content: Any) -> bool:
    if _tensors(content) is not None:
        return True
    return isinstance(content, Mapping) and any(_tensors(value) is not None for value in content.values())


def _nothing(content: Any, several: list[str], where: str) -> ModelError:
    if isinstance(content, Mapping):
        keys = set(map(str, content))
        if {"state", "param_groups"} <= keys:
            return ModelError(
                f"{where} is the state of an optimizer; give the file of weights that was saved beside it"
            )
        if keys & {"optimizer_state_dict", "base_optimizer_state", "loss_scaler"} and "module" not in keys:
            return ModelError(f"{where} is a part of a DeepSpeed checkpoint without weights; make one file of all of "
                              "them with the zero_to_fp32.py beside it")  # fmt: skip
        if several:
            return ModelError(f"{where} holds weights under several names, {listed(several)}; save one of them alone, "
                              "with torch.save(model.state_dict(), FILE)")  # fmt: skip
        shown = f"; it has {listed([shorten(key) for key in content])}" if content else ""
        return ModelError(f"{where} holds no weights{shown}; give a file whose content is a model's state_dict")
    return ModelError(f"{where} holds no weights, but a {type(content).__name__}; give a file whose content is a "
                      "model's state_dict")  # fmt: skip
