"""`tokencut export`: writes a model for deployment, for one of several runtimes, and checks what was written."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokencut.cli import render
from tokencut.cli.observer import opened, watched
from tokencut.cli.options import (
    DATA_HELP,
    DenseFlag,
    ImageRoot,
    JsonFlag,
    ModelArgument,
    ModelOptions,
    ReductionOptions,
    bounded,
    data_option,
    running_option,
    with_groups,
)

if TYPE_CHECKING:
    from tokencut.cli.subject import Subject
    from tokencut.export.quantizing import QuantizedReport
    from tokencut.export.run import ExportReport

OUTPUT_HELP = "The file to write: *.onnx, *.xml (OpenVINO), *.pt2 (torch), *.aoti.pt2 (compiled); or a folder for timm."
FORMAT_HELP = "timm for a folder as timm's hub has them; otherwise the file's name says it."
OPSET_HELP = "ONNX opset, 18 to 22."
DYNAMIC_HELP = "Whether the file takes any number of images, or only --batch-size of them."
NORMALISE_HELP = "Bake the normalisation in: the file then takes RGB from 0 to 1."
CHECK_LIMIT_HELP = "Check on an evenly spread sample of N images."
QUANTIZE_HELP = "The weights of the blocks, and what they meet, in eight bits; the rest stays in fp32."
CALIBRATION_HELP = "Training images to take the ranges of numbers from. Without, they are taken anew in each forward."
CALIBRATION_LIMIT_HELP = "Take an evenly spread sample of N of them."
ALLOW_HELP = "So many points of top-1 it may cost on --data, else on --calibration; otherwise no file is written."

quantize_option = functools.partial(typer.Option, rich_help_panel="Eight bits")


@with_groups
def export_file(
    model: ModelArgument,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help=OUTPUT_HELP)],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    format_: Annotated[str | None, typer.Option("--format", metavar="NAME", help=FORMAT_HELP)] = None,
    opset: Annotated[int | None, typer.Option("--opset", **bounded("opset"), help=OPSET_HELP)] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch/--no-dynamic-batch", help=DYNAMIC_HELP)] = True,
    with_preprocessing: Annotated[bool, typer.Option("--with-preprocessing", help=NORMALISE_HELP)] = False,
    reduction: ReductionOptions,
    dense: DenseFlag = False,
    source: ModelOptions,
    data: Annotated[str | None, data_option("--data", metavar="DIR", help=f"Check on these: {DATA_HELP}")] = None,
    limit: Annotated[int | None, data_option("--limit", **bounded("limit"), help=CHECK_LIMIT_HELP)] = None,
    image_root: ImageRoot = None,
    batch_size: Annotated[
        int, running_option("-b", "--batch-size", **bounded("batch_size"), help="Images a forward.")
    ] = 16,
    seed: Annotated[int, running_option("--seed", **bounded("seed"), help="Decides random weights.")] = 0,
    quantize: Annotated[str | None, quantize_option("--quantize", metavar="int8", help=QUANTIZE_HELP)] = None,
    calibration: Annotated[str | None, quantize_option("--calibration", metavar="DIR", help=CALIBRATION_HELP)] = None,
    calibration_limit: Annotated[
        int | None, quantize_option("--calibration-limit", **bounded("images"), help=CALIBRATION_LIMIT_HELP)
    ] = None,
    allow_drop: Annotated[
        float | None, quantize_option("--allow-drop", **bounded("allow_drop", "P"), help=ALLOW_HELP)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Writes a model for deployment: for a runtime, as its name ends, or timm's.

    What was written is run on images and compared with the model; a file that
    gives other logits is not kept. Runtimes come with extras, which an error
    names; .onnx, for one, needs pip install 'tokencut[onnx]'.

    Examples:
      tokencut export out.safetensors -o model.onnx
      tokencut export out.safetensors -o model.onnx --with-preprocessing \\
          --data /imagenet/val
      tokencut export digits --keep 0.5 -o digits.pt2
      tokencut export out.safetensors -o model.xml
      tokencut export out.safetensors -o folder/ --format timm
      tokencut export out.safetensors -o int8.onnx --quantize int8 \\
          --calibration /imagenet/train --data /imagenet/val
    """
    from tokencut.export.run import check_export, export_model

    chosen: dict[str, Any] = {
        "force": force, "opset": opset, "dynamic_batch": dynamic_batch, "with_preprocessing": with_preprocessing,
        "quantize": quantize, "calibration_limit": calibration_limit, "allow_drop": allow_drop,
    }  # fmt: skip
    calibrating = None if calibration is None else opened(calibration, split="train", image_root=image_root)
    _, kind, _ = check_export(output, format=format_, calibration=calibrating, **chosen)
    from tokencut.cli.subject import prepare

    images = None if data is None else opened(data, image_root=image_root)
    subject = prepare(model, source, reduction, seed=seed, dense=dense)
    with watched(f"exporting {subject.name}") as observer:
        report = export_model(
            subject.model,
            output,
            batch_size=batch_size,
            calibration=calibrating,
            data=images,
            limit=limit,
            name=_plain_name(subject),
            observer=observer,
            format=kind,
            measured=_measured(model, subject) if kind == "timm" else None,
            **chosen,
        )
    for text in report.notes:
        render.note(text)
    if as_json:
        render.write_json(report.to_dict())
        return
    render.show(render.facts(_facts(report, subject)))
    from tokencut.export.runtimes import runtimes

    if report.format == "timm":
        render.note(f'next: tokencut eval {output} --data DIR, or timm.create_model("local-dir:{output}", '
                    "pretrained=True)")  # fmt: skip
    elif runtimes()[report.format].runs_here:
        render.note(f"next: tokencut profile {output}, or tokencut eval {output} --data DIR")


def _plain_name(subject: Subject) -> str | None:
    """What the file calls its model: the name typed, unless that is a path, which must not go into files."""
    return None if Path(subject.name).exists() or ":" in subject.name else subject.name


def _measured(spec: str, subject: Subject) -> dict[str, float]:
    """What a tokencut file says was measured of the model, where it is exported as it is."""
    from tokencut.models.artifact import read_info
    from tokencut.models.loading import artifact_of

    file = artifact_of(spec)
    if file is None or (info := read_info(file)).recipe != subject.recipe:
        return {}
    return dict(info.measured)


def _facts(report: ExportReport, subject: Subject) -> list[tuple[str, str]]:
    from tokencut.export.run import TIMM
    from tokencut.export.runtimes import runtimes

    info, agreement = report.info, report.agreement
    size = "x".join(map(str, info.input_shape))
    taken = "images" if info.frames is None else "clips"
    pixels = "RGB from 0 to 1" if info.normalises else "normalised"
    form = "timm's folder" if report.format == TIMM else runtimes()[report.format].form(report.opset)
    rows = [
        ("wrote", f"{report.output} ({report.bytes / 1e6:.1f} MB, {form})"),
        ("model", subject.name),
        ("reduction", subject.describe()),
        (f"GMACs per {subject.seen}", render.gmacs_text(info.gmacs)),
        ("takes", f"{taken} of {size}, {pixels}, {info.batch_size or 'any number'} at a time"),
        ("checked on", f"{agreement.images} images ({agreement.data})"),
        ("largest difference", f"{agreement.largest_difference:.1e} (allowed {agreement.tolerance:.1e})"),
    ]
    if agreement.equal_top1 is not None:
        rows.append(("equal top-1", f"{agreement.equal_top1:.1f} %"))
    return rows if report.quantized is None else rows + _quantized_facts(report.quantized, report.bytes)


def _quantized_facts(found: QuantizedReport, size: int) -> list[tuple[str, str]]:
    """What is told of a quantised file, beside the one in fp32 that the rows above it are about."""
    how = "ranges taken in each forward"
    if found.calibration is not None:
        how = f"ranges of {found.calibration_images} images ({found.calibration})"
    rows = [(found.kind, f"{how}; {found.fp32_bytes / 1e6:.1f} MB in fp32, {size / 1e6:.1f} MB now")]
    where = f"{found.images:,} images ({found.judged_on})"
    if found.top1 is not None:
        error = "unknown" if found.standard_error is None else f"{found.standard_error:.2f}"
        rows.append((f"top-1 in {found.kind}", f"{found.fp32_top1:.2f} % -> {found.top1:.2f} % "
                                               f"({found.difference:+.2f} ± {error} points) on {where}"))  # fmt: skip
    elif found.relative_difference is not None:
        rows.append((f"logits in {found.kind}", f"{100 * found.relative_difference:.1f} % off on {where}"))
    if found.agreement is not None:
        rows.append(("the same class", f"{found.agreement:.1f} % of them"))
    return rows
