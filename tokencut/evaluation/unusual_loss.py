"""Whether a compressed model loses more than is ordinary, so that nobody serves a schedule that does not fit theirs."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tokencut.evaluation.accuracy import EvaluationReport
from tokencut.evaluation.statistics import paired_difference
from tokencut.model import CompressedModel, compress

# Points of top-1; no model that we measured loses as much at the default keep rate.
ORDINARY_LOSS = 5.0
# What loses more than this method, which merges nothing and drops what class attention passes over, does not fit; of a
# hierarchical model, than plain averages.
PLAIN_METHOD, PLAIN_GRID = "topk", {"clustering": "pool"}

Judge = Callable[[nn.Module, str], EvaluationReport]


def unusual_loss(
    model: CompressedModel, dense: EvaluationReport, compressed: EvaluationReport, judge: Judge | None = None
) -> str | None:
    """What has to be said where more is lost than is ordinary: over `ORDINARY_LOSS` points, or more than by the
    simplest method, `topk`.

    Args:
        model: The compressed model.
        dense: How often the dense model is right.
        compressed: How often the compressed model is, on the same images.
        judge: Judges a model on the same images, by a name for it; asked once, for `topk` at the same schedule, where
            something is clearly lost. None where the model was fine-tuned, which `topk` was not.

    Returns:
        What is lost, in words; None where the loss is ordinary, or may be chance.
    """
    if not compressed.correct or len(dense.correct) != len(compressed.correct):
        return None
    lost = paired_difference(dense.correct, compressed.correct)
    if not (lost.is_clear and lost.points > 0):
        return None
    plain = None
    simpler = None if judge is None or model.method.needs_training else _plain(model)
    if judge is not None and simpler is not None:
        plain = judge(simpler, f"the same with {simpler.recipe.method}")
        more = paired_difference(plain.correct, compressed.correct)
        plain = plain if more.is_clear and more.points > 0 else None
    if plain is None and lost.points <= ORDINARY_LOSS:
        return None
    beside = ""
    if plain is not None:
        named = (
            "averages of cells lose" if model.adapter.hierarchical else f"{PLAIN_METHOD}, which merges nothing, loses"
        )
        beside = f", where {named} {dense.top1 - plain.top1:.2f}"
    return (
        f"the loss is out of the ordinary: {lost.points:.2f} ± {lost.standard_error:.2f} points of top-1 on "
        f"{compressed.images:,} images{beside}"
    )


def _plain(model: CompressedModel) -> CompressedModel | None:
    """The same by the simplest method; None where that is the model's own."""
    recipe, grid = model.recipe, model.adapter.hierarchical
    if recipe.method == PLAIN_METHOD or (grid and PLAIN_GRID.items() <= recipe.method_options.items()):
        return None
    schedule = recipe.schedule
    return compress(
        model.model, keep=schedule.keep, layers=schedule.layers, reduce_by=schedule.reduce_by,
        method="window" if grid else PLAIN_METHOD, method_options=PLAIN_GRID if grid else None,
    )  # fmt: skip
