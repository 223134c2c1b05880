"""Tensor files: what a file is, reading it without unpickling anything, and a strict comparison with a model.

Readers are told which error to raise: the same file is a damaged artifact here and a wrong checkpoint there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokencut.composite import all_finite
from tokencut.errors import ModelError
from tokencut.files import unlike_a_file
from tokencut.messages import listed, one_line, shorten
from tokencut.models.exported import ENDINGS, WHAT
from tokencut.models.header import file_kind, open_safetensors
from tokencut.models.pickles import TorchScriptError, read_pickle
from tokencut.models.state_dicts import find_weights, refuse_others, without_wrappers

Shapes = Mapping[str, tuple[int, ...]]

# How many tensors of a kind a message names before it counts the rest.
NAMED = 3

_KERAS = ("a file of Keras or TensorFlow, which holds no tensors of a timm model; give weights of PyTorch, or JAX's "
          ".npz, of the same model")  # fmt: skip
_BEGINNINGS = (
    (b"\x89HDF\r\n\x1a\n", _KERAS),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; type git lfs pull where it was cloned"),
    (b"GGUF", "a quantised model for llama.cpp; give the weights it was made of"),
)
_ENDINGS = (
    *((ending, WHAT.format("give the weights")) for ending in ENDINGS),
    (".pb", _KERAS),
    (".ckpt.index", _KERAS),
    (".data-00000-of-00001", _KERAS),
    (".msgpack", "a file of Flax, whose names are no timm model's; give weights of PyTorch, or JAX's .npz"),
    (".gguf", "a quantised model for llama.cpp; give the weights it was made of"),
)

# As timm and transformers call them in a folder.
SAFETENSORS = ("model.safetensors", "open_clip_model.safetensors")
PICKLES = ("pytorch_model.bin", "open_clip_pytorch_model.bin")
# Lists of what is in which of several files, as transformers writes large models.
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Reads a model's weights from a file, without running anything that it names.

    Args:
        path: A file of safetensors or of `torch.save`, whatever training program wrote it; or the index of several; or
            a folder with one of these, as transformers and timm write it.

    Returns:
        The tensors by name, without what wrappers put into the names, and what a user should be told.

    Raises:
        ModelError: The file is missing, damaged, of another kind (which is named), or holds no weights.
    """
    path = weights_file(path)
    what = unlike_a_file(path)
    if what is not None:
        raise ModelError(f"the checkpoint {path} {what}; give a file of weights: `checkpoint='model.safetensors'`")
    if path.name.endswith(".index.json"):
        parts = [read_checkpoint(part)[0] for part in shards(path)]
        return {name: tensor for part in parts for name, tensor in part.items()}, ()
    kind = file_kind(path)
    other = None if kind == "safetensors" else other_kind(path)
    if other is not None:
        raise ModelError(f"{path} is {other}")
    if path.suffix == ".safetensors" or kind == "safetensors":
        with open_safetensors(path, ModelError) as file:
            content: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if not content:
            raise ModelError(f"{path} holds no weights; give a file whose content is a model's state_dict")
        refuse_others(content, str(path))
        return without_wrappers(content), ()
    try:
        content = read_pickle(path)
    except TorchScriptError as problem:
        raise ModelError(f"{path} is a TorchScript archive, whose content is code; save the model's state_dict, of the "
                         "program that made it: torch.save(model.state_dict(), FILE)") from problem  # fmt: skip
    except Exception as problem:  # torch.load raises whatever the bytes lead it to
        raise ModelError(f"{path} is not a file of weights that can be read without running code from it "
                         f"({one_line(problem)}); write one with torch.save(model.state_dict(), FILE)"
                         ) from problem  # fmt: skip
    return find_weights(content, str(path))


def weights_file(path: Path) -> Path:
    """A file of weights; of a folder, the one in it that timm or transformers would take.

    Raises:
        ModelError: A folder without one.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in (*SAFETENSORS, *INDEX, *PICKLES) if (path / name).is_file()), None)
    if found is None:
        raise ModelError(f"the checkpoint {path} is a folder; give a file of weights: `checkpoint='model.safetensors'`")
    return found


def is_npz(path: Path) -> bool:
    """Whether a file is an archive of numpy's, as JAX's checkpoints are, by what is in it."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def other_kind(path: Path) -> str | None:
    """What a file is that is neither safetensors nor `torch.save`'s, as far as is known, and what to do instead."""
    with path.open("rb") as file:
        start = file.read(32)
    for beginning, what in _BEGINNINGS:
        if start.startswith(beginning):
            return what
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("model.weights.h5") for name in names):
            return _KERAS
    return next((what for end, what in _ENDINGS if path.name.endswith(end)), None)


def shard_names(index: Path) -> list[str]:
    """The names of the files that an index lists, sorted.

    Raises:
        ModelError: It cannot be read, or a name leads elsewhere.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = next((name for name in names if Path(name).name != name), None)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as problem:
        raise ModelError(f"{index} is not an index of files with weights; save the model again") from problem
    if outside is not None:
        raise ModelError(f"{index} names {shorten(outside)}, which is not a file beside it; save the model again")
    return names


def shards(index: Path) -> list[Path]:
    """The files that an index lists.

    Raises:
        ModelError: As `shard_names`, or one is missing.
    """
    names = shard_names(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise ModelError(f"{index} names {len(names)} files, and {listed(missing) or 'none'} "
                         f"{'is' if len(missing) == 1 else 'are'} missing; copy all of them")  # fmt: skip
    return [index.parent / name for name in names]


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies a checkpoint's tensors into a model if they are exactly the model's.

    Args:
        model: A timm model.
        tensors: The checkpoint, by timm's names.
        path: Where it was read from, for the message.

    Raises:
        ModelError: Tensors are missing, unexpected, of another shape, of a type for no weights, or not finite: all
            are counted and the first few named.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problem = differences(wanted, found)
    if problem:
        raise ModelError(f"{path} does not fit this model: {problem}; {_advice(wanted, found)}")
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    problem = wrong_types(model.state_dict(), kinds) or not_finite(tensors)
    if problem:
        raise ModelError(f"the weights in {path} cannot be used: {problem}; give another file")
    model.load_state_dict(dict(tensors))


def differences(wanted: Shapes, found: Shapes, named: int | None = NAMED) -> str | None:
    """All that differs between the tensors of a model and of a file.

    Args:
        wanted: The model's shapes by name.
        found: The file's.
        named: How many of each kind to name; None for all.

    Returns:
        One line, or None where nothing differs.
    """
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    reshaped = [
        f"{name} ({_shape(found[name])} in the file, {_shape(wanted[name])} in the model)"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return "; ".join(f"{len(names)} {kind}: {listed(names, named)}" for kind, names in kinds if names) or None


# The types that weights are stored in, as safetensors and as torch call them.
WEIGHT_TYPES = frozenset(("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"))


def wrong_types(wanted: Mapping[str, Tensor], found: Mapping[str, str]) -> str | None:
    """What a file holds in a type in which no weights are: torch would cast it without a word, to other numbers.

    Args:
        wanted: The model's tensors by name.
        found: The type of each of the file's.

    Returns:
        One line, or None where nothing is wrong.
    """
    wrong = [f"{name} ({found[name]})" for name, tensor in wanted.items()
             if name in found and tensor.is_floating_point() and found[name] not in WEIGHT_TYPES]  # fmt: skip
    return f"{len(wrong)} in a type for no weights: {listed(wrong, NAMED)}" if wrong else None


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The tensors in which not all numbers are finite: with them, nothing that a model gives is.

    Args:
        tensors: A model's, by name.

    Returns:
        One line, or None where all are finite.
    """
    # A single infinite number is a limit that limits nothing, as Gemma's layers have for what comes in and goes out.
    wrong = [
        name
        for name, tensor in tensors.items()
        if not all_finite(tensor) and not (tensor.dim() == 0 and bool(torch.isinf(tensor)))
    ]
    return f"{len(wrong)} with numbers that are not finite: {listed(wrong, NAMED)}" if wrong else None


def require_finite(model: nn.Module) -> None:
    """Refuses a model with weights that are no numbers, before any work is done with it.

    Raises:
        ModelError: Some are not finite.
    """
    problem = not_finite(model.state_dict())
    if problem:
        raise ModelError(f"the model's weights cannot be used: {problem}; give it others")


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal; of an index, that of its files one after the other."""
    digest = hashlib.sha256()
    for part in shards(path) if path.name.endswith(".index.json") else [weights_file(path)]:
        with part.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Draws CPU weights from `seed` inside the block, and leaves torch's own random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _advice(wanted: Shapes, found: Shapes) -> str:
    """What to type so that the checkpoint fits, as far as its shapes tell."""
    wrong = [name for name, shape in wanted.items() if found.get(name) != shape]
    if 2 * sum(name in found for name in wanted) < len(wanted):
        return ("its names are those of another kind of model, and no conversion from it is known; name the model it "
                "was made for, or rename its tensors as timm has them")  # fmt: skip
    heads = [name for name in wrong if name.startswith("head")]
    if not heads:
        return "name the model it was made for, with the arguments it was trained with (`img_size`, `model_kwargs`)"
    classes = found[heads[0]][0] if heads[0] in found else 0
    what = f"its head has {classes} classes" if classes else "it has no head"
    trained = "" if classes else ", or train one (`epochs=5`, `train_data='DIR'`)"
    others = "" if len(heads) == len(wrong) else ", and the arguments it was trained with (`img_size`, `model_kwargs`)"
    return f"{what}: type `num_classes={classes}`{trained}{others}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
