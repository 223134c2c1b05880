"""An evaluation spread over the processes of a `torchrun`: every image is judged once, by one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from tokencut.data.image_set import check_unreadable, sample_note
from tokencut.data.sampling import strided_subset
from tokencut.data.sources import Source, Subset
from tokencut.errors import DataError, TokencutError
from tokencut.evaluation.accuracy import EvaluationReport, evaluate
from tokencut.runtime.distributed import Group


def evaluate_spread(
    group: Group, model: nn.Module, source: Source, *, limit: int | None = None, **options: Any
) -> EvaluationReport:
    """Evaluates a model as `evaluate` does, with the images dealt out to the processes of a group.

    Args:
        group: The processes; each calls this and gets the same report.
        model: The same model in each.
        source: The same images in each.
        limit: Judge an evenly spread sample of so many images.
        options: As `evaluate` takes them; `predictions` only for a group of one.

    Raises:
        TokencutError: What any of the processes met.
    """
    if group.size == 1:
        return evaluate(model, source, limit=limit, device=group.device, **options)
    indices = strided_subset(len(source), limit)
    if len(indices) < group.size:
        raise DataError(f"{len(indices)} images in {source.name!r} are too few for {group.size} processes; give more, "
                        "or run it without torchrun")  # fmt: skip
    options.pop("predictions", None)
    mine: EvaluationReport | TokencutError
    try:
        part = Subset(source, indices[group.rank :: group.size])
        found = evaluate(model, part, of=len(indices), device=group.device, **options)
        mine = dataclasses.replace(found, numbers=tuple(part.indices[number] for number in found.numbers))
    except TokencutError as error:  # the others are waiting for a report
        mine = error
    reports = group.all_gather(mine)
    for other in reports:
        if isinstance(other, TokencutError):
            raise other
    report = _merged(reports)
    if len(indices) < len(source):
        sample = sample_note(len(indices), len(source), source.holds)
        report = dataclasses.replace(report, notes=(*report.notes, sample))
    check_unreadable(source.name, report.unreadable, len(indices), repr, source.holds)
    return report


def _merged(reports: Sequence[EvaluationReport]) -> EvaluationReport:
    """One report of several over different images."""
    images = sum(report.images for report in reports)

    def mean(name: str) -> float:
        return float(sum(getattr(report, name) * report.images for report in reports) / images)

    def percent(name: str) -> float:
        # Counts are whole: what rounding did to a percentage does not add up.
        return 100 * sum(round(getattr(report, name) * report.images / 100) for report in reports) / images

    judged = sorted(
        of_image
        for report in reports
        for of_image in zip(report.numbers, report.correct, report.predicted, strict=True)
    )
    seconds = max(report.seconds for report in reports)
    return dataclasses.replace(
        reports[0],
        images=images,
        top1=percent("top1"),
        top5=percent("top5"),
        loss=mean("loss"),
        seconds=seconds,
        images_per_second=images / seconds,
        unreadable=tuple(name for report in reports for name in report.unreadable),
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
        correct=tuple(right for _, right, _ in judged),
        numbers=tuple(number for number, _, _ in judged),
        predicted=tuple(label for _, _, label in judged),
    )
