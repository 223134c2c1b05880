"""Found schedules against the fixed three stages, and against one rate in every block, at the same multiply-adds.

    python examples/benchmarks/schedules.py local-dir:MODEL_FOLDER --calibration TRAIN.tar.gz --data VAL.tar

Schedules are found on training images and judged once, on others. Differences are paired over the images, with their
standard error. Prints a Markdown table, with what `--max-drop` finds in its last row.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import tokencut
from tokencut import cost
from tokencut.data.sources import open_source
from tokencut.evaluation.accuracy import EvaluationReport
from tokencut.evaluation.statistics import Difference, paired_difference
from tokencut.model import predicted_macs
from tokencut.models.loading import load_model
from tokencut.search.run import SearchReport, SearchSettings, find_schedule
from tokencut.search.targets import Target

HEAD = (
    "budget",
    "GMACs",
    "fixed top-1",
    "found top-1",
    "found against fixed",
    "found against dense",
    "seconds",
    "found",
)


@dataclass(frozen=True)
class Row:
    """One budget: what the fixed schedule gives and what is found for its multiply-adds."""

    budget: str
    gmacs: float
    fixed: EvaluationReport | None
    found: EvaluationReport
    report: SearchReport

    def cells(self, dense: EvaluationReport) -> list[str]:
        ahead = "" if self.fixed is None else str(paired_difference(self.found.correct, self.fixed.correct))
        return [
            self.budget,
            f"{self.gmacs:.4f}",
            "" if self.fixed is None else f"{self.fixed.top1:.2f}",
            f"{self.found.top1:.2f}",
            ahead,
            str(paired_difference(self.found.correct, dense.correct)),
            f"{self.report.seconds:.0f}",
            f"`{self.report.found.options}`",
        ]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="digits")
    parser.add_argument("--calibration", default="digits", help="training images")
    parser.add_argument("--data", default="digits", help="images to judge by, none of those")
    parser.add_argument("--method", default="bat")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.7, 0.5, 0.3], help="rates of the fixed stages")
    parser.add_argument("--reduce-by", type=int, nargs="*", default=[], help="tokens fewer in every block")
    parser.add_argument("--gmacs", type=float, nargs="*", default=[], help="further budgets")
    parser.add_argument("--max-drop", type=float, nargs="*", default=[])
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--effort", type=float, default=40.0, help="dense forwards of those that a search may take")
    parser.add_argument("--limit", type=int, help="judge by a sample of so many images")
    return parser.parse_args(words)


class Bench:
    """The model and its images."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model: nn.Module = load_model(options.model).dense.eval()
        self.calibration = open_source(options.calibration, split="train")
        self.data = open_source(options.data)
        self.dense = self.judged(self.model)

    def judged(self, model: nn.Module) -> EvaluationReport:
        return tokencut.evaluate(model, self.data, limit=self.options.limit, workers=0, device="cpu")

    def row(self, budget: str, target: Target, fixed: nn.Module | None = None) -> Row:
        """Finds a schedule and judges it."""
        started = time.perf_counter()
        settings = SearchSettings(images=self.options.images, effort=self.options.effort, workers=0, device="cpu")
        report = find_schedule(self.model, self.calibration, target, method=self.options.method, settings=settings)
        found = tokencut.compress(self.model, keep=report.found.keep, layers=report.found.layers,
                                  method=self.options.method)  # fmt: skip
        judged = None if fixed is None else self.judged(fixed)
        row = Row(budget, report.found.gmacs, judged, self.judged(found), report)
        say(f"{budget}: {row.found.top1:.2f} after {time.perf_counter() - started:.0f} s")
        return row

    def against(self, budget: str, **schedule: Any) -> Row:
        """A row beside a schedule that was typed."""
        fixed = tokencut.compress(self.model, method=self.options.method, **schedule)
        return self.row(budget, Target(gmacs=cost.total(predicted_macs(fixed)) / 1e9), fixed)

    def rows(self) -> list[Row]:
        """All that was asked for."""
        rows = [self.against(f"keep {keep:g}", keep=keep) for keep in self.options.keep]
        rows += [self.against(f"reduce by {by}", reduce_by=by) for by in self.options.reduce_by]
        rows += [self.row(f"{gmacs:g} GMACs", Target(gmacs=gmacs)) for gmacs in self.options.gmacs]
        return rows + [self.row(f"drop {drop:g}", Target(max_drop=drop)) for drop in self.options.max_drop]


def average(rows: Sequence[Row]) -> Difference | None:
    """How far the found schedules are ahead of the fixed ones, over the budgets that have both."""
    pairs = [(row.found.correct, row.fixed.correct) for row in rows if row.fixed is not None]
    return paired_difference([found for found, _ in pairs], [fixed for _, fixed in pairs]) if pairs else None


def table(rows: Sequence[Row], dense: EvaluationReport) -> str:
    """The rows as Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells(dense) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def say(text: str) -> None:
    """Progress, to stderr."""
    sys.stderr.write(f"{text}\n")


def main(words: Sequence[str] | None = None) -> None:
    """Prints the table."""
    bench = Bench(arguments(words))
    rows = bench.rows()
    sys.stdout.write(table(rows, bench.dense) + "\n")
    ahead = average(rows)
    if ahead is not None:
        sys.stdout.write(f"\nOver the budgets with a fixed schedule: {ahead}.\n")
    sys.stdout.write(f"Dense: {bench.dense.top1:.2f} on {bench.dense.images:,} images.\n")


if __name__ == "__main__":
    main()
