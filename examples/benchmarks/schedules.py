"""Found schedules against the fixed three stages, and against one rate in every block, at the same multiply-adds.

    python examples/benchmarks/run.py schedules local-dir:MODEL_FOLDER --calibration TRAIN.tar.gz --data VAL.tar

Schedules are found on training images and judged once, on others. Differences are paired over the images, with their
standard error. Prints a Markdown table, with what `--max-drop` finds in its last row.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from jobs import say
from tables import markdown
from torch import nn

import tokencut
from tokencut.cli.wording import as_typed
from tokencut.data.sources import open_source
from tokencut.evaluation.accuracy import EvaluationReport
from tokencut.evaluation.statistics import paired_difference
from tokencut.model import predicted_gmacs
from tokencut.models.loading import load_model
from tokencut.search.run import SearchSettings, find_schedule
from tokencut.search.targets import Target

HEAD = ("budget", "GMACs", "fixed top-1", "found top-1", "found against fixed", "found against dense", "seconds",
        "found")  # fmt: skip


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return parser.parse_args()


class Bench:
    """The model and its images, and what was found for each budget so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model: nn.Module = load_model(args.model).dense.eval()
        self.calibration = open_source(args.calibration, split="train")
        self.data = open_source(args.data)
        self.dense = self.judged(self.model)
        self.rows: list[list[Any]] = []
        self.pairs: list[tuple[tuple[bool, ...], tuple[bool, ...]]] = []

    def judged(self, model: nn.Module) -> EvaluationReport:
        return tokencut.evaluate(model, self.data, limit=self.args.limit, workers=0, device="cpu")

    def find(self, budget: str, target: Target, fixed: nn.Module | None = None) -> None:
        """Finds a schedule and judges it, beside the fixed one where there is one."""
        started, method = time.perf_counter(), self.args.method
        settings = SearchSettings(images=self.args.images, effort=self.args.effort, workers=0, device="cpu")
        report = find_schedule(self.model, self.calibration, target, method=method, settings=settings)
        schedule = report.found
        found = self.judged(tokencut.compress(self.model, keep=schedule.keep, layers=schedule.layers, method=method))
        typed, ahead = ("", "")
        if fixed is not None:
            beside = self.judged(fixed)
            self.pairs.append((found.correct, beside.correct))
            typed, ahead = f"{beside.top1:.2f}", str(paired_difference(*self.pairs[-1]))
        to_dense = paired_difference(found.correct, self.dense.correct)
        self.rows.append([budget, f"{schedule.gmacs:.4f}", typed, f"{found.top1:.2f}", ahead, to_dense,
                          f"{report.seconds:.0f}", f"`{as_typed(schedule.arguments)}`"])  # fmt: skip
        say(f"{budget}: {found.top1:.2f} after {time.perf_counter() - started:.0f} s")

    def beside(self, budget: str, **schedule: Any) -> None:
        """Finds a schedule that costs as much as one that was typed."""
        fixed = tokencut.compress(self.model, method=self.args.method, **schedule)
        self.find(budget, Target(gmacs=predicted_gmacs(fixed)), fixed)


def main() -> None:
    """Finds and judges all that was asked for, and prints the table."""
    args = parse()
    bench = Bench(args)
    for keep in args.keep:
        bench.beside(f"keep {keep:g}", keep=keep)
    for by in args.reduce_by:
        bench.beside(f"reduce by {by}", reduce_by=by)
    for budget in args.gmacs:
        bench.find(f"{budget:g} GMACs", Target(gmacs=budget))
    for drop in args.max_drop:
        bench.find(f"drop {drop:g}", Target(max_drop=drop))
    print(markdown(HEAD, bench.rows))
    if bench.pairs:
        found, fixed = zip(*bench.pairs, strict=True)
        print(f"\nOver the budgets with a fixed schedule: {paired_difference(found, fixed)}.")
    print(f"Dense: {bench.dense.top1:.2f} on {bench.dense.images:,} images.")
