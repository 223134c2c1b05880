"""Schedules found by the clock against the fixed three stages of the same measured speed, in each form asked for.

    python examples/benchmarks/run.py by_clock local-dir:MODEL_FOLDER --calibration TRAIN.tar.gz --data VAL.tar \
        --device cuda --precision bf16 -b 64 --forms captured eager

A schedule is found on training images for a speed-up. The fixed stages get the one keep rate at which they are as fast,
by measurement. Dense, found and fixed are then timed in turns once more, and judged on other images in the same
precision; differences are paired over the images, with their standard error. Prints a Markdown table and, with
`--json`, writes each search with its table of times.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jobs import say
from tables import markdown
from torch import nn

import tokencut
from tokencut.cli.wording import as_typed
from tokencut.data.sources import open_source
from tokencut.errors import TokencutError
from tokencut.evaluation.statistics import paired_difference
from tokencut.model import CompressedModel, predicted_gmacs
from tokencut.models.loading import load_model
from tokencut.runtime.devices import inference_state, precision_dtype, resolve_device
from tokencut.schedule import make_schedule
from tokencut.search.calibration import calibration_images
from tokencut.search.latency_table import LatencyTable
from tokencut.search.timing import Bench

HEAD = ("form", "asked", "schedule", "stages", "tokens leaving", "GMACs", "ms a batch", "speed-up", "top-1", "loss",
        "found against fixed", "seconds")  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {"eager": {}, "compiled": {"compile_mode": "default"}, "captured": {"capture": True}}
# The fixed stages are taken to be as fast from so near on.
SAME, TRIES = 0.01, 4


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits")
    parser.add_argument("--calibration", default="digits", help="training images")
    parser.add_argument("--data", default="digits", help="images to judge by, none of those")
    parser.add_argument("--method", default="bat")
    parser.add_argument("--speedup", type=float, nargs="*", default=[1.5])
    parser.add_argument("--forms", nargs="*", choices=list(FORMS), default=["eager"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("-b", "--batch-size", type=int, default=16, help="images a forward that is timed")
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--effort", type=float, default=40.0, help="dense forwards of those that a search may take")
    parser.add_argument("--limit", type=int, default=10**9, help="judge by a sample of so many images")
    parser.add_argument("--json", type=Path, help="write what the searches report")
    return parser.parse_args()


class Judge:
    """The images that models are judged on, loaded once, as the model takes them."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
        loaded = calibration_images(model, open_source(args.data), limit=args.limit, batch_size=64, device=device)
        if loaded.targets is None:
            raise TokencutError("; ".join(loaded.notes))
        self.batches, self.targets = loaded.batches, loaded.targets

    def __call__(self, model: nn.Module) -> tuple[list[bool], float]:
        """Whether each image is right, and the mean cross-entropy."""
        with torch.no_grad():
            logits = torch.cat([model(batch).float().cpu() for batch in self.batches])
        return (logits.argmax(1) == self.targets).tolist(), float(F.cross_entropy(logits, self.targets))


def as_fast(whole: CompressedModel, bench: Bench, table: LatencyTable, wanted: float) -> CompressedModel:
    """The fixed stages with the keep rate at which they are measured so many times as fast as dense."""
    aim, found = wanted, []
    for _ in range(TRIES):
        keep = by_table(table, whole, aim)
        made = tokencut.compress(whole.model, keep=keep, method=whole.recipe.method).eval()
        measured = bench.beside_dense(made).speedup
        say(f"fixed stages at keep {keep:.3f}: measured {measured:.3f}")
        found.append((abs(measured / wanted - 1), made))
        if found[-1][0] < SAME:
            break
        aim *= wanted / measured
    return min(found, key=lambda one: one[0])[1]


def by_table(table: LatencyTable, whole: CompressedModel, speedup: float) -> float:
    """The highest keep rate of the fixed stages at which a table foretells such a speed-up."""
    depth, low, high = len(table.blocks), 0.02, 1.0
    for _ in range(12):
        keep = (low + high) / 2
        plans = make_schedule(depth, keep, None, None).resolve(whole.recipe.tokens, whole.method.tokens_out)
        left = {plan.block: plan.tokens_out for plan in plans}
        now, counts = whole.recipe.tokens, []
        for block in range(1, depth + 1):
            now = left.get(block, now)
            counts.append(now)
        low, high = (keep, high) if table.speedup(tuple(counts)) >= speedup else (low, keep)
    return low


def main() -> None:
    """Finds, times and judges all that was asked for, and prints the table."""
    args = parse()
    model, device = load_model(args.model).dense.eval(), resolve_device(args.device)
    calibration, rows, reports = open_source(args.calibration, split="train"), [], []
    whole = tokencut.compress(model, keep=1.0, method=args.method).eval()
    with inference_state(whole, device, precision_dtype(args.precision)):
        judge = Judge(whole, args, device)
        dense_right, dense_loss = judge(whole.model)
        for form in args.forms:
            settings = tokencut.SearchSettings(
                images=args.images, effort=args.effort, timing_batch_size=args.batch_size, device=device,
                precision=args.precision, **FORMS[form],
            )  # fmt: skip
            for speedup in args.speedup:
                target = tokencut.Target(speedup=speedup)
                try:
                    report = tokencut.find_schedule(
                        whole.model, calibration, target, method=args.method, settings=settings
                    )
                except TokencutError as error:
                    say(f"{form}, {speedup:g}: {error}")
                    continue
                for note in report.notes:
                    say(f"{form}, {speedup:g}: {note}")
                reports.append(report.to_dict())
                assert report.clock is not None and report.speedup is not None
                say(f"{form}, {speedup:g}: measured {report.speedup:.3f} after {report.seconds:.0f} s, "
                    f"{report.found.arguments}")  # fmt: skip
                found = tokencut.compress(whole.model, keep=report.found.keep, layers=report.found.layers,
                                          method=args.method).eval()  # fmt: skip
                bench = Bench(whole, batch_size=args.batch_size, device=device, precision=args.precision, **FORMS[form])
                fixed = as_fast(whole, bench, report.clock.table, report.speedup)
                sides = {"found": found, "fixed": fixed}
                forwards = {"dense": bench.dense, **{name: bench.formed(side) for name, side in sides.items()}}
                times = bench.times(forwards, task="timing")
                right = {name: judge(side) for name, side in sides.items()}
                ahead = paired_difference(right["found"][0], right["fixed"][0])
                for name, side in sides.items():
                    recipe, ms, before = side.recipe, times[name].median_ms, times["dense"].median_ms
                    rate = f"--keep {recipe.keep:.3f}" if name == "fixed" else as_typed(report.found.arguments)
                    correct, loss = right[name]
                    is_found = name == "found"
                    rows.append([
                        report.clock.conditions.form, f"{speedup:g}", f"{name}: `{rate}`", len(recipe.stages),
                        "/".join(str(stage.tokens_out) for stage in recipe.stages), f"{predicted_gmacs(side):.3f}",
                        f"{before:.3f} -> {ms:.3f}", f"{before / ms:.3f}", f"{100 * sum(correct) / len(correct):.2f}",
                        f"{loss:.4f}", str(ahead) if is_found else "", f"{report.seconds:.0f}" if is_found else "",
                    ])  # fmt: skip
        conditions = asdict(bench.conditions) if reports else {}
    print(markdown(HEAD, rows))
    print(f"\nDense: {100 * sum(dense_right) / len(dense_right):.2f}, loss {dense_loss:.4f}, on {len(dense_right):,} "
          f"images. {conditions}")  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
