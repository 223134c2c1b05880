"""Markdown tables, and differences paired over the images that two results of a benchmark were judged on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokencut.evaluation.statistics import Difference, paired_difference

Result = Mapping[str, Any]


def markdown(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; None is an empty cell."""
    first, *others = (f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others])


def hits(result: Result) -> list[bool]:
    """For each image whether a result's model was right, from the `correct` that it keeps as ones and noughts."""
    return [mark == "1" for mark in result["correct"]]


def ahead(pairs: Sequence[tuple[Result, Result]]) -> Difference | None:
    """How far the first of each pair is ahead of the second; None without a pair.

    Of several pairs, seeds or keep rates, each image's differences are averaged first.
    """
    if not pairs:
        return None
    return paired_difference([hits(one) for one, _ in pairs], [hits(other) for _, other in pairs])
