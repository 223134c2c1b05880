"""`tokencut sweep`: several methods and keep rates on the same images, as a table and as plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokencut.cli import render
from tokencut.cli.observer import opened, watched
from tokencut.cli.options import (
    DataOptions,
    JsonFlag,
    ModelArgument,
    ModelOptions,
    ReductionOptions,
    RunOptions,
    SweepOptions,
    with_groups,
)
from tokencut.cli.wording import typed
from tokencut.errors import UsageError
from tokencut.runtime import extras

if TYPE_CHECKING:
    from tokencut.sweeping.report import SweepReport


@with_groups
def sweep(
    model: ModelArgument,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder for the report.")],
    force: Annotated[bool, typer.Option("--force", help="Start again: drop the rows that are in the folder.")] = False,
    reduction: SweepOptions,
    no_latency: Annotated[bool, typer.Option("--no-latency", help="Judge and count only: nothing is timed.")] = False,
    source: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    as_json: JsonFlag = False,
) -> None:
    """Compares methods and keep rates on the same images: a table and plots.

    Each pair of a method and a keep rate is judged once, beside the dense model.
    Finished rows are kept in the folder: the same command goes on where it was
    interrupted. The folder's index.html shows all of it in a browser: table,
    plots, and what each method leaves of three images. Needs matplotlib.

    Examples:
      tokencut sweep deit_small --keep 0.9,0.7,0.5 --methods bat,evit,tome \\
          --data /imagenet/val -o report/
      tokencut sweep digits --methods all --data digits -o report/
      tokencut sweep digits --methods bat,bat:preset=paper \\
          --data digits -o report/
    """
    if data.data is None:
        raise UsageError(
            f"sweep needs images; type tokencut sweep {model} -o {output} --data DIR, a folder with one sub-folder a "
            "class or a .tar of one, or try it with tokencut sweep digits -o report --data digits"
        )
    extras.require("the plots need", "matplotlib", extra="plot")
    from tokencut.cli.subject import prepare, warn_recipe_ignored
    from tokencut.data.sources import check_apart
    from tokencut.runtime.devices import resolve_device
    from tokencut.sweeping.report import PAGE
    from tokencut.sweeping.run import SweepPlan
    from tokencut.sweeping.run import sweep as run_sweep
    from tokencut.sweeping.state import FILE as STATE
    from tokencut.sweeping.writing import check_folder

    plan = SweepPlan(
        **reduction.arguments(),
        limit=data.limit,
        workers=data.workers,
        batch_size=run.batch_size,
        device=resolve_device(run.device),
        precision=run.precision,
        latency=not no_latency,
    )
    plan.pairs()
    check_folder(output, force=force)
    images = opened(data.data, **data.reading())
    check_apart(output, images)
    instead = f"type tokencut eval {model} --data DIR, or sweep the original model"
    warn_recipe_ignored(model, taken_by="a sweep", instead=instead)
    subject = prepare(model, source, ReductionOptions(), seed=run.seed, dense=True)
    try:
        with watched(f"sweep of {subject.name}") as observer:
            report = run_sweep(
                subject.model,
                images,
                output,
                plan,
                force=force,
                name=subject.name,
                observer=observer,
                wording=typed,
            )
    except KeyboardInterrupt:
        if (output / STATE).exists():
            render.note(f"finished rows are kept in {output}: type the same command again to go on")
        raise
    for text in report.notes:
        render.note(text)
    if as_json:
        render.write_json(report.to_dict())
        return
    _show(report)
    render.note(f"wrote to {output}: {', '.join(report.files)}; open {output / PAGE} in a browser")


def _show(report: SweepReport) -> None:
    from tokencut.sweeping.report import LEGEND, comparison_table, result_table

    head, body = result_table(report)
    facts = [("model", report.model), ("data", report.data), ("images", f"{report.images:,}")]
    setting = f"batches of {report.batch_size} in {report.precision}, all models in turn" if report.timed else ""
    render.show(render.facts([*facts, ("device", report.device), *([("images/s", setting)] if setting else [])]))
    render.show(render.table(head, body, left=2))
    if report.comparisons:
        first = report.comparisons[0].first
        render.write("")
        render.show(render.table(*comparison_table(report.comparisons), title=f"{first} against the others"))
    render.write("", LEGEND)
