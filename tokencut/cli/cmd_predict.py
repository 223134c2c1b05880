"""`tokencut predict`: what a model takes photos for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokencut.cli import render
from tokencut.cli.observer import watched
from tokencut.cli.options import (
    ClassMapFile,
    CompileOptions,
    DenseFlag,
    Frames,
    FrameStride,
    JsonFlag,
    ModelArgument,
    ModelOptions,
    ReductionOptions,
    RunOptions,
    Views,
    Workers,
    bounded,
    with_groups,
)

if TYPE_CHECKING:
    from tokencut.evaluation.prediction import PredictionReport

IMAGES_HELP = "Image files, videos for a model of clips, folders of them, or digits for the first of its test images."


@with_groups
def predict(
    model: ModelArgument,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help=IMAGES_HELP)],
    *,
    top: Annotated[int, typer.Option("--top", **bounded("top"), help="How many classes to tell of each image.")] = 5,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.csv", help="Write a table: one row an image.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.csv if it exists.")] = False,
    reduction: ReductionOptions,
    dense: DenseFlag = False,
    source: ModelOptions,
    workers: Workers = None,
    class_map: ClassMapFile = None,
    frame_stride: FrameStride = None,
    frames: Frames = None,
    views: Views = None,
    run: RunOptions,
    compiling: CompileOptions,
    as_json: JsonFlag = False,
) -> None:
    """Tells what a model takes photos for: the most likely classes of each.

    Photos are turned upright, as their EXIF says. Of a folder all images in it
    are meant, at any depth. A model that is not a tokencut file is compressed
    on the fly; --dense leaves it as it is.

    Examples:
      tokencut predict out.safetensors photo.jpg
      tokencut predict deit_small photos/ --keep 0.5 --top 1 -o predictions.csv
      tokencut predict digits digits
      tokencut predict model.onnx photo.jpg --json
    """
    from tokencut.cli.exported_subject import device_of, open_subject
    from tokencut.cli.subject import prepare, run_facts
    from tokencut.data.image_files import PhotoSource
    from tokencut.evaluation.prediction import predict as predict_images
    from tokencut.evaluation.tables import check_csv

    if output is not None:
        check_csv(output, force=force, parameter="path")
    exported = open_subject(model, source, reduction, run, compiling, dense=dense)
    device = device_of(exported, run.device)
    photos = PhotoSource(images)
    photos.sample(frame_stride, views)
    subject = (exported or prepare(model, source, reduction, seed=run.seed, dense=dense)).over_frames(frames)
    with watched(f"predicting by {subject.name}") as observer:
        report = predict_images(
            subject.model, photos, top=top, batch_size=run.batch_size, workers=workers, device=device,
            precision=run.precision, compile_mode=compiling.mode, capture=compiling.capture, class_map=class_map,
            name=subject.name, observer=observer,
        )  # fmt: skip
    for text in report.notes:
        render.note(text)
    if output is not None:
        report.save(output, force=force)
    if as_json:
        render.write_json({**report.to_dict(), **run_facts(subject, device, run.precision)})
        return
    if output is None:
        _show(report)
        return
    render.note(f"wrote {output}: {len(report.predictions)} image{'s' * (len(report.predictions) != 1)}")


def _show(report: PredictionReport) -> None:
    rows = [
        (prediction.image if first else "", guess.label, f"{100 * guess.probability:.2f} %")
        for prediction in report.predictions
        for first, guess in ((guess is prediction.top[0], guess) for guess in prediction.top)
    ]
    render.show(render.table(("image", "class", "probability"), rows, left=2))
