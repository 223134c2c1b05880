"""How benchmarks time: their options, models in turns with the dense one, and a limit to what may take too long."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from timing_table import Columns, Measured, Row, in_processes, publish
from torch import Tensor, nn

from tokencut import cost
from tokencut.errors import TokencutError, UsageError
from tokencut.messages import one_line
from tokencut.model import CompressedModel, predicted_macs
from tokencut.profiling.latency import Clock, Forward, Timing, clock_for, measure, share_of_time, speedup
from tokencut.runtime.devices import PRECISIONS, describe_device, resolve_device

EAGER, NAIVE = "eager", "naive"
RUNNER = Path(__file__).resolve().parent / "run.py"


def add_run_options(parser: argparse.ArgumentParser, *, rounds: int, max_seconds: float) -> None:
    """The options that all of them have: where and how precisely models run, how long, how often, and the output."""
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=sorted(PRECISIONS), help="the weights are cast to it")
    parser.add_argument("--threads", type=int, help="torch's threads, and onnxruntime's; by default one a core")
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "process"],
        help="process: seconds that the processor worked for this, where others use the machine; with one thread",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=rounds, help="samples of each model")
    parser.add_argument(
        "--max-seconds", type=float, default=max_seconds,
        help="for each model beside the dense one; a model that takes longer to compile is left out",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, help="so many runs, one after the other; medians over them")
    parser.add_argument("-o", "--output", type=Path, help="write the Markdown table to this file as well")
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)  # how one of several processes reports


class ProcessClock:
    """Seconds that the processor spent on this process: the same whoever else is at work, save for shared caches."""

    def mark(self) -> float:
        """The seconds so far."""
        return time.process_time()

    def seconds(self, start: float, end: float) -> float:
        """Seconds between two marks."""
        return end - start


def chosen_clock(args: argparse.Namespace) -> Clock:
    """The clock that was asked for.

    Raises:
        UsageError: It does not fit the device or the threads, whose seconds it would add up.
    """
    device = resolve_device(args.device)
    if args.clock == "wall":
        return clock_for(device)
    if device.type != "cpu" or torch.get_num_threads() != 1:
        raise UsageError(f"--clock process is for one thread of a CPU, and this is {describe_device(device)}; "
                         "type --device cpu --threads 1")  # fmt: skip
    return ProcessClock()


def prepared(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """A model in eval mode on its device, its weights cast, as it would be served."""
    return model.to(resolve_device(args.device), PRECISIONS[args.precision]).eval()


class TooSlowError(Exception):
    """Something took longer than it was given."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stops what runs inside after a while, where the system has alarms (not on Windows).

    Raises:
        TooSlowError: The time is up.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TooSlowError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again every 5 s: torch's compiler has places that swallow an exception.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def beside_dense(
    name: str, form: str, sides: Mapping[str, nn.Module], forwards: Mapping[str, Forward], images: Tensor,
    args: argparse.Namespace, shares: bool,
) -> tuple[Row, Row]:  # fmt: skip
    """Times a model and the dense one in turns.

    Args:
        name: What the table calls the model.
        form: What it calls the form.
        sides: The models themselves, `dense` and `name`: what they cost is read off them.
        forwards: What is called, by the same names.
        images: A batch.
        args: The benchmark's options.
        shares: Whether to measure the share of the stages, where the model has any.

    Returns:
        The dense model's row and the other's.
    """
    clock = chosen_clock(args)
    timings = measure(forwards, images, rounds=args.rounds, max_seconds=args.max_seconds, clock=clock)
    model, reference = sides[name], timings["dense"]
    faster, spread = speedup(reference, timings[name])
    share = None
    if shares and isinstance(model, CompressedModel):
        share = share_of_time(model, model.stages.values(), images, clock=clock)
    dense = _row("dense", form, sides["dense"], images, reference, None)
    row = _row(name, form, model, images, timings[name], share)
    ratio = dense.gmacs / row.gmacs
    return dense, dataclasses.replace(row, flops_ratio=ratio, speedup=faster, speedup_spread=spread)


def _row(name: str, form: str, model: nn.Module, images: Tensor, timing: Timing, share: float | None) -> Row:
    blocks = predicted_macs(model)
    return Row(
        model=name,
        form=form,
        batch=images.shape[0],
        tokens=blocks[0].tokens_in,
        gmacs=cost.total(blocks) / 1e9,
        stage_gmacs=sum(block.stage_macs for block in blocks) / 1e9,
        flops_ratio=1.0,
        ms=timing.median_ms,
        ms_spread=timing.spread_ms,
        stage_share=share,
        memory_mib=timing.peak_memory_mib,
    )


def in_turns(
    what: str, form: str, models: Mapping[str, nn.Module], make: Callable[[str], Forward], images: Tensor,
    args: argparse.Namespace, note: Callable[[str], None],
) -> Iterator[Row]:  # fmt: skip
    """Times the models of one form, one at a time beside the dense one; goes on where one cannot be timed.

    Args:
        what: What notes call this: the form and what else there is more than one of.
        form: What the table calls the form.
        models: By name, `dense` first.
        make: What is called for a model of that name.
        images: A batch.
        args: The benchmark's options.
        note: Told what could not be timed, and why.

    Yields:
        The dense model's row, then the others'.
    """
    forwards: dict[str, Forward] = {}
    told = False
    for name in models:
        try:
            forwards = {"dense": forwards.get("dense") or make("dense")}
            if name == "dense":
                continue
            forwards[name] = make(name)
            shares = form == EAGER and not name.startswith(NAIVE)
            dense, row = beside_dense(name, form, models, forwards, images, args, shares=shares)
        except (TokencutError, TooSlowError, RuntimeError) as error:  # RuntimeError: out of memory, above all
            note(f"{name}, {what}: not timed ({one_line(str(error).partition(chr(10))[0])})")
            if name == "dense":
                return
            continue
        if not told:
            yield dense
        told = True
        yield row


def timed_table(
    name: str, args: argparse.Namespace, columns: Columns, measured: Measured, *, versions: Mapping[str, str],
    shared: Sequence[str] = (), more: str = "",
) -> tuple[str, list[Row]]:  # fmt: skip
    """Times everything, here or in several processes one after the other, and prints the table.

    Args:
        name: The benchmark's.
        args: Its options.
        columns: How each column's cells are made.
        measured: Makes the rows; is given what to call with a note.
        versions: Those of what runs beside torch.
        shared: Words for the command line of each of several processes.
        more: What else the line above the table says.

    Returns:
        That line, and the rows.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen_clock(args)
    title = heading(args, resolve_device(args.device), versions) + more
    if args.processes > 1:
        command = [sys.executable, str(RUNNER), name, *sys.argv[1:], *shared]
        measured = partial(in_processes, args.processes, command)
    return title, publish(args, columns, title, measured)


def heading(args: argparse.Namespace, device: torch.device, versions: Mapping[str, str]) -> str:
    """What a table was measured with, in a line; the load says whether anybody else was at work."""
    load = [f"load {os.getloadavg()[0]:.1f} before"] if hasattr(os, "getloadavg") and device.type == "cpu" else []
    runs = [f"median of {args.processes} processes"] if args.processes > 1 else []
    named = {"torch": torch.__version__, "timm": timm.__version__, **versions}
    parts = [args.model, describe_device(device), args.precision, *(f"{name} {text}" for name, text in named.items())]
    clock = ["processor seconds"] if args.clock == "process" else []
    return ", ".join([*parts, *runs, *clock, *load, datetime.date.today().isoformat()])
