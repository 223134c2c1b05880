"""Eight bits and fewer tokens: what either costs and saves, and both together.

    python examples/benchmarks/run.py quantised local-dir:FOLDER --data val.tar --calibration train.tar --limit 1000
    python examples/benchmarks/run.py quantised deit_small_patch16_224 --device cuda --batch-size 1 32 256

On a CPU the dense and the compressed model are exported, in fp32 and in int8 (with ranges taken in each forward, and
with ranges of calibration images), and run by their runtimes. On a GPU they are torch's, in bf16, and with weights in
int8 and fp8 (`tokencut.quantize`), each compiled. Either way

- `top-1` is of the images of `--data`; `beside dense` the difference to the dense model as it is, `by eight bits` to
  the same model without, in points, paired over the images, with its standard error;
- `times as fast` is how many times as fast as the dense model as it is: the median over rounds in which all take their
  turns, and the quartiles. On a CPU these are processor seconds of one thread, which other programs do not disturb.
  Without `--data` only that is measured.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from jobs import Lines, say
from options import IMAGES, TRAINING_IMAGES
from timing import ProcessClock
from torch import nn

import tokencut
from tokencut.composite import plain_parts
from tokencut.data.sources import open_source
from tokencut.errors import TokencutError
from tokencut.evaluation.accuracy import EvaluationReport, evaluate
from tokencut.evaluation.statistics import paired_difference
from tokencut.export.runtimes import ExportedModel, open_exported, runtimes
from tokencut.methods import methods
from tokencut.models.loading import load_model
from tokencut.profiling.latency import measure, quartiles
from tokencut.profiling.measuring import random_images
from tokencut.runtime.compiling import COMPILE_MODES, compile_model
from tokencut.runtime.devices import describe_device, resolve_device, versions

DENSE = "dense"
COLUMNS = ["model", "form", "MB", "top-1, %", "beside dense", "by eight bits", "batch", "ms", "times as fast"]


@dataclass
class Form:
    """A model in one form.

    Attributes:
        side: `dense`, or the method.
        form: What its numbers are.
        plain: What they are of the same side without eight bits.
        megabytes: Its weights, or its file.
        model: What is judged and timed; None where a process of its own does that.
        judged: What an evaluation found of it.
    """

    side: str
    form: str
    plain: str
    megabytes: float
    model: nn.Module | None = None
    judged: EvaluationReport | None = None


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as every tokencut command takes it: a timm name, local-dir:FOLDER, digits")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--method", default="bat", choices=sorted(methods()))
    parser.add_argument("--data", help=IMAGES)
    parser.add_argument("--limit", type=int, help="an evenly spread sample of so many")
    parser.add_argument("--calibration", help=TRAINING_IMAGES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runtimes", nargs="+", default=["onnx"], help="on a CPU: what runs the files")
    parser.add_argument("--kinds", nargs="+", default=["int8", "fp8"], help="on a GPU: what weights are kept in")
    parser.add_argument("--compile-mode", default="reduce-overhead", choices=COMPILE_MODES)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16], help="what is timed")
    parser.add_argument("--rounds", type=int, default=11, help="in which all take their turns")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="for the timing of one batch size")
    return parser.parse_args()


def sides(args: argparse.Namespace) -> dict[str, tokencut.CompressedModel]:
    """The dense model and the compressed one; the former as one that keeps all tokens."""
    needed = args.data is not None
    loaded = load_model(args.model, weights_needed=needed, pretrained=needed)
    return {
        DENSE: tokencut.compress(loaded.dense, keep=1.0, method=args.method),
        args.method: tokencut.compress(loaded.dense, keep=args.keep, method=args.method),
    }


def exported(args: argparse.Namespace, folder: Path) -> list[Form]:
    """Files in fp32 and int8 for each runtime."""
    found = []
    for kind in args.runtimes:
        runtime = runtimes()[kind]
        forms: dict[str, dict[str, Any]] = {"fp32": {}, "int8, dynamic": {"quantize": "int8"}}
        if args.calibration:
            calibration = open_source(args.calibration, split="train", observer=Lines())
            forms["int8, static"] = {"quantize": "int8", "calibration": calibration}
        for side, model in sides(args).items():
            for form, settings in forms.items():
                path = folder / f"{side}-{kind}-{form.replace(', ', '-')}{runtime.suffix}"
                allow = {"allow_drop": 100.0} if settings else {}
                say(f"writing {side}, {kind}, {form}")
                try:
                    report = tokencut.export_model(model, path, limit=8, **settings, **allow)
                except TokencutError as error:  # not every runtime takes ranges in each forward
                    say(f"{side}, {kind}, {form}: left out ({error})")
                    continue
                found.append(
                    Form(side, f"{kind} {form}", f"{kind} fp32", report.bytes / 1e6, open_exported(path))
                )  # fmt: skip
    return found


def timed_files(forms: list[Form], args: argparse.Namespace, batch: int) -> list[Sequence[float]]:
    """Seconds of a forward of each, in rounds in which all take their turns."""
    models = {str(number): form.model for number, form in enumerate(forms) if form.model is not None}
    first = open_exported(models["0"].path)  # type: ignore[arg-type]
    images = random_images(first, (batch, *first.info.input_shape), torch.device("cpu"))
    found = measure(models, images, rounds=args.rounds, max_seconds=args.max_seconds, clock=ProcessClock())
    return [found[str(number)].samples for number in range(len(forms))]


def judge(model: nn.Module, args: argparse.Namespace, *, precision: str = "fp32") -> EvaluationReport:
    """Evaluates a model where it runs."""
    on_gpu = resolve_device(args.device).type != "cpu"
    return evaluate(
        model, open_source(args.data), limit=args.limit, batch_size=256 if on_gpu else 16, device=args.device,
        precision=precision, workers=2 if on_gpu else 0,
    )  # fmt: skip


class Served:
    """A model on a GPU, compiled, judged and timed by a process of its own: six are compiled at the same time."""

    def __init__(self, args: argparse.Namespace, side: str, kind: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, args, side, kind))
        self.process.start()
        there.close()
        self.form = Form(side, kind, "bf16", 0.0)

    def ask(self, *task: object) -> None:
        """Has the process do something."""
        self.link.send(task)

    def answer(self) -> Any:
        """What comes of it; a process that failed ends the script."""
        try:
            return self.link.recv()
        except EOFError:
            sys.exit(f"error: {self.form.side} in {self.form.form} failed, as said above")


def serve(link: Connection, args: argparse.Namespace, side: str, kind: str) -> None:
    """What a `Served` does in its process: `prepare` and `time` a batch size, and `judge`, until the link is closed."""
    device, model = torch.device(args.device), sides(args)[side]
    if kind != "bf16":
        model = tokencut.quantize(model, kind)
    forwards: dict[int, Callable[[], None]] = {}
    with torch.no_grad():
        while True:
            try:
                what, batch = link.recv()
            except EOFError:
                return
            if what == "judge":
                link.send(judge(model, args, precision="bf16"))
            elif what == "prepare":
                model = model.to(device, torch.bfloat16)
                size = model.pretrained_cfg["input_size"]
                images = random_images(model, (batch, *size), device)
                forwards[batch] = partial(compile_model(model, args.compile_mode), images)
                for _ in range(5):
                    forwards[batch]()
                torch.cuda.synchronize()
                weights = (part for weight in model.parameters() for part in plain_parts(weight))
                link.send(sum(part.nbytes for part in weights) / 1e6)
            else:
                link.send(seconds_of(forwards[batch]))


def seconds_of(forward: Callable[[], None]) -> float:
    """Seconds of a forward on a GPU that nobody else uses, over about 0.1 s."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = 1
    while True:
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            forward()
        end.record()
        torch.cuda.synchronize()
        taken = start.elapsed_time(end) / 1000
        if taken > 0.05:
            return taken / repeats
        repeats = max(2 * repeats, int(0.1 * repeats / max(taken, 1e-6)))


def on_gpu(args: argparse.Namespace) -> tuple[list[Form], dict[int, list[list[float]]]]:
    """All models on a GPU: judged, and timed in turns."""
    served = [Served(args, side, kind) for side in (DENSE, args.method) for kind in ("bf16", *args.kinds)]
    try:
        if args.data:
            say("judging all of them")
            for one in served:
                one.ask("judge", 0)
            for one in served:
                one.form.judged = one.answer()
        for batch in args.batch_size:
            say(f"compiling all of them for batches of {batch}")
            for one in served:
                one.ask("prepare", batch)
            for one in served:
                one.form.megabytes = one.answer()
        timings: dict[int, list[list[float]]] = {}
        for batch in args.batch_size:
            say(f"timing batches of {batch}")
            rounds = []
            for _ in range(args.rounds + 1):
                samples = []
                for one in served:
                    one.ask("time", batch)
                    samples.append(one.answer())
                rounds.append(samples)
            timings[batch] = [list(column) for column in zip(*rounds[1:], strict=True)]  # the first warms up
    finally:
        for one in served:
            one.link.close()
            one.process.join(10)
            one.process.kill()
    return [one.form for one in served], timings


def ahead(form: Form, of: Form | None) -> str:
    """How far a form is ahead of another in top-1."""
    if form.judged is None or of is None or of.judged is None or of is form:
        return ""
    return str(paired_difference(form.judged.correct, of.judged.correct))


def rows(forms: list[Form], timings: Mapping[int, Sequence[Sequence[float]]]) -> list[list[str]]:
    """The cells of the table, a row for each form and batch size."""
    found = []
    for number, form in enumerate(forms):
        plain = next(one for one in forms if (one.side, one.form) == (form.side, form.plain))
        top1 = "" if form.judged is None else f"{form.judged.top1:.2f}"
        for batch, samples in timings.items():
            ratios = [first / mine for first, mine in zip(samples[0], samples[number], strict=True)]
            low, high = quartiles(ratios)
            ratio = "1" if number == 0 else f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
            found.append([
                form.side, form.form, f"{form.megabytes:.1f}", top1, ahead(form, forms[0]), ahead(form, plain),
                str(batch), f"{1000 * statistics.median(samples[number]):.2f}", ratio,
            ])  # fmt: skip
    return found


@torch.no_grad()
def main() -> None:
    """Makes all forms, judges and times them, and prints the table."""
    args = parse()
    device = resolve_device(args.device)
    timings: Mapping[int, Sequence[Sequence[float]]]
    told = {name: version for name, version in versions().items() if name != "tokencut"}
    if device.type == "cpu":
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            forms = exported(args, Path(folder))
            for form in forms if args.data else ():
                say(f"judging {form.side}, {form.form}")
                assert form.model is not None
                form.judged = judge(form.model, args)
            timings = {batch: timed_files(forms, args, batch) for batch in args.batch_size}
            told |= dict(form.model.runtime for form in forms if isinstance(form.model, ExportedModel))
    else:
        forms, timings = on_gpu(args)
    images = f", {forms[0].judged.images:,} images of {args.data}" if forms[0].judged else ""
    named = ", ".join(f"{name} {version}" for name, version in told.items())
    print(f"{args.model}, {args.method} at keep {args.keep:g}{images}, on {describe_device(device)}, {named}, "
          f"{datetime.date.today().isoformat()}\n")  # fmt: skip
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for cells in rows(forms, timings):
        print(f"| {' | '.join(cells)} |")
