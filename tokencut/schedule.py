"""How many tokens stay: every way of writing a schedule, resolved into one explicit list. No torch.

`keep` is the fraction of the image tokens entering a stage that leaves it, merged ones counted; prefix tokens never
count. Here is also the one clamp that splits a stage's budget, for every method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from tokencut.errors import UsageError
from tokencut.limits import check_number

Keep = float | Sequence[float]
Layers = Sequence[int] | Literal["all", "late", "gradual"]
# Tokens entering a stage and its budget, to the tokens that leave it (`Method.tokens_out`).
TokensOut = Callable[[int, int], int]

# The paper's blocks, 1-based, and the depth they were written for.
PAPER_LAYERS, PAPER_DEPTH = (4, 7, 10), 12
# Placements with a name, for the same depth: what each gains at equal multiply-adds stands in
# examples/benchmarks/defaults.md.
PLACEMENTS = {"late": (6, 8, 10), "gradual": (4, 5, 6, 7, 8, 9, 10)}
# With so many stages no rate goes without saying: 0.7 in each leaves next to nothing.
NEED_A_RATE = ("all", "gradual")


@dataclass(frozen=True)
class StagePlan:
    """One reducing block: its 1-based number, and the image tokens entering and leaving its stage."""

    block: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Schedule:
    """What a user wrote, checked: `keep` (one for all layers or one each) or `reduce_by`, and 1-based `layers`."""

    layers: tuple[int, ...]
    keep: float | tuple[float, ...] | None
    reduce_by: int | None

    def resolve(self, tokens: int, tokens_out: TokensOut | None = None) -> tuple[StagePlan, ...]:
        """The explicit list of stages for an input of `tokens` image tokens.

        Args:
            tokens: The image tokens entering the first block.
            tokens_out: The method's say in how many tokens leave a stage that removes any; as budgeted where None.

        Returns:
            A plan for each layer where something is removed; a layer that would remove nothing has no stage.
        """
        plans = []
        for position, block in enumerate(self.layers):
            if self.reduce_by is not None:
                budget = tokens - min(self.reduce_by, tokens // 2)
            else:
                keep = self.keep[position] if isinstance(self.keep, tuple) else self.keep
                budget = kept_tokens(keep or 1.0, tokens)
            if budget < tokens and tokens_out is not None:
                budget = min(tokens_out(tokens, budget), tokens)
            if budget < tokens:
                plans.append(StagePlan(block, tokens, budget))
            tokens = budget
        return tuple(plans)


def default_layers(depth: int) -> tuple[int, ...]:
    """The reducing blocks where nothing else is said: 4, 7 and 10 of 12, the same fractions for another depth.

    Args:
        depth: The number of blocks.

    Returns:
        1-based block numbers, ascending, no repeats.
    """
    return _scaled(PAPER_LAYERS, depth)


def named_layers(name: str, depth: int) -> tuple[int, ...]:
    """The reducing blocks of a placement that has a name.

    Args:
        name: `all`, or one of `PLACEMENTS`: `late` (6, 8, 10 of 12) or `gradual` (each from 4 to 10).
        depth: The number of blocks.

    Returns:
        1-based block numbers, ascending, no repeats.

    Raises:
        UsageError: There is no placement of that name.
    """
    if name == "all":
        return tuple(range(1, depth + 1))
    if name not in PLACEMENTS:
        raise UsageError(f"layers {name!r} is no placement; give a list of block numbers, such as [4, 7, 10], or "
                         f"'all', {' or '.join(map(repr, PLACEMENTS))}")  # fmt: skip
    return _scaled(PLACEMENTS[name], depth)


def _scaled(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """The same fractions of another depth."""
    scaled = (math.floor(Fraction(depth * layer, PAPER_DEPTH) + Fraction(1, 2)) for layer in layers)
    return tuple(sorted({max(1, layer) for layer in scaled}))


def kept_tokens(keep: float, tokens: int) -> int:
    """`ceil(keep * tokens)`, exact on the decimal typed: 0.07 of 100 is 7."""
    return math.ceil(Fraction(str(keep)) * tokens)


def make_schedule(depth: int, keep: Keep | None, layers: Layers | None, reduce_by: int | None) -> Schedule:
    """Checks a schedule against a model's depth.

    Args:
        depth: The number of blocks of the model.
        keep: Fraction of image tokens that leave a stage, in (0, 1]: one number, or one a layer. None with `reduce_by`.
        layers: 1-based block numbers, the name of a placement (`named_layers`), or None for the default (all blocks
            with `reduce_by`).
        reduce_by: Tokens fewer in each layer, capped at half of the tokens entering (arXiv 2210.09461), or None.

    Raises:
        UsageError: A value is out of range, a layer does not exist or stands twice, or the lengths differ.
    """
    if (keep is None) == (reduce_by is None):
        raise UsageError("give either a keep rate (`keep=0.7`) or `reduce_by`, not both and not neither")
    if layers is None and reduce_by is not None:
        layers = "all"
    if isinstance(layers, str):
        chosen = named_layers(layers, depth)
    else:
        chosen = default_layers(depth) if layers is None else _checked_layers(layers, depth)
    if reduce_by is not None:
        check_number("reduce_by", reduce_by)
        return Schedule(chosen, None, reduce_by)
    return Schedule(chosen, _checked_keep(keep, len(chosen)), None)


def _checked_layers(layers: Sequence[int | str], depth: int) -> tuple[int, ...]:
    if isinstance(layers, int):
        raise UsageError(f"layers {layers!r} is no list of block numbers; give one, such as [4, 7, 10], or 'all'")
    chosen = tuple(layer for layer in layers if isinstance(layer, int))
    for layer in layers:
        if not isinstance(layer, int):
            raise UsageError(
                f"layer {layer} does not exist: layers are block numbers from 1 on, such as `layers=[4, 7, 10]`"
            )
    if not chosen:
        raise UsageError("no layer given; name blocks from 1 on, such as `layers=[4, 7, 10]`")
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= depth:
            raise UsageError(f"layer {layer} does not exist: this model has blocks 1 to {depth}, such as "
                             f"`layers={list(default_layers(depth))}`")  # fmt: skip
    twice = sorted({layer for layer in chosen if chosen.count(layer) > 1})
    if twice:
        raise UsageError(f"layer {twice[0]} is given twice; name each block once, such as "
                         f"`layers={sorted(set(chosen))}`")  # fmt: skip
    if list(chosen) != sorted(chosen):
        raise UsageError(f"layers {','.join(map(str, chosen))} are not in ascending order; "
                         f"write `layers={sorted(chosen)}`")  # fmt: skip
    return chosen


def _checked_keep(keep: Keep | None, count: int) -> float | tuple[float, ...]:
    if isinstance(keep, (int, float)):
        _check_rate(keep)
        return float(keep)
    if isinstance(keep, str):
        raise UsageError(f"keep {keep!r} is a text; give a number, such as keep=0.7, or one a layer")
    rates = tuple(keep or ())
    for rate in rates:
        _check_rate(rate)
    if len(rates) != count:
        raise UsageError(f"{len(rates)} keep rates for {count} layers; give one number for all, or one per layer, "
                         f"such as `keep={[0.7] * count}`")  # fmt: skip
    return tuple(float(rate) for rate in rates)


def _check_rate(rate: float) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
        raise UsageError(f"keep {rate} is not in (0, 1]; it is the fraction of tokens that stay, such as `keep=0.7`")


@dataclass(frozen=True)
class Split:
    """How a stage of `N` tokens spends its budget: `attentive - pairs + clusters` tokens leave.

    `attentive` (K) tokens are kept apart, `pairs` (R) of them are merged away in pairs, and the other `N - K` tokens
    become `clusters` (C) tokens.
    """

    attentive: int
    pairs: int
    clusters: int


def split_budget(tokens: int, budget: int, cluster_share: float | None, pair_share: float) -> Split:
    """Splits a budget between attentive tokens, pairs and clusters; the one clamp, for every method.

    Args:
        tokens: `N`, the image tokens entering, more than `budget`.
        budget: The image tokens leaving, at least 1.
        cluster_share: Fraction of the budget that goes to clusters of inattentive tokens; None to drop them instead.
        pair_share: Fraction of the removed tokens that is removed by matching attentive tokens in pairs.

    Returns:
        A split with `K - R + C = budget`, `1 <= C <= N - K` (C is 0 without clusters) and `0 <= R <= K / 2`; a budget
        of 1 is one cluster of all.
    """
    if cluster_share is None:
        clusters = 0
    elif budget <= 1:
        return Split(0, 0, 1)
    else:
        clusters = min(max(1, round(budget * cluster_share)), budget)
    removed = tokens - budget
    # K = budget - C + R, so N - K >= C means R <= removed, and R <= K / 2 means R <= budget - C.
    pairs = max(0, min(round(removed * pair_share), removed, budget - clusters))
    return Split(budget - clusters + pairs, pairs, clusters)
