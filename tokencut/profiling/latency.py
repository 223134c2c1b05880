"""How long forwards take: several models in turn, in one process, so that all see the same machine.

A machine's speed drifts (clock, heat, neighbours) by more than what is to be measured. So models alternate in short
samples, and medians are compared, with their quartiles as spread.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokencut.limits import check_number
from tokencut.observers import Observer
from tokencut.profiling.memory import peak_memory

Forward = Callable[[Tensor], object]

# Quartiles of fewer say nothing.
MIN_ROUNDS = 3
# Times have settled when so many rounds in a row have made no model faster by such a share. The first half second of
# small batches on an H200 took up to 1.8 times as long as what followed.
CALM_ROUNDS, FASTER = 4, 0.02


class Clock(Protocol):
    """Marks points in the work given to a device, and says how far apart they were."""

    def mark(self) -> Any:
        """A point in time, after all work given to the device so far."""

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks."""


class WallClock:
    """The processor's clock, for devices that work while they are called; `wait` makes others finish first."""

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self.wait = wait

    def mark(self) -> float:
        if self.wait is not None:
            self.wait()
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """The GPU's own clock, by events between its kernels: marking a point does not make anybody wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


def clock_for(device: torch.device) -> Clock:
    """The clock that fits a device."""
    if device.type == "cuda":
        return CudaClock(device)
    return WallClock(torch.mps.synchronize if device.type == "mps" else None)


@dataclass(frozen=True)
class Timing:
    """How long a forward of one batch took.

    Attributes:
        median_ms: The median over rounds, in milliseconds.
        spread_ms: The quartiles around it, in milliseconds: half of the rounds lie between.
        images_per_second: The batch over the median.
        peak_memory_mib: Memory held at the peak of a forward, weights included, in MiB; None where the device does not
            tell.
        samples: Seconds per forward, one a round, in the order of the rounds.
    """

    median_ms: float
    spread_ms: tuple[float, float]
    images_per_second: float
    peak_memory_mib: float | None = None
    samples: tuple[float, ...] = field(default=(), repr=False)

    @property
    def relative_spread(self) -> float:
        """How far apart the quartiles are, as a share of the median."""
        return (self.spread_ms[1] - self.spread_ms[0]) / self.median_ms


def measure(
    models: Mapping[str, Forward],
    images: Tensor,
    *,
    rounds: int = 21,
    min_seconds: float = 0.05,
    max_seconds: float = 10.0,
    clock: Clock | None = None,
    observer: Observer | None = None,
    task: str = "timing",
) -> dict[str, Timing]:
    """Times models in turn: the first, the second, ..., the first again.

    Args:
        models: What to call, by name; in the mode and precision in which they are to be timed.
        images: A batch `(B, C, H, W)`, on the models' device.
        rounds: How many samples of each model to take, at least 3.
        min_seconds: A sample is made of so many forwards that it takes about this long: a single short forward would
            time the call more than the work.
        max_seconds: After so much time, warm-up included, no new round is begun, save that 3 are always made. Up to a
            quarter of it goes into rounds that do not count, until times have settled.
        clock: What tells the time; by default the device's own.
        observer: Told rounds done and rounds in all.
        task: What it is told that this is.

    Returns:
        The timings, by name.

    Raises:
        UsageError: Too few rounds.
    """
    check_number("rounds", rounds)
    clock, told = clock or clock_for(images.device), observer or Observer()
    started = clock.mark()
    with torch.no_grad():
        repeats = {name: _warm_up(forward, images, min_seconds, clock) for name, forward in models.items()}
        memory = {name: peak_memory(forward, images) for name, forward in models.items()}

        def one_round() -> dict[str, float]:
            return {name: _time(forward, images, repeats[name], clock) / repeats[name]
                    for name, forward in models.items()}  # fmt: skip

        _settle(one_round, rounds, lambda: clock.seconds(started, clock.mark()) < max_seconds / 4)
        samples: dict[str, list[float]] = {name: [] for name in models}
        for done in range(1, rounds + 1):
            for name, seconds in one_round().items():
                samples[name].append(seconds)
            enough = done >= MIN_ROUNDS and clock.seconds(started, clock.mark()) >= max_seconds
            told.progress(task, rounds if enough else done, rounds, {})
            if enough:
                break
    return {name: _timing(taken, images.shape[0], memory[name]) for name, taken in samples.items()}


def _warm_up(forward: Forward, images: Tensor, min_seconds: float, clock: Clock) -> int:
    """Runs a model until it is in its stride; returns how many forwards make a sample."""
    _time(forward, images, 1, clock)  # loads kernels and fills caches: says nothing of what follows
    count, spent = 0, 0.0
    while count == 0 or spent < min_seconds:
        count, spent = count + 1, spent + max(_time(forward, images, 1, clock), 1e-6)
    return max(1, math.ceil(min_seconds * count / spent))


def _settle(one_round: Callable[[], Mapping[str, float]], most: int, has_time: Callable[[], bool]) -> None:
    """Makes rounds until no model gets faster any more, at most so many and while there is time."""
    fastest: dict[str, float] = {}
    calm = 0
    for _ in range(most):
        if calm == CALM_ROUNDS or not has_time():
            return
        faster = {name: seconds for name, seconds in one_round().items()
                  if seconds < (1 - FASTER) * fastest.get(name, math.inf)}  # fmt: skip
        fastest |= faster
        calm = 0 if faster else calm + 1


def _time(forward: Forward, images: Tensor, repeats: int, clock: Clock) -> float:
    start = clock.mark()
    for _ in range(repeats):
        forward(images)
    return clock.seconds(start, clock.mark())


def _timing(samples: list[float], batch: int, memory: float | None) -> Timing:
    middle = statistics.median(samples)
    low, high = quartiles(samples)
    return Timing(1000 * middle, (1000 * low, 1000 * high), batch / middle, memory, tuple(samples))


def quartiles(values: Iterable[float]) -> tuple[float, float]:
    """The values that a quarter of all lies below, and above."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def speedup(slow: Timing, fast: Timing) -> tuple[float, tuple[float, float]]:
    """How many times as fast one model is as another timed beside it.

    Returns:
        The ratio of the medians, and the quartiles of the ratio round by round, from which drift cancels.
    """
    ratios = [before / after for before, after in zip(slow.samples, fast.samples, strict=True)]
    return slow.median_ms / fast.median_ms, quartiles(ratios)


def share_of_time(
    forward: Forward,
    parts: Iterable[nn.Module],
    images: Tensor,
    *,
    rounds: int = 7,
    max_seconds: float = 3.0,
    clock: Clock | None = None,
) -> float:
    """The share of a forward's time that is spent inside some of its modules.

    Measured by hooks, in rounds of their own: the hooks' time, some microseconds each, must not be in other figures.

    Args:
        forward: What to call; it calls the modules.
        parts: The modules, none inside another.
        images: A batch `(B, C, H, W)`, on the model's device.
        rounds: How many forwards to take the median of.
        max_seconds: After so much time no further forward is begun.
        clock: What tells the time; by default the device's own.

    Returns:
        A share, 0 to 1.
    """
    clock = clock or clock_for(images.device)
    shares: list[float] = []
    with _marks_around(parts, clock) as marks, torch.no_grad():
        started = clock.mark()
        forward(images)
        while len(shares) < rounds and (not shares or clock.seconds(started, clock.mark()) < max_seconds):
            marks.clear()
            whole = _time(forward, images, 1, clock)
            inside = sum(clock.seconds(start, end) for start, end in zip(marks[::2], marks[1::2], strict=True))
            shares.append(inside / whole)
    return statistics.median(shares)


@contextlib.contextmanager
def _marks_around(parts: Iterable[nn.Module], clock: Clock) -> Iterator[list[Any]]:
    """For a while a list that gets a mark whenever one of the modules begins and another when it ends."""
    marks: list[Any] = []
    with contextlib.ExitStack() as hooks:
        for part in parts:
            hooks.callback(part.register_forward_pre_hook(lambda *_: marks.append(clock.mark())).remove)
            hooks.callback(part.register_forward_hook(lambda *_: marks.append(clock.mark())).remove)
        yield marks
