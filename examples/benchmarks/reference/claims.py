"""The claims of "Beyond Attentive Tokens" (arXiv 2211.11315) on the models of train.py: measured, and written down.

    python examples/benchmarks/run.py claims --model deit_tiny=runs/deit_tiny --model deit_small=runs/deit_small \\
        --train tin100-train.tar.gz --val tin100-val.tar -o runs/claims --device cuda --jobs 3 --time-limit 540
    python examples/benchmarks/run.py claims ... -o runs/claims --list        # what is done and what is left
    python examples/benchmarks/run.py claims ... -o runs/claims --time-limit 0   # only write the page again

Off the shelf all methods are swept over keep 0.9 to 0.2; then methods, parts and loss terms are fine-tuned with one
recipe, beside the dense model fine-tuned alike; see worklist.py for the list, the most telling first. The first --model
is trained with every seed, others with one. Each result goes into OUTPUT/results.json as soon as it is there: the same
command goes on where it was cut off. OUTPUT/RESULTS.md and its plots are made from that file, of whatever is in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
from jobs import STARTED, Lines, carried_out, say
from results import Results

from reference import page
from reference.judge import Judge, swept
from reference.worklist import RECIPE, Job, Plan, Sweep, Task
from tokencut.data.sources import open_source
from tokencut.errors import TokencutError
from tokencut.runtime.devices import describe_device, resolve_device

PAGE, RESULTS = "RESULTS.md", "results.json"
# Seconds kept back from the time limit for the page.
RESERVE = 12.0
# A job is begun if it takes no more than so much of the time left, by how long its like took.
CAUTION = 1.15
# So often a job may end without a result before it is left out.
TRIES = 2


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="may be repeated")
    parser.add_argument("--train", required=True, help="images to fine-tune on")
    parser.add_argument("--val", required=True, help="images to judge by")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for sweeps under way; default: OUTPUT/work")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--jobs", type=int, default=1, help="how many models are trained or judged at the same time")
    parser.add_argument("-j", "--workers", type=int, default=4, help="processes that decode images, of each job")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"), help="of training; judging is in fp32")
    parser.add_argument("-b", "--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3, help="of each fine-tune")
    parser.add_argument("--lr", type=float, default=RECIPE["lr"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--limit", type=int, help="judge by an evenly spread sample, for a trial")
    parser.add_argument("--keep", type=float, nargs="+", default=list(Plan.keeps), help="rates of the sweeps")
    parser.add_argument("--note", action="append", default=[], help="a remark on the models for the page; it is kept")
    parser.add_argument("--list", action="store_true", help="only say what is done and what is left")
    return parser.parse_args(words)


def conditions_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all results of a file have in common."""
    models = {}
    for text in args.model:
        name, _, folder = text.partition("=")
        path = Path(folder) / "model.safetensors"
        if not path.is_file():
            raise TokencutError(f"--model {text}: there is no {path}; type --model NAME=FOLDER with the folder that "
                                "train.py wrote, after shards.py if it came in parts")  # fmt: skip
        models[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return {
        "models": models, "epochs": args.epochs, "recipe": {**RECIPE, "lr": args.lr}, "batch": args.batch_size,
        "precision": args.precision, "train": Path(args.train).name, "val": Path(args.val).name, "limit": args.limit,
    }  # fmt: skip


def command_of(args: argparse.Namespace) -> str:
    """The command line for the page: with the names of files, and not where they lie on this machine."""
    words = ["python", "examples/benchmarks/run.py", "claims"]
    for text in args.model:
        name = text.partition("=")[0]
        words += ["--model", f"{name}=runs/{name}"]
    words += ["--train", Path(args.train).name, "--val", Path(args.val).name, "-o", "runs/claims"]
    for name in ("device", "jobs", "workers", "precision", "batch_size", "epochs", "lr", "time_limit", "limit"):
        value = getattr(args, name)
        if value is not None and value != math.inf:
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--seeds", *map(str, args.seeds)]
    return shlex.join([*words, "--keep", *map(str, args.keep)])


def trained_of(args: argparse.Namespace) -> dict[str, Any]:
    """What train.py noted of each model's training."""
    pairs = (text.partition("=") for text in args.model)
    configs = {
        name: json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")) for name, _, folder in pairs
    }
    return {name: config["training"] for name, config in configs.items() if "training" in config}


def is_open(job: Job, results: Results) -> bool:
    """Whether a job is still to be done."""
    done = results.rows.get(job.key)
    whole = done is not None and (not isinstance(job, Sweep) or job.complete(done["rows"]))
    return results.tries(job.key) < TRIES and not whole


def work_off(left: Sequence[Job], results: Results, judge: Judge, *, jobs: int, until: float) -> None:
    """Does what there is time for, so many jobs at the same time, and keeps each result as soon as it is there."""

    def expected(job: Job) -> float:
        """Seconds that the longest of its like took, with some on top; 0 where there was none."""
        like = [found["seconds"] for found in results.rows.values()
                if isinstance(job, Task) and (found.get("label"), found.get("epochs")) == (job.label, job.epochs)
               ]  # fmt: skip
        return CAUTION * max(like, default=0.0)

    def failed(job: Job, error: TokencutError) -> bool:
        results.fail(job.key, str(error))
        say(f"failed: {job.key}: {error}")
        return is_open(job, results)

    judge.work.mkdir(parents=True, exist_ok=True)
    for job, found in carried_out(judge, left, jobs=jobs, until=until, seconds=expected, on_failure=failed):
        results.content["failed"].pop(job.key, None)
        results.add(job.key, found)
        top1 = f", {found['top1']:.2f} %" if "top1" in found else ""
        say(f"{time.monotonic() - STARTED:5.0f} s: {job.key}, {found['seconds']:.0f} s{top1}")
    for job in left:
        whole = results.rows.get(job.key, {}).get("whole")
        if isinstance(job, Sweep) and not whole and (part := swept(job, judge.work)):
            results.add(job.key, part)


def main() -> None:
    """Does what is left and there is time for, and writes the page."""
    args = parse()
    conditions = conditions_of(args)
    args.output.mkdir(parents=True, exist_ok=True)
    results = Results(args.output / RESULTS, conditions, growing=("models",))
    jobs = Plan(list(conditions["models"]), args.epochs, args.seeds, tuple(args.keep)).jobs()
    left = [job for job in jobs if is_open(job, results)]
    if args.list:
        for job in jobs:
            print("left" if job in left else "done", job.key)
        return
    content = results.content
    if args.time_limit > RESERVE and left:
        device = describe_device(resolve_device(args.device))
        run = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "device": device, "torch": torch.__version__,
               "timm": timm.__version__, "command": command_of(args)}  # fmt: skip
        runs = content.setdefault("runs", [])
        runs += [] if run in runs else [run]
        content["trained"] = {**content.get("trained", {}), **trained_of(args)}
        open_source(args.train, split="train", observer=Lines())  # a .tar.gz is unpacked now, once for all jobs
        judge = Judge(
            {name: folder for name, _, folder in (text.partition("=") for text in args.model)}, args.train, args.val,
            conditions["recipe"], args.batch_size, args.workers, args.device, args.precision, args.limit,
            args.work or args.output / "work",
        )  # fmt: skip
        work_off(left, results, judge, jobs=args.jobs, until=STARTED + args.time_limit - RESERVE)
    if args.note:
        content["notes"] = list(dict.fromkeys([*content.get("notes", []), *args.note]))
    results.save()
    text = page.write(content, jobs, args.output)
    say(f"{sum(not is_open(job, results) for job in jobs)} of {len(jobs)} jobs done; wrote {args.output / PAGE}, "
        f"{len(text.splitlines())} lines")  # fmt: skip
