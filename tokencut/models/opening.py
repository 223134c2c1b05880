"""The kinds of MODEL, each opened: a tokencut file, `digits`, a timm name, a repository, a folder, a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from tokencut.adapters import adapter_for
from tokencut.errors import ModelError, UsageError
from tokencut.messages import one_line
from tokencut.model import CompressedModel
from tokencut.models import artifact, building, digits, fitting, folders, hub, huggingface
from tokencut.models.alterations import alter
from tokencut.models.checkpoints import is_npz, random_state, read_checkpoint, sha256
from tokencut.models.loaded import Loaded, Request, finish
from tokencut.models.metadata import Origin
from tokencut.models.names import ModelName, is_name, resolve_name
from tokencut.models.pretrained_cfg import class_count, description_of, label_names
from tokencut.recipe import recipe_from_json

BUNDLED = "digits"


def artifact_in(folder: Path) -> Path | None:
    """The file of weights in a folder that timm would take, where it is one of tokencut's."""
    weights = folders.weights_in(folder)
    return weights if weights is not None and artifact.is_artifact(weights) else None


def from_artifact(spec: str, request: Request) -> Loaded:
    """A tokencut file, which brings all that it needs and takes nothing else."""
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


def from_digits(request: Request) -> Loaded:
    """The bundled model."""
    if request.args:
        raise UsageError(f"the bundled model digits has its own architecture, and takes no {', '.join(request.args)}; "
                         "leave that out, or name an architecture as MODEL")  # fmt: skip
    bundled = request.pretrained and request.checkpoint is None
    with random_state(request.seed):
        model = digits.create(pretrained=bundled)
    own = Origin("bundled", BUNDLED, licence=description_of(model).get("license")) if bundled else None
    return finish(model, BUNDLED, own, request, ())


def from_name(name: ModelName, request: Request) -> Loaded:
    """A timm architecture, with timm's own weights, a checkpoint or random ones."""
    building.check_arguments(str(name), request.args)
    if request.checkpoint is not None and not is_npz(request.checkpoint):
        return _from_checkpoint(name, request, request.checkpoint)
    if not request.fetches:
        model, notes = building.build(str(name), request.args, pretrained=False, seed=request.seed)
        return finish(model, name.architecture, None, request, (*name.notes, *notes))
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
    return finish(model, tagged, origin, request, (*name.notes, *notes))


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
                config = huggingface.guessed_config(found, sizes, name.architecture)
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
    return finish(model, name.architecture, None, request, (*name.notes, *told, *notes), tensors=tensors)


def from_hub(repository: str, request: Request) -> Loaded:
    """A repository of the hub, out of its cache where that has it."""
    spec = f"hf-hub:{repository}"
    try:
        validate_repo_id(repository.partition("@")[0])
    except HFValidationError as error:
        raise UsageError(f"{spec!r} names no repository of the hub; type hf-hub:OWNER/NAME") from error
    folder = hub.cached_repository(repository, weights=request.fetches)
    if folder is None and not request.weights_needed:
        owner, _, name = repository.partition("/")
        if owner == "timm" and is_name(name):
            return from_name(resolve_name(name), request)
        raise ModelError(f"{spec} is not in the cache, and where weights do not matter nothing is downloaded; name its "
                         "architecture, such as deit_tiny, with `model_kwargs` where it differs")  # fmt: skip
    if folder is None:
        folder = hub.fetch_repository(repository, weights=request.fetches)
    return from_folder(folder, spec, request, Origin("hub", repository))


def from_folder(folder: Path, spec: str, request: Request, origin: Origin | None = None) -> Loaded:
    """A folder with timm's or transformers' `config.json` and weights; `origin` where it is not the user's own folder.

    Where the weights are a tokencut file, it is that file, with its recipe.
    """
    config = folders.read_config(folder)
    if request.pretrained and request.checkpoint is None and (file := artifact_in(folder)) is not None:
        return replace(from_artifact(str(file), request), name=spec)
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
        loaded = finish(model, spec, None, request, notes)
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
    return finish(model, spec, origin, request, (*notes, *more, *fitted))


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
    except (ModelError, UsageError) as error:
        raise ModelError(f"{folder} cannot be taken: {error}") from error
    building.check_arguments(found.name, found.args)
    model, notes = building.build(found.name, found.args, pretrained=False, seed=request.seed)
    with random_state(request.seed):
        alter(model, found.alterations)
    described = {"num_classes": found.num_classes, "label_names": found.label_names, **found.preprocessing}
    setattr(model, "pretrained_cfg", {**description_of(model), **described})  # noqa: B010 (not a tensor)
    if file is None or found.tensors is None:
        return finish(model, spec, None, request, (*found.notes, *notes))
    fitting.load_adapted(model, found.tensors, file)
    if request.checkpoint is not None:
        origin = Origin("checkpoint", f"transformers {found.source}", sha256(file))
    origin = origin or Origin("local-dir", f"transformers {found.source}", sha256(file))
    if request.checkpoint is None:
        origin = replace(origin, licence=folders.licence_of(folder))
    return finish(model, spec, origin, replace(request, checkpoint=None), (*found.notes, *notes), foreign=True)
