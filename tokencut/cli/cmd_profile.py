"""`tokencut profile`: what a model costs, dense and compressed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokencut.cli import render
from tokencut.cli.observer import watched
from tokencut.cli.options import (
    DEFAULT_MODEL,
    ClassMapFile,
    CompileOptions,
    DenseFlag,
    Frames,
    ImageRoot,
    JsonFlag,
    ModelArgument,
    ModelOptions,
    ReductionOptions,
    TimingOptions,
    Workers,
    running_option,
    with_groups,
)
from tokencut.cli.search_options import TargetOptions, target_option
from tokencut.cli.wording import typed
from tokencut.errors import UsageError

if TYPE_CHECKING:
    from tokencut.cli.subject import Subject
    from tokencut.profiling.report import Figures, ProfileReport

DENSE_FILE_HELP = "The same model exported with --dense: timed in turns with MODEL, where that is exported."


@with_groups
def profile(
    model: ModelArgument = DEFAULT_MODEL,
    *,
    reduction: ReductionOptions,
    target: TargetOptions,
    force: Annotated[bool, target_option("--force", help="Replace the file of --front if it exists.")] = False,
    dense: DenseFlag = False,
    workers: Workers = None,
    class_map: ClassMapFile = None,
    image_root: ImageRoot = None,
    source: ModelOptions,
    run: TimingOptions,
    frames: Frames = None,
    compiling: CompileOptions,
    dense_file: Annotated[Path | None, running_option("--dense-file", metavar="FILE", help=DENSE_FILE_HELP)] = None,
    no_latency: Annotated[bool, typer.Option("--no-latency", help="Count only: nothing is timed.")] = False,
    by_block: Annotated[
        bool, typer.Option("--by-block", help="Count block by block; list what is not counted.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measures what a model costs: multiply-adds, parameters, latency, memory.

    The dense and the compressed model take turns in one process, so that the
    speed-up is true on this machine. Nothing is downloaded, since costs do not
    depend on weights; but where a target is given, the search needs them. An
    exported file, such as an .onnx, is timed in its own runtime.

    Examples:
      tokencut profile deit_small --keep 0.5
      tokencut profile out.safetensors --batch-size 1
      tokencut profile deit_tiny --no-latency --by-block
      tokencut profile deit_small --target-speedup 1.6 --calibration DIR
      tokencut profile model.onnx --dense-file dense.onnx
    """
    from tokencut.cli.exported_subject import is_exported, open_subject
    from tokencut.cli.subject import prepare
    from tokencut.runtime.devices import resolve_device

    search = None
    if not target.requested(reduction):
        told = {"--class-map": class_map, "--image-root": image_root, "--workers": workers}
        unused = [name for name, value in told.items() if value is not None]
        if unused:
            raise UsageError(f"{' and '.join(unused)} would say how calibration images are read, and none are; leave "
                             "that out, or add a target and --calibration DIR")  # fmt: skip
    else:
        if is_exported(model):
            raise UsageError(f"{model} is exported, and its schedule fixed; find one for the model it was made of, "
                             "such as tokencut profile deit_small --target-gmacs 2.6 --calibration DIR")  # fmt: skip
        from tokencut.cli.search_run import requested_search

        search = requested_search(target, run, front=target.front, force=force, workers=workers,
                                  form={"compile_mode": compiling.mode, "capture": compiling.capture},
                                  reading={"class_map": class_map, "image_root": image_root})  # fmt: skip
    exported = open_subject(model, source, reduction, run, compiling, dense=dense, by_block=by_block)
    if frames is not None and (exported is not None or search is not None):
        what = "a search" if exported is None else "an exported model"
        raise UsageError(f"--frames {frames} is for a model that is counted and timed here, and {what} sees images "
                         "alone; leave it out")  # fmt: skip
    if exported is not None:
        subject, report = exported, _measure_file(exported, run, dense_file, latency=not no_latency)
    elif dense_file is not None:
        raise UsageError(f"--dense-file is for a MODEL that is an exported file, and {model} is none; leave it out")
    else:
        resolve_device(run.device)
        subject = prepare(
            model, source, reduction, seed=run.seed, dense=dense, weights_needed=search is not None, search=search
        ).over_frames(frames)
        report = _measure(subject, run, compiling, latency=not no_latency)
    if as_json:
        found = {} if search is None else {"search": search.summary()}
        render.write_json({**report.to_dict(by_block=by_block), **found})
        return
    wished = [] if search is None else search.facts()
    render.show(render.facts([("model", report.model), ("reduction", subject.describe()), *wished, *_setting(report)]))
    render.show(_figures(report, subject.seen))
    if report.stages:
        rows = [(str(stage.block), str(stage.tokens_in), str(stage.tokens_out)) for stage in report.stages]
        render.show(render.table(("stage in block", "tokens in", "tokens out"), rows))
    if by_block:
        _show_blocks(report)
    conclusions = _conclusions(report)
    if conclusions:
        render.write("", *conclusions)


def _measure(subject: Subject, run: TimingOptions, compiling: CompileOptions, *, latency: bool) -> ProfileReport:
    from tokencut.profiling.measuring import profile as measure

    with watched(f"timing {subject.name}") as observer:
        return measure(
            subject.model,
            latency=latency,
            batch_size=run.batch_size,
            device=run.device,
            precision=run.precision,
            compile_mode=compiling.mode,
            capture=compiling.capture,
            name=subject.name,
            observer=observer,
        )


def _measure_file(subject: Subject, run: TimingOptions, dense: Path | None, *, latency: bool) -> ProfileReport:
    from tokencut.cli.exported_subject import open_file
    from tokencut.export.runtimes import ExportedModel
    from tokencut.export.timing import profile_exported

    assert isinstance(subject.model, ExportedModel)
    beside = None if dense is None else open_file(dense)
    with watched(f"timing {subject.name}") as observer:
        return profile_exported(
            subject.model,
            dense=beside,
            latency=latency,
            batch_size=run.batch_size,
            name=subject.name,
            observer=observer,
        )


def _setting(report: ProfileReport) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    form = f", compiled ({report.compile_mode})" if report.compile_mode else ""
    form = ", captured as CUDA graphs" if report.captured else form
    how = f"batches of {report.batch_size} in {report.precision}{form}"
    timed = [] if report.compressed.latency_ms is None else [("timed", how)]
    return [("device", report.device), *timed, ("versions", versions)]


def _figures(report: ProfileReport, seen: str) -> render.RenderableType:
    before, after = report.dense, report.compressed
    gmacs = before.gmacs, after.gmacs
    rows = [
        (f"GMACs per {seen}", *map(render.gmacs_text, gmacs), render.change_text(*gmacs)),
        ("parameters", f"{before.params:,}", f"{after.params:,}", render.change_text(before.params, after.params)),
    ]
    if after.latency_ms is not None:
        faster = "" if report.speedup is None else f"{report.speedup:.2f} x as fast"
        rows += [
            ("latency, ms a batch", _latency(before), _latency(after), faster),
            (f"{seen}s per second", _throughput(before), _throughput(after), _spread(report)),
        ]
    if before.peak_memory_mib and after.peak_memory_mib:
        memory = before.peak_memory_mib, after.peak_memory_mib
        rows.append(("peak memory, MiB", *(f"{mib:.1f}" for mib in memory), render.change_text(*memory)))
    if report.method is None:
        return render.table(("", "dense"), [row[:2] for row in rows])
    return render.table(("", "dense", "compressed", "change"), rows)


def _latency(figures: Figures) -> str:
    """The median with half of the distance between the quartiles; nothing where it was not timed."""
    if figures.latency_ms is None:
        return ""
    low, high = figures.latency_spread_ms or (0.0, 0.0)
    return f"{figures.latency_ms:.2f} ± {(high - low) / 2:.2f}"


def _throughput(figures: Figures) -> str:
    return "" if figures.images_per_second is None else f"{figures.images_per_second:.1f}"


def _spread(report: ProfileReport) -> str:
    return "" if report.speedup_spread is None else "({:.2f} to {:.2f})".format(*report.speedup_spread)


def _show_blocks(report: ProfileReport) -> None:
    rows = [
        (
            str(row["block"]),
            str(row["tokens_in"]),
            str(row["tokens_out"]),
            f"{row['macs'] / 1e9:.4f}",
            f"{row['stage_macs'] / 1e9:.4f}",
        )
        for row in report.to_dict(by_block=True)["blocks"]
    ]
    render.show(render.table(("block", "tokens in", "tokens out", "GMACs", "of which stage"), rows))
    for group, operators in report.not_counted.items():
        render.write(f"not counted, by convention: {group} ({', '.join(operators)})")


def _conclusions(report: ProfileReport) -> list[str]:
    share = [] if not report.stage_share else [f"{100 * report.stage_share:.1f} % of the time is spent in the stages"]
    return [*share, *map(typed, report.notes)]
