"""Turns what a user types as MODEL into a model: a tokencut file, `digits`, a timm name, `hf-hub:` or `local-dir:`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencut.errors import UsageError
from tokencut.files import unlike_a_file, user_path
from tokencut.models import artifact, folders, hub, opening
from tokencut.models.checkpoints import INDEX
from tokencut.models.exported import WHAT, is_exported
from tokencut.models.loaded import Loaded, Request
from tokencut.models.model_args import check_model_args
from tokencut.models.names import is_name, resolve_name
from tokencut.models.opening import BUNDLED
from tokencut.models.pretrained_cfg import check_preprocessing

__all__ = ["BUNDLED", "Loaded", "artifact_of", "load_model"]

_PATH_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")


def load_model(
    spec: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    weights_needed: bool = True,
    seed: int = 0,
    to_be_trained: bool = False,
) -> Loaded:
    """Loads the model that a user names.

    Args:
        spec: An existing file or a folder with a `config.json` of timm or transformers (they win over a name),
            `digits`, a timm name or alias with or without a tag, `hf-hub:ID`, or `local-dir:FOLDER`.
        pretrained: Whether to load pretrained weights; random ones, drawn from `seed`, otherwise.
        checkpoint: A local file of weights to load instead: safetensors, `torch.save`'s whatever training program wrote
            it, JAX's .npz, an index of several, or a folder with one of these.
        model_kwargs: More arguments for timm.
        num_classes: Classes of the head, 0 for none.
        img_size: Height and width of the image in px.
        preprocessing: What the weights were trained with, where the model's description says otherwise: some of `mean`
            and `std` (by channel, of pixels from 0 to 1), `crop_pct` and `interpolation`.
        weights_needed: Whether the weights matter: where they don't, as for a cost, nothing is ever downloaded.
        seed: For random weights.
        to_be_trained: Whether a fine-tune follows, so that a checkpoint may lack a head of the number of classes.

    Raises:
        UsageError: There is no such model (the nearest are offered), or an argument does not fit it.
        ModelError: The model is not supported, or its weights cannot be had or do not fit.
        ArtifactError: A file that is not one of tokencut's, or damaged.
    """
    args = _timm_args(model_kwargs, num_classes, img_size)
    known = check_preprocessing(preprocessing or {})
    spec = expanded(spec)
    file = user_path(checkpoint) if checkpoint else None
    request = Request(pretrained, file, args, known, weights_needed, seed, to_be_trained)
    if Path(spec).is_file():
        _refuse_exported(spec)
        _refuse_weights_alone(Path(spec))
        return opening.from_artifact(spec, request)
    if spec == BUNDLED:
        return opening.from_digits(request)
    if folders.is_model_folder(Path(spec)):
        return opening.from_folder(Path(spec), spec, request)
    scheme, colon, rest = spec.partition(":")
    scheme = scheme.lower().replace("_", "-")
    if colon and scheme == "local-dir":
        return opening.from_folder(Path(rest), spec, request)
    if colon and scheme == "hf-hub":
        return opening.from_hub(rest, request)
    _refuse_path(spec)
    return opening.from_name(resolve_name(spec), request)


def expanded(spec: str) -> str:
    """A MODEL whose path may begin with `~`, with the home folder that this stands for.

    Raises:
        UsageError: There is no such home folder.
    """
    scheme, colon, rest = spec.partition(":")
    if spec.startswith("~"):
        return str(user_path(spec))
    return f"{scheme}:{user_path(rest)}" if colon and rest.startswith("~") and _is_local(scheme) else spec


def _is_local(scheme: str) -> bool:
    return scheme.lower().replace("_", "-") == "local-dir"


def artifact_of(spec: str) -> Path | None:
    """The tokencut file that a MODEL names: itself, or the weights in its folder; None where it names none."""
    spec = expanded(spec)
    path = Path(spec)
    if path.is_file():
        return path
    if spec != BUNDLED and folders.is_model_folder(path):
        return opening.artifact_in(path)
    scheme, colon, rest = spec.partition(":")
    return opening.artifact_in(Path(rest)) if colon and _is_local(scheme) else None


def _timm_args(model_kwargs: Mapping[str, Any] | None, num_classes: int | None, img_size: int | None) -> dict[str, Any]:
    args = dict(model_kwargs or {})
    for name, value, least, example in (("num_classes", num_classes, 0, 10), ("img_size", img_size, 1, 224)):
        if value is None:
            continue
        if value < least:
            raise UsageError(f"`{name}={value}` is less than {least}; type `{name}={example}`")
        if name in args:
            raise UsageError(f"{name} is given twice, by `{name}={value}` and in `model_kwargs`; give it once")
        args[name] = value
    check_model_args(args)
    return args


def _refuse_path(spec: str) -> None:
    """Says what is wrong with a MODEL that can only have been meant as a path."""
    path = Path(spec)
    if spec and path.is_dir() and not is_name(spec):
        folders.read_config(path)  # there is none, and it says what there is
    if spec and path.exists() and not is_name(spec):
        raise UsageError(f"{spec} {unlike_a_file(path)}; give a file that `tokencut.save(model, 'FILE')` wrote")
    if path.suffix.lower() in _PATH_SUFFIXES or is_exported(path) or any(separator in spec for separator in "/\\"):
        owned = re.fullmatch(r"\w[\w.-]*/\w[\w-]*", spec)
        other = f", or type hf-hub:{spec} for the hub's repository" if owned else ""
        raise UsageError(f"no such file: {spec}; give a file that `tokencut.save(model, 'FILE')` wrote{other}")
    if ":" in spec:
        raise UsageError(f"unknown kind of model {spec!r}; type hf-hub:OWNER/NAME, local-dir:FOLDER, or a name that "
                         "'tokencut models' lists")  # fmt: skip


def _refuse_exported(spec: str) -> None:
    """Says what an exported file is good for, where it is named as a MODEL to work on."""
    if is_exported(spec):
        raise UsageError(f"{spec} is {WHAT.format('name the tokencut file that')}")


def _refuse_weights_alone(path: Path) -> None:
    """Points from a file of weights to the folder that says what they are."""
    known = (*hub.WEIGHTS, *INDEX)
    if path.name in known and folders.is_model_folder(path.parent) and not artifact.is_artifact(path):
        raise UsageError(f"{path} holds weights alone, and {path.parent / hub.CONFIG} says what they are: name the "
                         f"folder {path.parent}")  # fmt: skip
