"""`tokencut visualize`: pictures of what a model still sees of images, stage by stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokencut.cli import render
from tokencut.cli.observer import watched
from tokencut.cli.options import (
    FrameStride,
    JsonFlag,
    ModelArgument,
    ModelOptions,
    ReductionOptions,
    RunOptions,
    reduction_option,
    with_groups,
)
from tokencut.errors import UsageError
from tokencut.files import user_path
from tokencut.runtime import extras

if TYPE_CHECKING:
    from tokencut.model import CompressedModel
    from tokencut.visualization.drawing import Picture, View

IMAGES_HELP = (
    "Image files (JPEG, PNG, WebP, BMP, TIFF), videos for a model of clips, or digits for the first of its test images."
)
OUTPUT_HELP = "The file to write: *.png, *.pdf or *.svg."
ATTENTION_HELP = "Overlay class attention as a heat map, on the tokens that entered each stage."
COMPARE_HELP = (
    "Instead of --method: methods in rows, joined by commas, or all. Settings stand behind colons, as in "
    "bat,bat:preset=paper."
)


@with_groups
def visualize(
    model: ModelArgument,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help=IMAGES_HELP)],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help=OUTPUT_HELP)],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    attention: Annotated[bool, typer.Option("--attention", help=ATTENTION_HELP)] = False,
    compare: Annotated[str | None, reduction_option("--compare", metavar="NAME,...", help=COMPARE_HELP)] = None,
    reduction: ReductionOptions,
    source: ModelOptions,
    frame_stride: FrameStride = None,
    run: RunOptions,
    as_json: JsonFlag = False,
) -> None:
    """Draws what a model still sees: each image, then its tokens after each stage.

    Merged patches are outlined regions in their mean colour, tokens of one patch
    stay as they are, dropped patches are dark; a legend tells. Photos keep their
    own resolution and are turned upright; a video is a strip of frames, one of
    each tubelet. Needs matplotlib.

    Examples:
      tokencut visualize out.safetensors photo.jpg -o photo-tokens.png
      tokencut visualize deit_small photo.jpg --keep 0.5 --attention -o a.png
      tokencut visualize digits digits --compare bat,evit,tome -o digits.pdf
    """
    from tokencut.visualization.drawing import check_output

    extras.require("pictures need", "matplotlib", extra="plot")
    check_output(output, force=force)
    from tokencut.data.image_files import check_photos, find_photos
    from tokencut.runtime.devices import resolve_device
    from tokencut.visualization.drawing import draw

    _refuse_overwriting_input(output, images)
    device = resolve_device(run.device)
    variants = None if compare is None else _variants(compare, reduction)
    photos = find_photos(images)
    check_photos(photos)
    name, models = _models(model, source, reduction, run, variants)
    with watched(f"drawing what {name} makes of {len(photos)} images"):
        picture = draw(
            models, photos, attention=attention, batch_size=run.batch_size, device=device, precision=run.precision,
            frame_stride=frame_stride or 4,
        )  # fmt: skip
    picture.save(output, force=force)
    if as_json:
        render.write_json(_json(str(output), name, models, picture))
        return
    render.show(render.facts(_facts(str(output), name, models, picture)))
    if not any(view.stages for view in picture.views):
        render.note("nothing is reduced, so there are only the images; type a lower rate, such as --keep 0.5")


def _refuse_overwriting_input(output: Path, images: list[str]) -> None:
    """Refuses to replace an image by its own picture, as `*.png` beside `--force` would."""
    replaced = output.resolve() if output.exists() else None
    same = next((image for image in images if user_path(image).resolve() == replaced), None)
    if same:
        raise UsageError(f"{output} is one of the images; give another -o, or leave that image out")


def _variants(compare: str, reduction: ReductionOptions) -> dict[str, ReductionOptions]:
    """The reductions to compare, by the names that their rows get."""
    from tokencut.sweeping.rows import read_variants

    given = [option for option in reduction.given() if option in ("--method", "--method-option")]
    if given:
        raise UsageError(f"--compare {compare} names the methods, beside which {' and '.join(given)} cannot stand; put "
                         "settings behind colons, as in --compare bat,bat:preset=paper")  # fmt: skip
    found = read_variants(compare.split(","), parameter="compare")
    return {
        one.label: replace(reduction, method=one.method, method_option=[f"{k}={v}" for k, v in one.options.items()])
        for one in found
    }


def _models(
    spec: str,
    source: ModelOptions,
    reduction: ReductionOptions,
    run: RunOptions,
    variants: dict[str, ReductionOptions] | None,
) -> tuple[str, dict[str, CompressedModel]]:
    """The model's name, and what is drawn of it by row name; one without a name where nothing is compared."""
    from tokencut.cli.subject import prepare, warn_recipe_ignored
    from tokencut.model import CompressedModel, compress

    if variants is None:
        subject = prepare(spec, source, reduction, seed=run.seed)
        assert isinstance(subject.model, CompressedModel)
        return subject.name, {"": subject.model}
    arguments = {label: options.arguments() for label, options in variants.items()}
    warn_recipe_ignored(spec, taken_by="--compare", instead="leave --compare out, or name the original model")
    subject = prepare(spec, source, ReductionOptions(), seed=run.seed, dense=True)
    made = {label: compress(subject.dense, **values) for label, values in arguments.items()}
    # One set of weights for all, as in a sweep.
    return subject.name, {label: CompressedModel(subject.dense, one.recipe).eval() for label, one in made.items()}


def _json(output: str, name: str, models: dict[str, CompressedModel], picture: Picture) -> dict[str, Any]:
    height, width = picture.pixels.shape[:2]
    rows = [
        {
            **_recipe(models[view.model], view),
            "predicted": None if view.predicted is None else vars(view.predicted),
            "stages": [vars(stage) for stage in view.stages],
        }
        for view in picture.views
    ]
    return {"output": output, "model": name, "width": width, "height": height, "rows": rows}


def _recipe(model: CompressedModel, view: View) -> dict[str, Any]:
    recipe = model.recipe
    return {"image": view.image, "method": view.model or recipe.method, "keep": recipe.keep, "layers": recipe.layers}


def _facts(output: str, name: str, models: dict[str, CompressedModel], picture: Picture) -> list[tuple[str, str]]:
    from tokencut.cli.subject import describe

    height, width = picture.pixels.shape[:2]
    rows = [("wrote", f"{output} ({width} x {height} px)"), ("model", name)]
    rows += [(f"row {label}" if label else "reduction", describe(model.recipe)) for label, model in models.items()]
    first = picture.views[0].stages
    if len(models) == 1 and first:
        where = (f"block {stage.block}" if stage.block else "static" for stage in first)
        counts = (f"{stage.tokens_in} -> {stage.tokens_out} ({at})" for stage, at in zip(first, where, strict=True))
        rows.append(("tokens", ", ".join(counts)))
    for view in picture.views:
        if view.predicted is not None:
            named = " ".join(text for text in (view.image, view.model) if text)
            rows.append(("taken for", f"{view.predicted.label} ({100 * view.predicted.probability:.1f} %): {named}"))
    legend = [("how to read it", "; ".join(picture.legend))] if picture.legend else []
    return [*rows, ("images", str(len(picture.views) // len(models))), *legend]
