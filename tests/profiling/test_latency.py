"""Timing, with a clock that the models under test move: no figure here depends on the machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from observing import Seen
from torch import Tensor, nn

from tokencut.errors import UsageError
from tokencut.profiling import latency
from tokencut.profiling.latency import (
    CudaClock,
    Timing,
    WallClock,
    clock_for,
    measure,
    quartiles,
    share_of_time,
    speedup,
)

IMAGES = torch.zeros(4, 3, 2, 2)


class FakeClock:
    """Time passes only where somebody lets it pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start


class Worker(nn.Module):
    """A model whose forwards take the seconds it is given, the last of them for ever; it logs its name."""

    def __init__(self, clock: FakeClock, *seconds: float, name: str = "", log: list[str] | None = None) -> None:
        super().__init__()
        self.clock, self.remaining, self.name, self.log = clock, list(seconds), name, [] if log is None else log

    def forward(self, images: Tensor) -> Tensor:
        self.clock.now += self.remaining.pop(0) if len(self.remaining) > 1 else self.remaining[0]
        self.log.append(self.name)
        return images


def test_models_alternate() -> None:
    clock, log = FakeClock(), list[str]()
    models = {name: Worker(clock, 1.0, name=name, log=log) for name in ("dense", "compressed")}
    measure(models, IMAGES, rounds=4, max_seconds=1e9, clock=clock)
    assert log[-8:] == ["dense", "compressed"] * 4


def test_median_quartiles_and_throughput() -> None:
    clock = FakeClock()
    # Two forwards and five rounds warm it up, and are in none of the figures.
    timing = measure({"it": Worker(clock, 100.0, 9.0, *[9.0] * 5, 5.0, 1.0, 2.0, 4.0, 3.0)}, IMAGES, rounds=5,
                     max_seconds=1e9, clock=clock)["it"]  # fmt: skip
    assert timing.samples == (5.0, 1.0, 2.0, 4.0, 3.0)
    assert timing.median_ms == 3000.0
    assert timing.spread_ms == (2000.0, 4000.0)
    assert timing.images_per_second == 4 / 3
    assert timing.relative_spread == pytest.approx(2 / 3)
    assert timing.peak_memory_mib is None


def test_short_forwards_are_timed_several_at_once() -> None:
    clock, log = FakeClock(), list[str]()
    short, long = Worker(clock, 0.25, name="short", log=log), Worker(clock, 1.0, name="long", log=log)
    timings = measure({"short": short, "long": long}, IMAGES, rounds=3, min_seconds=1.0, max_seconds=1e9, clock=clock)
    assert log[-5:] == ["short"] * 4 + ["long"]
    assert timings["short"].median_ms == 250.0
    assert timings["long"].median_ms == 1000.0


@pytest.mark.parametrize(("max_seconds", "expected"), [(0.0, 3), (6.0, 4), (1e9, 7)])
def test_rounds_end_when_the_time_is_up_but_never_before_the_third(max_seconds: float, expected: int) -> None:
    clock, seen = FakeClock(), Seen()
    timing = measure({"it": Worker(clock, 1.0)}, IMAGES, rounds=7, max_seconds=max_seconds, clock=clock,
                     observer=seen, task="timing it")["it"]  # fmt: skip
    assert len(timing.samples) == len(seen.told) == expected
    assert seen.told[:2] == [("timing it", 1, 7, {}), ("timing it", 2, 7, {})]
    assert seen.told[-1] == ("timing it", 7, 7, {})


@pytest.mark.parametrize(
    ("seconds", "max_seconds", "warm_rounds"),
    [
        ([2.0], 1e9, 5),  # as fast as at first, four times
        ([5.0, 4.0, 3.0, 3.0, 2.99], 1e9, 7),  # four rounds behind the last that was faster
        ([5.0, *[5.0 * 0.993**step for step in range(1, 60)]], 1e9, 20),  # little by little
        ([2.0], 14.0, 0),  # a quarter of the time is gone: two forwards of two models
        ([2.0], 36.0, 1),
    ],
)
def test_rounds_do_not_count_until_times_have_settled(
    seconds: list[float], max_seconds: float, warm_rounds: int
) -> None:
    clock, log = FakeClock(), list[str]()
    settling = Worker(clock, 100.0 if len(seconds) > 1 else 2.0, seconds[0], *seconds, name="settling", log=log)
    steady = Worker(clock, 2.0, name="steady", log=log)
    timing = measure({"settling": settling, "steady": steady}, IMAGES, rounds=20, max_seconds=max_seconds, clock=clock)
    assert (log.count("steady"), log.count("settling")) == (2 + warm_rounds + len(timing["steady"].samples),) * 2
    assert max(timing["settling"].samples) == pytest.approx(seconds[min(warm_rounds, len(seconds) - 1)])


def test_too_few_rounds() -> None:
    with pytest.raises(UsageError, match="^`rounds=2` is not a whole number from 3 to 10000; type `rounds=21`$"):
        measure({"it": Worker(FakeClock(), 1.0)}, IMAGES, rounds=2)


def test_no_gradients_are_kept_while_timing() -> None:
    enabled = []

    def forward(images: Tensor) -> None:
        enabled.append(torch.is_grad_enabled())

    measure({"it": forward}, IMAGES, rounds=3, min_seconds=0.0)
    share_of_time(forward, [], IMAGES, rounds=1)
    assert set(enabled) == {False}
    assert torch.is_grad_enabled()


def test_quartiles_by_hand() -> None:
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 4.0)


def test_speedup_is_of_the_medians_and_its_spread_of_the_rounds() -> None:
    # The machine slows down by half on the way: medians and rounds agree all the same.
    slow = Timing(3000.0, (2000.0, 4000.0), 1.0, samples=(2.0, 3.0, 4.0))
    fast = Timing(1500.0, (1000.0, 2000.0), 2.0, samples=(1.0, 1.5, 2.0))
    assert speedup(slow, fast) == (2.0, (2.0, 2.0))
    uneven = Timing(1500.0, (1000.0, 2000.0), 2.0, samples=(1.0, 1.5, 4.0))
    assert speedup(slow, uneven) == (2.0, (1.5, 2.0))


class Whole(nn.Module):
    """Two parts with work around them."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.first, self.second = Worker(clock, 1.0), Worker(clock, 2.0)
        self.rest = Worker(clock, 3.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.rest(self.second(self.rest(self.first(images))))


def test_share_of_time_in_some_modules() -> None:
    clock = FakeClock()
    whole = Whole(clock)
    share = share_of_time(whole, [whole.first, whole.second], IMAGES, clock=clock, max_seconds=1e9)
    assert share == pytest.approx((1 + 2) / (1 + 3 + 2 + 3))
    assert len(whole.first.log) == 1 + 7  # one to warm up


def test_share_of_time_takes_one_forward_of_a_slow_model() -> None:
    clock = FakeClock()
    whole = Whole(clock)
    share_of_time(whole, [whole.first], IMAGES, clock=clock, max_seconds=1.0)
    assert len(whole.first.log) == 1 + 1


def test_share_of_time_of_no_modules_is_zero() -> None:
    clock = FakeClock()
    assert share_of_time(Whole(clock), [], IMAGES, clock=clock) == 0.0


def test_hooks_go_even_when_a_forward_fails() -> None:
    clock = FakeClock()
    whole = Whole(clock)

    def fail(images: Tensor) -> None:
        whole(images)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        share_of_time(fail, [whole.first], IMAGES, clock=clock)
    assert not whole.first._forward_pre_hooks
    assert not whole.first._forward_hooks


def test_clock_of_the_processor() -> None:
    clock = clock_for(torch.device("cpu"))
    assert isinstance(clock, WallClock)
    start = clock.mark()
    assert clock.seconds(start, clock.mark()) >= 0


def test_clock_of_another_device_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append("waited"))
    clock_for(torch.device("mps")).mark()
    assert waits == ["waited"]


def test_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The marks are events on the device's own stream, and nobody waits before the times are asked for."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            calls.append(f"record on {stream}")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    clock = clock_for(torch.device("cuda:1"))
    assert isinstance(clock, CudaClock)
    start, end = clock.mark(), clock.mark()
    assert calls == ["record on the stream of cuda:1"] * 2
    assert clock.seconds(start, end) == 1.5
    assert calls[2:] == ["wait"]


@pytest.mark.gpu
def test_timing_and_memory_on_a_gpu() -> None:
    layer = nn.Linear(256, 256, device="cuda")
    timing = measure({"it": layer}, torch.zeros(1024, 256, device="cuda"), rounds=3, min_seconds=0.001)["it"]
    assert min(timing.samples) > 0
    # At least the weights, what goes in and what comes out, in fp32.
    assert timing.peak_memory_mib is not None
    assert timing.peak_memory_mib >= (256 * 256 + 2 * 1024 * 256) * 4 / 2**20


def test_defaults_end_in_fair_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 0.1 s a forward is profiled in 15 s: two of them alternating, and the share of its parts."""
    clock = FakeClock()
    monkeypatch.setattr(latency, "clock_for", lambda device: clock)
    whole: Callable[[Tensor], object] = Worker(clock, 0.1)
    measure({"dense": whole, "compressed": whole}, IMAGES)
    share_of_time(whole, [], IMAGES)
    assert clock.now < 15
