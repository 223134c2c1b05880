"""Turns what a user types as MODEL into a model: a tokencut file, `digits`, a timm name, `hf-hub:` or `local-dir:`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from tokencut.adapters import adapter_for
from tokencut.errors import ModelError, UsageError
from tokencut.files import unlike_a_file, user_path
from tokencut.messages import one_line
from tokencut.model import CompressedModel
from tokencut.models import artifact, building, digits, fitting, folders, hub, huggingface
from tokencut.models.alterations import alter
from tokencut.models.checkpoints import INDEX, is_npz, not_finite, random_state, read_checkpoint, sha256
from tokencut.models.fields import preprocessing_problem
from tokencut.models.metadata import ArtifactInfo, Origin
from tokencut.models.model_args import check_model_args
from tokencut.models.names import ModelName, is_name, resolve_name
from tokencut.models.pretrained_cfg import (
    check_preprocessing,
    class_count,
    data_config,
    description_of,
    label_names,
    sync_pretrained_cfg,
)
from tokencut.recipe import Recipe, recipe_from_json

BUNDLED = "digits"
_PATH_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".onnx")


@dataclass(frozen=True)
class Loaded:
    """A model that was asked for by MODEL.

    Attributes:
        model: In eval mode, on the CPU: timm's own, or a `CompressedModel` where MODEL is a tokencut file.
        name: timm's name with the tag of the weights it got; MODEL itself where it is a file, `digits` or has a scheme.
        origin: Where the weights came from.
        info: What the file says, where MODEL is a tokencut file or a folder with one.
        notes: What a user should be told, one line each.
        new_head: Whether the classifier has random weights.
        preprocessing_told: Whether the source of the weights says how images are prepared, or the user did.
    """

    model: nn.Module
    name: str
    origin: Origin
    info: ArtifactInfo | None = None
    notes: tuple[str, ...] = ()
    new_head: bool = False
    preprocessing_told: bool = True

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of a tokencut file, or of the description beside one that is not there."""
        return self.model.recipe if isinstance(self.model, CompressedModel) else None

    @property
    def dense(self) -> nn.Module:
        """timm's own model, without stages."""
        return self.model.model if isinstance(self.model, CompressedModel) else self.model


@dataclass(frozen=True)
class Request:
    """What was asked for beside MODEL; see `load_model`."""

    pretrained: bool = True
    checkpoint: Path | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    weights_needed: bool = True
    seed: int = 0
    to_be_trained: bool = False

    @property
    def fetches(self) -> bool:
        """Whether the model's own pretrained weights are to be loaded."""
        return self.pretrained and self.weights_needed and self.checkpoint is None


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
        return _from_artifact(spec, request)
    if spec == BUNDLED:
        return _from_digits(request)
    if folders.is_model_folder(Path(spec)):
        return _from_folder(Path(spec), spec, request)
    scheme, colon, rest = spec.partition(":")
    scheme = scheme.lower().replace("_", "-")
    if colon and scheme == "local-dir":
        return _from_folder(Path(rest), spec, request)
    if colon and scheme == "hf-hub":
        return _from_hub(rest, request)
    _refuse_path(spec)
    return _from_name(resolve_name(spec), request)


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
        return _artifact_in(path)
    scheme, colon, rest = spec.partition(":")
    return _artifact_in(Path(rest)) if colon and _is_local(scheme) else None


def _artifact_in(folder: Path) -> Path | None:
    weights = folders.weights_in(folder)
    return weights if weights is not None and artifact.is_artifact(weights) else None


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
    if path.suffix.lower() in _PATH_SUFFIXES or any(separator in spec for separator in "/\\"):
        owned = re.fullmatch(r"\w[\w.-]*/\w[\w-]*", spec)
        other = f", or type hf-hub:{spec} for the hub's repository" if owned else ""
        raise UsageError(f"no such file: {spec}; give a file that `tokencut.save(model, 'FILE')` wrote{other}")
    if ":" in spec:
        raise UsageError(f"unknown kind of model {spec!r}; type hf-hub:OWNER/NAME, local-dir:FOLDER, or a name that "
                         "'tokencut models' lists")  # fmt: skip


def _refuse_exported(spec: str) -> None:
    """Says what an exported file is good for, where it is named as a MODEL to work on."""
    if Path(spec).suffix.lower() == ".onnx":
        raise UsageError(f"{spec} is an exported model, which profile and eval take, as it is; name the tokencut file "
                         "that it came from")  # fmt: skip
    if Path(spec).suffix.lower() == ".pt2":
        raise UsageError(f"{spec} is an exported model, for torch.export.load; name the tokencut file that it came "
                         "from, or export that to .onnx, which profile and eval take")  # fmt: skip


def _refuse_weights_alone(path: Path) -> None:
    """Points from a file of weights to the folder that says what they are."""
    known = (*hub.WEIGHTS, *INDEX)
    if path.name in known and folders.is_model_folder(path.parent) and not artifact.is_artifact(path):
        raise UsageError(f"{path} holds weights alone, and {path.parent / hub.CONFIG} says what they are: name the "
                         f"folder {path.parent}")  # fmt: skip


def _from_artifact(spec: str, request: Request) -> Loaded:
    given = {
        "`checkpoint`": request.checkpoint is not None,
        "`pretrained=False`": not request.pretrained,
        "arguments of the architecture": bool(request.args),
        "other preprocessing": bool(request.preprocessing),
    }
    option = next((name for name, used in given.items() if used), None)
    if option:
        raise UsageError(f"{spec} is a file with its own weights and architecture, and takes no {option}; leave that "
                         "out, or name an architecture as MODEL")  # fmt: skip
    model = artifact.load(spec)
    info = artifact.read_info(spec)
    return Loaded(model, spec, info.origin, info)


def _from_digits(request: Request) -> Loaded:
    if request.args:
        raise UsageError(f"the bundled model digits has its own architecture, and takes no {', '.join(request.args)}; "
                         "leave that out, or name an architecture as MODEL")  # fmt: skip
    bundled = request.pretrained and request.checkpoint is None
    with random_state(request.seed):
        model = digits.create(pretrained=bundled)
    own = Origin("bundled", BUNDLED, licence=description_of(model).get("license")) if bundled else None
    return _finish(model, BUNDLED, own, request, ())


def _from_name(name: ModelName, request: Request) -> Loaded:
    building.check_arguments(str(name), request.args)
    if request.checkpoint is not None and not is_npz(request.checkpoint):
        return _from_checkpoint(name, request, request.checkpoint)
    if not request.fetches:
        model, notes = building.build(str(name), request.args, pretrained=False, seed=request.seed)
        return _finish(model, name.architecture, None, request, (*name.notes, *notes))
    cfg = get_pretrained_cfg(str(name))
    if cfg is None or not cfg.has_weights:
        raise ModelError(f"timm has no weights for {name}; {hub.OTHER_WAYS}")
    file = hub.cached_weights(cfg)
    if file is None:
        hub.require_hub(cfg, str(name))
    # timm takes a file without asking anybody. An .npz is in the original format of some models, which timm converts.
    overlay = None if file is None else {"file": str(file), "custom_load": file.suffix == ".npz" and cfg.custom_load}
    try:
        model, notes = building.build(str(name), request.args, pretrained=True, seed=request.seed, overlay=overlay)
    except Exception as error:  # whatever the network, the hub's client or a damaged file in the cache make timm raise
        if file is None:
            raise hub.download_failed(str(name), error) from error
        raise ModelError(f"cannot load {name} from the cache ({one_line(error)}); remove {file}") from error
    origin = Origin("hub" if cfg.hf_hub_id else "url", cfg.hf_hub_id or hub.address(cfg), licence=cfg.license)
    tagged = f"{name.architecture}.{cfg.tag}" if cfg.tag else name.architecture
    return _finish(model, tagged, origin, request, (*name.notes, *notes))


def _from_checkpoint(name: ModelName, request: Request, file: Path) -> Loaded:
    """An architecture with weights of a file, which may be of transformers, or made for another pooling."""
    tensors, told = read_checkpoint(file)
    sizes = building.sizes_of(str(name), request.args)
    found = huggingface.under_transformers_names(tensors)
    if found is not None:
        folder = file if file.is_dir() else file.parent
        config = folders.transformers_config(folder)
        if config is None:
            try:
                config = huggingface.guessed_config(found, sizes)
            except ModelError as error:
                raise ModelError(f"{file} cannot be taken: {error}") from error
            told = (*told, f"{file} has transformers' names and no config.json beside it: taking what transformers has "
                           f"for {config['model_type']!r}")  # fmt: skip
        huggingface.require_sizes(config, sizes, name.architecture, folder)
        loaded = _from_transformers(folder, config, name.architecture, request, tensors=found)
        return replace(loaded, notes=(*name.notes, *told, *loaded.notes))
    args = dict(request.args)
    if pooled := fitting.pooling_of(tensors, sizes.tensors, args):
        args["global_pool"] = pooled
        told = (*told, f"{file} has a norm behind the pooling, as MAE's fine-tuned weights have: taking "
                       f"global_pool={pooled}")  # fmt: skip
    model, notes = building.build(str(name), args, pretrained=False, seed=request.seed)
    return _finish(model, name.architecture, None, request, (*name.notes, *told, *notes), tensors=tensors)


def _from_hub(repository: str, request: Request) -> Loaded:
    spec = f"hf-hub:{repository}"
    try:
        validate_repo_id(repository.partition("@")[0])
    except HFValidationError as error:
        raise UsageError(f"{spec!r} names no repository of the hub; type hf-hub:OWNER/NAME") from error
    folder = hub.cached_repository(repository, weights=request.fetches)
    if folder is None and not request.weights_needed:
        owner, _, name = repository.partition("/")
        if owner == "timm" and is_name(name):
            return _from_name(resolve_name(name), request)
        raise ModelError(f"{spec} is not in the cache, and where weights do not matter nothing is downloaded; name its "
                         "architecture, such as deit_tiny, with `model_kwargs` where it differs")  # fmt: skip
    if folder is None:
        folder = hub.fetch_repository(repository, weights=request.fetches)
    return _from_folder(folder, spec, request, Origin("hub", repository))


def _from_folder(folder: Path, spec: str, request: Request, origin: Origin | None = None) -> Loaded:
    """A folder with timm's or transformers' `config.json` and weights; `origin` where it is not the user's own folder.

    Where the weights are a tokencut file, it is that file, with its recipe.
    """
    config = folders.read_config(folder)
    if request.pretrained and request.checkpoint is None and (file := _artifact_in(folder)) is not None:
        return replace(_from_artifact(str(file), request), name=spec)
    if huggingface.is_transformers(config):
        return _from_transformers(folder, config, spec, request, origin)
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise ModelError(f"{folder / hub.CONFIG} does not name a timm architecture, nor transformers' model_type; save "
                         "the model with timm.models.save_for_hf or save_pretrained, which write it")  # fmt: skip
    resolve_name(architecture)
    source = f"local-dir:{folder}"
    building.check_arguments(source, request.args)
    weights = folders.require_weights(folder) if request.fetches else None
    model, notes = building.build(source, request.args, pretrained=False, seed=request.seed)
    _name_own_parts(model)
    if weights is None:
        loaded = _finish(model, spec, None, request, notes)
        recipe = (config.get(artifact.KEY) or {}).get("recipe") if isinstance(config.get(artifact.KEY), dict) else None
        alone = request.pretrained and request.checkpoint is None and not request.args
        return replace(loaded, model=_compressed(model, recipe)) if recipe and alone else loaded
    told = description_of(model)
    names, classes = told.get("label_names"), class_count(model)
    if names and label_names(model) is None and classes == told.get("num_classes"):
        notes = (*notes, f"{hub.CONFIG} names {len(names)} classes and the head has {classes}: the names are left out")
    tensors, more = read_checkpoint(weights)
    fitted, _ = fitting.load_fitted(
        model, tensors, weights, new_head=classes != told.get("num_classes"), tell_head=False
    )
    origin = replace(origin or Origin("local-dir", sha256=sha256(weights)), licence=told.get("license"))
    return _finish(model, spec, origin, request, (*notes, *more, *fitted))


def _name_own_parts(model: nn.Module) -> None:
    """Has timm's description name the model's own parts where it was written for a model around it."""
    described = description_of(model)
    for entry in ("first_conv", "classifier"):
        names = described.get(entry)
        names = [names] if isinstance(names, str) else list(names or ())
        ours = [name.removeprefix("model.") for name in names]
        if names:
            described[entry] = ours[0] if len(ours) == 1 else tuple(ours)
    setattr(model, "pretrained_cfg", described)  # noqa: B010 (not a tensor)


def _compressed(model: nn.Module, recipe: Any) -> CompressedModel:
    """A model of random weights with the recipe that a `config.json` tells."""
    blocks = len(adapter_for(model).blocks(model))
    return CompressedModel(model, recipe_from_json(recipe, blocks)).eval()


def _from_transformers(
    folder: Path,
    config: dict[str, Any],
    spec: str,
    request: Request,
    origin: Origin | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Loaded:
    """A folder that transformers' `save_pretrained` wrote; its weights, or those of a checkpoint of the same model."""
    file = request.checkpoint or (folders.require_weights(folder) if request.fetches else None)
    if file is not None and tensors is None:
        read, _ = read_checkpoint(file)
        tensors = huggingface.under_transformers_names(read) or read
    try:
        found = huggingface.convert(config, tensors, folders.preprocessor_of(folder), request.args)
        check_model_args(found.args)
    except (ModelError, UsageError) as error:
        raise ModelError(f"{folder} cannot be taken: {error}") from error
    building.check_arguments(found.name, found.args)
    model, notes = building.build(found.name, found.args, pretrained=False, seed=request.seed)
    with random_state(request.seed):
        alter(model, found.alterations)
    described = {"num_classes": found.num_classes, "label_names": found.label_names, **found.preprocessing}
    setattr(model, "pretrained_cfg", {**description_of(model), **described})  # noqa: B010 (not a tensor)
    if file is None or found.tensors is None:
        return _finish(model, spec, None, request, (*found.notes, *notes))
    fitting.load_adapted(model, found.tensors, file)
    if request.checkpoint is not None:
        origin = Origin("checkpoint", f"transformers {found.source}", sha256(file))
    origin = origin or Origin("local-dir", f"transformers {found.source}", sha256(file))
    if request.checkpoint is None:
        origin = replace(origin, licence=folders.licence_of(folder))
    return _finish(model, spec, origin, replace(request, checkpoint=None), (*found.notes, *notes), foreign=True)


def _finish(
    model: nn.Module,
    name: str,
    origin: Origin | None,
    request: Request,
    notes: tuple[str, ...],
    *,
    foreign: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
) -> Loaded:
    """Loads a checkpoint, and makes the model and the notes tell what weights it has; no `origin`: random so far.

    `foreign`: the weights are not those that timm's description tells of. `tensors`: of the checkpoint, if it is read.
    """
    told, new_head = list(notes), False
    if request.checkpoint is not None:
        more, new_head = _load_checkpoint(model, request, request.checkpoint, tensors)
        told += more
        origin = Origin("checkpoint", sha256=sha256(request.checkpoint))
    elif origin is None:
        new_head = True
        told.append(f"{name} has random weights (seed {request.seed})")
    elif model.num_classes not in (0, description_of(model).get("num_classes")):
        new_head = True
        told.append(f"the head of {model.num_classes} classes is new: its weights are random (seed {request.seed}) "
                    "until it is trained")  # fmt: skip
    if origin is not None and (problem := not_finite(model.state_dict())):
        raise ModelError(f"the weights of {name} cannot be used: {problem}; give others by `checkpoint='FILE'`")
    if request.preprocessing:
        setattr(model, "pretrained_cfg", {**description_of(model), **request.preprocessing})  # noqa: B010 (not a tensor)
    if problem := preprocessing_problem(data_config(model)):
        raise ModelError(f"no image can be prepared for {name}: its description{problem}; give what its weights were "
                         "trained with, such as `interpolation='bicubic'` or `crop_pct=0.9`")  # fmt: skip
    own = origin is not None and origin.kind != "checkpoint" and not foreign
    sync_pretrained_cfg(model, own_weights=own)
    origin = origin or Origin("random", seed=request.seed)
    artifact.mark_origin(model, origin)
    silent = request.checkpoint is not None and not request.preprocessing
    return Loaded(
        model.eval(), name, origin, notes=tuple(told), new_head=new_head, preprocessing_told=not silent
    )  # fmt: skip


def _load_checkpoint(
    model: nn.Module, request: Request, file: Path, tensors: Mapping[str, Tensor] | None
) -> tuple[tuple[str, ...], bool]:
    """Loads a file of weights; what is to be told of it, and whether the head is a new one."""
    if is_npz(file):
        return fitting.load_npz(model, file, new_head=request.to_be_trained)
    told: tuple[str, ...] = ()
    if tensors is None:
        tensors, told = read_checkpoint(file)
    notes, new_head = fitting.load_fitted(model, tensors, file, new_head=request.to_be_trained)
    return (*told, *notes), new_head
