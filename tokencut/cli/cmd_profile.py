"""`tokencut profile`: what a model costs, dense and compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tokencut.cli import render
from tokencut.cli.options import (
    DEFAULT_MODEL,
    DenseFlag,
    JsonFlag,
    ModelArgument,
    ModelOptions,
    ReductionOptions,
    TimingOptions,
    with_groups,
)

if TYPE_CHECKING:
    from tokencut.profiling import Figures, ProfileReport


@with_groups
def profile(
    model: ModelArgument = DEFAULT_MODEL,
    *,
    reduction: ReductionOptions,
    dense: DenseFlag = False,
    source: ModelOptions,
    run: TimingOptions,
    no_latency: Annotated[bool, typer.Option("--no-latency", help="Count only: nothing is timed.")] = False,
    by_block: Annotated[
        bool, typer.Option("--by-block", help="Count block by block; list what is not counted.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measures what a model costs: multiply-adds, parameters, latency.

    The dense and the compressed model take turns in one process, so that the
    speed-up is true on this machine. Nothing is downloaded: costs do not
    depend on weights.

    Examples:
      tokencut profile deit_small --keep 0.5
      tokencut profile out.safetensors --batch-size 1
      tokencut profile deit_tiny --no-latency --by-block
    """
    from tokencut.cli.subject import prepare
    from tokencut.profiling import profile as measure
    from tokencut.runtime import resolve_device

    device = resolve_device(run.device)
    subject = prepare(model, source, reduction, seed=run.seed, dense=dense, weights_needed=False)
    with render.progress(f"timing {subject.name}") as advance:
        report = measure(
            subject.model,
            latency=not no_latency,
            batch_size=run.batch_size,
            device=device,
            precision=run.precision,
            name=subject.name,
            on_progress=lambda done, total: advance(done, total, "rounds"),
        )
    if as_json:
        render.write_json(report.to_dict(by_block=by_block))
        return
    render.show(render.facts([("model", report.model), ("reduction", subject.describe()), *_setting(report)]))
    render.show(_figures(report))
    if report.stages:
        rows = [(str(stage.block), str(stage.tokens_in), str(stage.tokens_out)) for stage in report.stages]
        render.show(render.table(("stage in block", "tokens in", "tokens out"), rows))
    if by_block:
        _show_blocks(report)
    conclusions = _conclusions(report)
    if conclusions:
        render.write("\n".join(["", *conclusions]))


def _setting(report: ProfileReport) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    timed = [] if report.speedup is None else [("timed", f"batches of {report.batch_size} in {report.precision}")]
    return [("device", report.device), *timed, ("versions", versions)]


def _figures(report: ProfileReport) -> render.RenderableType:
    before, after = report.dense, report.compressed
    gmacs = before.gmacs, after.gmacs
    rows = [
        ("GMACs per image", *map(render.gmacs_text, gmacs), render.change_text(*gmacs)),
        ("parameters", f"{before.params:,}", f"{after.params:,}", render.change_text(before.params, after.params)),
    ]
    if report.speedup is not None:
        rows += [
            ("latency, ms a batch", _latency(before), _latency(after), f"{report.speedup:.2f} x as fast"),
            ("images per second", f"{before.images_per_second:.1f}", f"{after.images_per_second:.1f}", _spread(report)),
        ]
    if before.peak_memory_mib and after.peak_memory_mib:
        memory = before.peak_memory_mib, after.peak_memory_mib
        rows.append(("peak memory, MiB", *(f"{mib:.0f}" for mib in memory), render.change_text(*memory)))
    if report.method is None:
        return render.table(("", "dense"), [row[:2] for row in rows])
    return render.table(("", "dense", "compressed", "change"), rows)


def _latency(figures: Figures) -> str:
    """The median with half of the distance between the quartiles."""
    low, high = figures.latency_spread_ms or (0.0, 0.0)
    return f"{figures.latency_ms:.2f} ± {(high - low) / 2:.2f}"


def _spread(report: ProfileReport) -> str:
    low, high = report.speedup_spread or (0.0, 0.0)
    return f"({low:.2f} to {high:.2f})"


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
    return [*share, *report.notes]
