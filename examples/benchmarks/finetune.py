"""What a short fine-tune wins back: methods beside each other, beside the dense model, and beside it fine-tuned alike.

    python examples/benchmarks/run.py finetune local-dir:FOLDER --train-data train.tar.gz --data val.tar --epochs 3 \\
        --keep 0.5 0.3 --seeds 1 2 3 --device cuda --precision bf16 --jobs 6 -o results.json
    python examples/benchmarks/run.py finetune local-dir:FOLDER --train-data train.tar.gz --held-out 5000 \\
        --train-limit 10000 --methods bat --grid alpha=0,0.1 beta=0,0.1 -o grid.json
    python examples/benchmarks/run.py finetune local-dir:FOLDER --train-data train.tar.gz --held-out 5000 \\
        --methods bat --keep 0.5 --grid lr=2e-4,5e-5 lr_scaling=none,rms -o rates.json
    python examples/benchmarks/run.py finetune digits --train-data digits --data digits --keep 0.3 -o digits.json

Every result goes to the JSON file as soon as it is there, and a training keeps its state beside it: the same command
goes on where it was cut off, `--max-seconds 0` only prints the table. `--jobs` trains so many models at the same time,
which may share one GPU.

The dense model is fine-tuned with the same recipe, images and seeds (`dense` in the table): what it gains owes nothing
to the reduction. `recovered` is the share of what a method lost against the dense model as it came. Differences are
points of top-1, averaged over the seeds image by image and paired over the images, with their standard error over the
images. `--grid` tries every combination of values of the recipe, each with its own control; what is chosen by it has to
be chosen on training images that were not trained on: `--held-out N` judges by so many of them, in the place of
`--data`. Weights that a fine-tune harmed are not put back here: what harms is to be seen.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jobs import Lines, carried_out, say
from results import Results
from tuning import DENSE, Resources, Settings, Task, carry_out, recipe_of
from tuning_table import report

from tokencut.data.sources import open_source
from tokencut.methods import methods
from tokencut.runtime.devices import resolve_device
from tokencut.training.recipe import RECIPES
from tokencut.training.state import remove_state


def parse() -> argparse.Namespace:
    """Reads the command line."""
    known = list(methods(keeps_grid=False))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as every tokencut command takes it: a timm name, local-dir:FOLDER, digits")
    parser.add_argument("--train-data", required=True, help="a folder, a tar, or digits")
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--data", help="images to judge by")
    judged.add_argument("--held-out", type=int, metavar="N", help="judge by N training images that are held out")
    parser.add_argument("--train-limit", type=int, metavar="N", help="train on an evenly spread sample of so many")
    parser.add_argument("--limit", type=int, metavar="N", help="judge by an evenly spread sample of so many")
    parser.add_argument("--methods", nargs="+", default=["bat", "evit", "topk", "tome"], choices=known)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", default="short", choices=RECIPES)
    parser.add_argument("--epochs", type=int, help="the recipe's own by default")
    parser.add_argument("--grid", nargs="*", default=[], metavar="NAME=V,V", help="values of the recipe to combine")
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("-j", "--workers", type=int, help="processes that load images, for each job")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="stop then, and print what is there")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.json")
    return parser.parse_args()


def combinations(grid: Sequence[str]) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Every combination of `name=value,value` axes; one without any change for no axes."""
    axes = [axis.partition("=") for axis in grid]
    for values in itertools.product(*(choices.split(",") for _, _, choices in axes)):
        yield tuple((name.strip(), _value(text)) for (name, _, _), text in zip(axes, values, strict=True))


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def tasks(args: argparse.Namespace, settings: Settings, resources: Resources) -> list[Task]:
    """All models to judge, those first without which a table says nothing: off the shelf, then seed by seed."""

    def task(method: str, keep: float, seed: int | None, changes: tuple[tuple[str, Any], ...] = ()) -> Task:
        return Task(method, keep, seed, changes, settings, resources)

    made = [task(DENSE, 1.0, None), *(task(method, keep, None) for keep in args.keep for method in args.methods)]
    for seed in args.seeds:
        made += [task(DENSE, 1.0, seed, changes) for changes in combinations(args.grid)]
        for keep, method in itertools.product(args.keep, args.methods):
            made += [task(method, keep, seed, changes) for changes in combinations(args.grid)]
    return made


def resources_of(args: argparse.Namespace) -> Resources:
    """A share of the processors for each job."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, processors // args.jobs)
    workers = min(4, share) if args.workers is None else args.workers
    return Resources(args.device, workers, min(share, torch.get_num_threads()), f"{args.output}.resume")


def main() -> None:
    """Does what is left to do, and prints the table."""
    args, started = parse(), time.monotonic()
    settings = Settings(
        model=args.model, train_data=args.train_data, data=args.data, held_out=args.held_out,
        train_limit=args.train_limit, limit=args.limit, recipe=args.recipe, epochs=args.epochs,
        batch_size=args.batch_size, precision=args.precision,
    )  # fmt: skip
    wanted = tasks(args, settings, resources_of(args))
    for task in wanted:
        recipe_of(settings, task.changes)
    results = Results(args.output, asdict(settings))
    resolve_device(args.device)
    open_source(args.train_data, split="train", observer=Lines())  # an archive is unpacked once, before the jobs start
    left = [task for task in wanted if task.key not in results.rows]
    for task, found in carried_out(carry_out, left, jobs=args.jobs, until=started + args.max_seconds):
        results.add(task.key, found)
        remove_state(task.state)
        done = sum(other.key in results.rows for other in wanted)
        say(f"{done} of {len(wanted)}, {time.monotonic() - started:.0f} s: {task.key}, top-1 {found['top1']:.2f}")
    print(report(results, wanted))
