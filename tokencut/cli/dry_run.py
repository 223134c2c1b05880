"""What `compress --dry-run` tells: what a search and a fine-tune would come to here, and what would be written.

Imports torch: commands import this when they run, not before.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokencut.cli import render
from tokencut.cli.finetune_run import FinetuneRun, curves_for
from tokencut.cli.finetune_view import duration, log_for
from tokencut.cli.search_run import SearchRun
from tokencut.model import CompressedModel
from tokencut.training.run import plan_finetune
from tokencut.training.setup import FinetunePlan
from tokencut.training.state import folder_for


def tell_plan(work: FinetuneRun, search: SearchRun | None, *, as_json: bool) -> None:
    """Tries a few steps and tells what all of them would take; writes nothing.

    Args:
        work: The fine-tune, with its model; without training images there is none.
        search: The search, where a schedule is to be found.
        as_json: Whether to tell it as JSON.
    """
    model, plan = work.subject.model, None
    assert isinstance(model, CompressedModel)
    if work.train is not None:
        plan = plan_finetune(
            model, work.train, recipe=work.tuning.training_recipe(), setup=work.setup(), group=work.group
        )
    written = [str(path) for path in _written(work, search)]
    if as_json:
        told: dict[str, Any] = {"dry_run": True, "output": str(work.output), "model": work.subject.name}
        told |= {"writes": written, "search": None if search is None else search.planned}
        render.write_json({**told, "finetune": None if plan is None else asdict(plan)})
        return
    reduction = "found by the search" if search is not None else work.subject.describe()
    rows = [("would write", ", ".join(written)), ("model", work.subject.name), ("reduction", reduction)]
    rows += [] if search is None else _of_search(search.planned)
    rows += [] if plan is None else _of_finetune(plan, at_most=search is not None)
    render.show(render.facts(rows))
    render.note("nothing was written; type the same command without --dry-run")


def _written(work: FinetuneRun, search: SearchRun | None) -> list[Path]:
    """The files and folders, that of the state last: it is there only while the run is."""
    found = [work.output]
    if search is not None and search.front is not None:
        found.append(search.front)
    if work.train is not None:
        found.append(log_for(work.output))
        if work.tuning.tensorboard is not None:
            found.append(curves_for(work.tuning.tensorboard, work.output))
        found.append(folder_for(work.output))
    return found


def _of_search(planned: dict[str, float]) -> list[tuple[str, str]]:
    images, effort = f"{planned['images']:,.0f} images", f"{planned['effort']:g} dense forwards of each"
    took = f"{_macs(planned['gmacs'])}, about {duration(planned['seconds'])} by a forward timed here"
    return [("search", f"{images}, up to {effort}: {took}")]


def _of_finetune(plan: FinetunePlan, *, at_most: bool) -> list[tuple[str, str]]:
    held = f", {plan.held_out:,} more held out" if plan.held_out else ""
    most = "at most " if at_most else ""  # the search will find a cheaper schedule than none
    return [
        ("fine-tune", f"{plan.epochs:,} epoch{'s' * (plan.epochs != 1)}, {plan.updates:,} updates, on {plan.images:,} "
                      f"images{held}"),
        ("cost", f"{most}{_macs(plan.gmacs)}, with the backward passes and the teacher's"),
        ("time", f"{most}about {duration(plan.seconds)} by steps timed here, evaluations aside"),
    ]  # fmt: skip


def _macs(gmacs: float) -> str:
    for unit, size in (("P", 1e6), ("T", 1e3)):
        if gmacs >= size:
            return f"{gmacs / size:.3g} {unit}MACs"
    return f"{gmacs:.3g} GMACs"
