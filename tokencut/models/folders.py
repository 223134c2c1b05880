"""Folders that hold a model: timm's and transformers' `config.json`, weights beside it, and what other folders are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencut.errors import ModelError, UsageError
from tokencut.messages import one_line
from tokencut.models.checkpoints import INDEX
from tokencut.models.exported import ENDINGS, WHAT
from tokencut.models.hub import CONFIG, PREPROCESSORS, WEIGHTS, read_object
from tokencut.models.huggingface import is_transformers

# Weights that are there and cannot be taken, by how their names end, and what to do about it.
_OTHERS = (
    *((f"adapter_model.{kind}", "an adapter alone (LoRA), for the weights of another model; load both, call "
                                "model.merge_and_unload() and save that with save_pretrained")
      for kind in ("safetensors", "bin")),
    (".distcp", "a checkpoint of torch.distributed; make one file of it with python -m "
                "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pth"),
    ("_model_states.pt", "a checkpoint of DeepSpeed, in shards; the zero_to_fp32.py beside it makes one file of it"),
    (".h5", "weights of TensorFlow or Keras; load them with from_pretrained(FOLDER, from_tf=True), in a transformers "
            "that still can, and save them with save_pretrained"),
    (".msgpack", "weights of Flax; load them with from_pretrained(FOLDER, from_flax=True), in a transformers that "
                 "still can, and save them with save_pretrained"),
    ("saved_model.pb", "a SavedModel of TensorFlow, which holds no tensors of a timm model; name weights of PyTorch"),
    *((ending, WHAT.format("name the weights")) for ending in ENDINGS),
)  # fmt: skip


def is_model_folder(path: Path) -> bool:
    """Whether a folder has a `config.json`."""
    return (path / CONFIG).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's `config.json`.

    Raises:
        UsageError: There is none; what the folder is instead is named, as far as its files tell.
        ModelError: It is no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(_no_config(folder))
    found = read_object(path)
    if found is None:
        raise ModelError(f"{path} is not a JSON object; save the model again, with timm's save_for_hf or transformers' "
                         "save_pretrained")  # fmt: skip
    return found


def transformers_config(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's `config.json` where that is transformers'; else None."""
    config = read_object(folder / CONFIG)
    return config if is_transformers(config) else None


def preprocessor_of(folder: Path) -> dict[str, Any] | None:
    """What a transformers folder says about the preparing of images; None where it says nothing.

    Raises:
        ModelError: It is no JSON object.
    """
    for name in PREPROCESSORS:
        if not (folder / name).is_file():
            continue
        found = read_object(folder / name)
        if found is None:
            raise ModelError(f"{folder / name} is not a JSON object; save the processor again with save_pretrained")
        found = found.get("image_processor", found)
        if isinstance(found, Mapping) and found.keys() & {"image_mean", "size", "do_resize", "resample"}:
            return dict(found)
    return None


def licence_of(folder: Path) -> str | None:
    """The licence that the head of a folder's `README.md` tells, as the hub has it; None where there is none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:20_000]
    except OSError:
        return None
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.+-]{1,60})[\"']?\s*$", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def weights_in(folder: Path) -> Path | None:
    """The file of weights that timm or transformers would take: one file, or the index of several."""
    return next((folder / name for name in (*WEIGHTS, *INDEX) if (folder / name).is_file()), None)


def require_weights(folder: Path) -> Path:
    """As `weights_in`.

    Raises:
        ModelError: There are none that can be taken; those that are there are named for what they are.
    """
    found = weights_in(folder)
    if found is None:
        other = _other_weights(folder)
        names = f"it holds {other[0]}, {other[1]}" if other else f"there is none of {', '.join(WEIGHTS[:2])}"
        raise ModelError(f"cannot load weights from {folder}: {names}; or give `checkpoint='FILE'`")
    return found


def _other_weights(folder: Path) -> tuple[str, str] | None:
    """A file of weights that cannot be taken, and what it is."""
    names = sorted(path.name for path in folder.iterdir())
    return next(((name, what) for end, what in _OTHERS for name in names if name.endswith(end)), None)


def _no_config(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}; give one with {CONFIG} and model.safetensors, such as local-dir:FOLDER"
    steps = [path for path in folder.glob("checkpoint-*") if is_model_folder(path)]
    if steps:
        last = max(steps, key=lambda path: (len(path.name), path.name))
        return f"{folder} has no {CONFIG}, but its checkpoints do; type {one_line(last)}"
    if (folder / "open_clip_config.json").is_file():
        return (f"{folder} is open_clip's, whose config names no timm architecture; name that, such as "
                f"vit_base_patch32_clip_224, with `checkpoint={str(folder)!r}`")  # fmt: skip
    other = _other_weights(folder)
    if other is not None:
        return f"{folder} has no {CONFIG}: it holds {other[0]}, {other[1]}"
    return (f"{folder} has no {CONFIG}; give a folder as timm or transformers save it, with {CONFIG} and "
            "model.safetensors, or name its architecture and a file of weights: `checkpoint='FILE'`")  # fmt: skip
