"""`tokencut eval`: how often a model is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tokencut.cli import render
from tokencut.cli.observer import opened
from tokencut.cli.options import (
    DEFAULT_MODEL,
    CompileOptions,
    DataOptions,
    DenseFlag,
    Frames,
    JsonFlag,
    ModelArgument,
    ModelOptions,
    ReductionOptions,
    RunOptions,
    data_option,
    with_groups,
)
from tokencut.errors import UsageError

if TYPE_CHECKING:
    from tokencut.cli.subject import Subject
    from tokencut.evaluation.accuracy import EvaluationReport


@with_groups
def evaluate(
    model: ModelArgument = DEFAULT_MODEL,
    *,
    data: DataOptions,
    predictions: Annotated[
        Path | None,
        data_option("--predictions", metavar="FILE.csv", help="Write path, label and top-5 of each image."),
    ] = None,
    force: Annotated[bool, data_option("--force", help="Replace FILE.csv if it exists.")] = False,
    reduction: ReductionOptions,
    dense: DenseFlag = False,
    source: ModelOptions,
    run: RunOptions,
    frames: Frames = None,
    compiling: CompileOptions,
    as_json: JsonFlag = False,
) -> None:
    """Measures a model's accuracy: top-1, top-5 and loss on a folder of images.

    A model of clips is judged on a folder of videos, one sub-folder a class.

    A model that is not a tokencut file is compressed on the fly; --dense leaves
    it as it is. An exported file, such as an .onnx, is run by its own runtime.

    Examples:
      tokencut eval out.safetensors --data /imagenet/val
      tokencut eval deit_small --keep 0.5 --data /imagenet/val --limit 5000
      tokencut eval digits --dense --data digits
      tokencut eval model.onnx --data /imagenet/val
      tokencut eval ./videomae --data /kinetics/val --frame-stride 4 --views 5
    """
    if data.data is None:
        raise UsageError(
            f"eval needs images; type tokencut eval {model} --data DIR, a folder with one sub-folder a class or a .tar "
            "of one, or try it with tokencut eval digits --data digits"
        )
    from tokencut.cli.exported_subject import device_of, open_subject
    from tokencut.cli.subject import measure_accuracy, prepare, run_facts
    from tokencut.evaluation.tables import check_csv

    if predictions is not None:
        check_csv(predictions, force=force)
    exported = open_subject(model, source, reduction, run, compiling, dense=dense)
    device = device_of(exported, run.device)
    images = opened(data.data, **data.reading())
    subject = (exported or prepare(model, source, reduction, seed=run.seed, dense=dense)).over_frames(frames)
    report = measure_accuracy(
        subject.model, subject.name, images, data, run, device, predictions=predictions, force=force,
        compile_mode=compiling.mode, capture=compiling.capture,
    )  # fmt: skip
    for text in report.notes:
        render.note(text)
    if compiling.mode is not None:
        render.note("the time includes compiling the model")
    if as_json:
        render.write_json({**report.to_dict(), **run_facts(subject, device, run.precision)})
        return
    render.show(render.facts(_facts(report, subject)))
    if predictions is not None:
        render.note(f"wrote {predictions}")


def _facts(report: EvaluationReport, subject: Subject) -> list[tuple[str, str]]:
    return [
        ("model", report.model),
        ("reduction", subject.describe()),
        ("data", report.data),
        (
            f"{subject.seen}s",
            f"{report.images:,}" + (f" ({len(report.unreadable)} unreadable)" if report.unreadable else ""),
        ),
        ("top-1", f"{report.top1:.2f} %"),
        ("top-5", f"{report.top5:.2f} %"),
        ("loss", f"{report.loss:.4f}"),
        (f"GMACs per {subject.seen}", "" if report.gmacs is None else render.gmacs_text(report.gmacs)),
        ("time", f"{report.seconds:.1f} s, {report.images_per_second:.1f} {subject.seen}s/s"),
    ]
