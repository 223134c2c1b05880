"""What a command works on: the model that its MODEL, model options and reduction options come to.

Imports torch: commands import this when they run, not before.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import disable_progress_bars
from torch import nn

from tokencut.cli import render
from tokencut.cli.observer import CommandObserver, watched
from tokencut.cli.options import DEFAULT_KEEP, DataOptions, ModelOptions, ReductionOptions, RunOptions
from tokencut.cli.wording import typed
from tokencut.data.sources import DIGITS, Source
from tokencut.errors import UsageError
from tokencut.evaluation.accuracy import EvaluationReport
from tokencut.evaluation.distributed import evaluate_spread
from tokencut.export.runtimes import ExportedModel
from tokencut.files import user_path
from tokencut.methods import make_method, methods
from tokencut.model import CompressedModel, compress, predicted_gmacs
from tokencut.models.artifact import read_info
from tokencut.models.exported import is_exported
from tokencut.models.loading import Loaded, artifact_of, load_model
from tokencut.models.model_args import parse_model_kwargs
from tokencut.models.names import usual_method
from tokencut.models.pretrained_cfg import data_config, frames_of
from tokencut.over_frames import OverFrames, of_images
from tokencut.recipe import Recipe
from tokencut.runtime.devices import describe_device, versions
from tokencut.runtime.distributed import Group, single_process

if TYPE_CHECKING:
    from tokencut.cli.levels_run import LevelsRun
    from tokencut.cli.search_run import SearchRun


@dataclass(frozen=True)
class Subject:
    """A model to work on.

    Attributes:
        name: What reports call it.
        model: A `CompressedModel`; timm's own, where the dense model was asked for; or an exported file.
        dense: timm's own model, inside or beside it; the file itself where it is exported.
        new_head: Whether the classifier has random weights.
    """

    name: str
    model: nn.Module
    dense: nn.Module
    new_head: bool = False

    @property
    def recipe(self) -> Recipe | None:
        """What is done to the model; None for the dense one."""
        model = of_images(self.model)
        if isinstance(model, ExportedModel):
            return model.info.recipe
        return model.recipe if isinstance(model, CompressedModel) else None

    @property
    def seen(self) -> str:
        """What the model takes one of: an `image`, or a `clip`."""
        return "image" if frames_of(self.model) is None else "clip"

    def over_frames(self, frames: int | None) -> Subject:
        """The same on clips of so many frames, seen one by one; as it is where None.

        Raises:
            UsageError: The model takes clips by itself.
        """
        if frames is None:
            return self
        model, dense = (OverFrames(model, frames).eval() for model in (self.model, self.dense))
        return replace(self, model=model, dense=dense)

    def describe(self) -> str:
        """The reduction in words, such as `bat, keep 0.7, layers 4,7,10`."""
        return describe(self.recipe) if self.recipe else "none: the dense model"


def prepare(
    spec: str,
    source: ModelOptions,
    reduction: ReductionOptions,
    *,
    seed: int,
    dense: bool = False,
    weights_needed: bool = True,
    to_be_trained: bool = False,
    search: SearchRun | LevelsRun | None = None,
) -> Subject:
    """Loads a model and reduces it as asked; what can be checked without the model is checked first.

    Args:
        spec: MODEL.
        source: Where its weights come from.
        reduction: How to reduce it; beside a tokencut file, instead of its recipe.
        seed: For random weights.
        dense: Whether the untouched model is wanted.
        weights_needed: Whether the weights matter.
        to_be_trained: Whether the model is fine-tuned next.
        search: Finds the keep rates, which were not typed then.

    Raises:
        TokencutError: An option is wrong, or the model cannot be had.
    """
    given = (*(() if search is None else (search.option,)), *reduction.given())
    if dense and given:
        raise UsageError(f"--dense is the untouched model, to which {' and '.join(given)} cannot apply; leave one out")
    # Until the search has found them: with nothing reduced, `all` is no schedule to warn of.
    arguments = (reduction if search is None else replace(reduction, keep="1")).arguments()
    method = arguments["method"] or usual_method(spec)
    if method is not None:  # else the model's family says which
        make_method(method, arguments["method_options"])
    if not render.on_terminal():
        disable_progress_bars()
    loaded = load_model(
        spec,
        pretrained=not source.no_pretrained,
        checkpoint=source.checkpoint,
        model_kwargs=parse_model_kwargs(source.model_kwargs or ()),
        num_classes=source.num_classes,
        img_size=source.img_size,
        preprocessing=source.preprocessing(),
        weights_needed=weights_needed,
        seed=seed,
        to_be_trained=to_be_trained,
    )
    for text in loaded.notes:
        render.note(text)
    if weights_needed and not loaded.preprocessing_told:
        told = data_config(loaded.dense)
        mean, std = (",".join(f"{value:g}" for value in told[name]) for name in ("mean", "std"))
        render.note(f"{source.checkpoint} does not say how its images were prepared: taking what timm has for "
                    f"{loaded.name}, --mean {mean} --std {std} --crop-pct {told['crop_pct']:g} --interpolation "
                    f"{told['interpolation']}; type those of the weights where they differ")  # fmt: skip
    if not weights_needed and loaded.info is None and loaded.origin.kind == "random":
        render.note("costs do not depend on weights, so none are downloaded")
    if dense:
        return Subject(loaded.name, loaded.dense, loaded.dense)
    if loaded.recipe and not given:
        return Subject(loaded.name, loaded.model, loaded.dense)
    return _reduced(loaded, arguments, given, to_be_trained=to_be_trained, search=search)


def _reduced(
    loaded: Loaded,
    arguments: dict[str, Any],
    given: tuple[str, ...],
    *,
    to_be_trained: bool,
    search: SearchRun | LevelsRun | None,
) -> Subject:
    replaced = loaded.recipe
    if replaced and methods()[replaced.method].needs_training:
        raise UsageError(
            f"{loaded.name} was trained for its recipe ({describe(replaced)}), so {' and '.join(given)} cannot replace "
            "it; leave out what was typed, or compress the original model"
        )
    if search is not None:
        arguments = search(loaded, arguments)
    model = compress(loaded.dense, **arguments)
    for rate in model.recipe.keeps if search is None else ():
        told = model.adapter.keep_note(model.model, rate, model.method)
        if told is not None:
            render.note(typed(told))
    if methods()[model.recipe.method].needs_training and not to_be_trained:
        render.note(f"the stages of method {model.recipe.method} are untrained: its cost is true, its accuracy is not")
    if replaced:
        render.note(
            f"{' and '.join(given)} replace{'s' if len(given) == 1 else ''} the recipe of {loaded.name} "
            f"({describe(replaced)}) by {describe(model.recipe)}"
        )
    elif not given:
        taken = f"--method {model.recipe.method} --keep {DEFAULT_KEEP}"
        render.note(f"no reduction options given: taking the default, {taken}")
    return Subject(loaded.name, model, loaded.dense, loaded.new_head)


def warn_recipe_ignored(spec: str, *, taken_by: str, instead: str) -> None:
    """Says what becomes of the recipe of a tokencut file where several others take its place.

    Args:
        spec: MODEL; nothing is said unless it is a file, or a folder with one.
        taken_by: What starts from the dense model, such as `a sweep`.
        instead: What to type where the recipe cannot be replaced.

    Raises:
        UsageError: The weights were trained for the recipe.
    """
    file = artifact_of(spec)
    if file is None or is_exported(file):  # refused where it is opened
        return
    recipe = read_info(file).recipe
    if methods()[recipe.method].needs_training:
        raise UsageError(
            f"{spec} was trained for its recipe ({describe(recipe)}), which {taken_by} cannot replace; {instead}"
        )
    render.note(f"the recipe of {spec} ({describe(recipe)}) does not count: {taken_by} starts from its dense model")


def note_same_images(first: str, one: Source | None, second: str, other: Source | None, why: str) -> None:
    """Says so where two options name the same images; of digits, each takes its own part.

    Args:
        first: An option.
        one: Its images.
        second: Another option.
        other: Its images.
        why: What comes of it.
    """
    if one is None or other is None or DIGITS in (one.name, other.name):
        return
    if user_path(one.name).resolve() == user_path(other.name).resolve():
        render.note(f"{first} and {second} are both {other.name}: {why}; give other images to one of them")


def describe(recipe: Recipe) -> str:
    """A recipe in words."""
    keep = render.keep_text(recipe.keep, recipe.schedule.reduce_by)
    rate = keep if recipe.keep is None else f"keep {keep}"
    if recipe.levels is not None:
        rate = f"keep {' or '.join(f'{keep:g}' for keep in recipe.levels.keeps)} by image"
    static = "" if recipe.static_keep is None else f", static keep {recipe.static_keep:g}"
    return f"{recipe.method}, {rate}, layers {','.join(map(str, recipe.layers))}{static}"


def run_facts(subject: Subject, device: torch.device, precision: str) -> dict[str, Any]:
    """What a result depends on beside model and images, for JSON: the reduction, the device, the versions."""
    recipe = subject.recipe
    return {
        "method": recipe.method if recipe else None,
        "keep": recipe.keep if recipe else 1.0,
        "layers": list(recipe.layers) if recipe else [],
        **({"levels": list(recipe.levels.keeps)} if recipe and recipe.levels is not None else {}),
        **({"static_keep": recipe.static_keep} if recipe and recipe.static_keep is not None else {}),
        "device": describe_device(device),
        "precision": precision,
        "versions": {**versions(), **runtime_version(subject.model)},
    }


def runtime_version(model: nn.Module) -> dict[str, str]:
    """What runs an exported file, by name; nothing for other models."""
    return dict([model.runtime]) if isinstance(model, ExportedModel) else {}


def gmacs(model: nn.Module) -> float:
    """Multiply-adds per image by the closed form, in units of 1e9; as it was exported, for a file."""
    if isinstance(model, ExportedModel):
        return model.info.gmacs
    if isinstance(model, OverFrames):
        return model.frames * gmacs(model.model)
    return predicted_gmacs(model)


def measure_accuracy(
    model: nn.Module,
    name: str,
    images: Source,
    data: DataOptions,
    run: RunOptions,
    device: torch.device,
    predictions: Path | None = None,
    group: Group | None = None,
    compile_mode: str | None = None,
    *,
    capture: bool = False,
    force: bool = False,
    observer: CommandObserver | None = None,
) -> EvaluationReport:
    """Evaluates a model as the options say, and shows how far it is.

    Args:
        model: Dense or compressed.
        name: What the report calls it.
        images: The opened `--data`.
        data: Which of the images, and how they are loaded.
        run: How the model runs.
        device: Where it runs.
        predictions: A CSV file to write.
        group: The processes that share the images; this one alone where None.
        compile_mode: How the model is compiled; not at all where None.
        capture: Whether it runs from a CUDA graph.
        force: Whether the CSV file may be replaced.
        observer: Told how far it is; where None there is a line for that.
    """
    with nullcontext(observer) if observer else watched(f"evaluating {name}") as told:
        return evaluate_spread(
            group or single_process(device),
            model,
            images,
            batch_size=run.batch_size,
            workers=data.workers,
            precision=run.precision,
            compile_mode=compile_mode,
            capture=capture,
            limit=data.limit,
            predictions=predictions,
            force=force,
            gmacs=gmacs(model),
            name=name,
            observer=told,
        )
