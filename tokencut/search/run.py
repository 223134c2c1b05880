"""Finds where and how much to reduce: say what a model may cost, or what it may lose, and get a schedule.

No training. Schedules are compared by what they do to the dense model's own outputs on a few hundred images, at the
price that the closed form (or a table of times measured on this machine) gives each before it runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from tokencut.adapters import adapter_for, plain_model
from tokencut.data.sources import Source, open_source
from tokencut.errors import UsageError
from tokencut.evaluation.statistics import CLEAR, mean_and_error, pareto_front
from tokencut.limits import check_number
from tokencut.methods import methods
from tokencut.model import CompressedModel, compress
from tokencut.models.checkpoints import require_finite
from tokencut.observers import Observer
from tokencut.runtime.compiling import check_form
from tokencut.runtime.devices import enough_memory, inference_state, precision_dtype, resolve_device
from tokencut.schedule import Layers
from tokencut.search.accuracy_drop import DropRate, fit_rate, lost, metric_of
from tokencut.search.calibration import calibration_images
from tokencut.search.clock_space import ClockSpace
from tokencut.search.clock_target import ClockTarget, search_clock
from tokencut.search.latency_table import latency_table
from tokencut.search.local_search import LocalSearch
from tokencut.search.probe import Costs, Outcome, Probe
from tokencut.search.report import ClockReport, ParetoPoint, SearchReport, SearchSettings
from tokencut.search.space import Counts, GridSpace, Price, Space, keeps
from tokencut.search.targets import Target, cheapest, search_drop, search_gmacs, within
from tokencut.search.timing import Bench, Measured


class _StoppedError(Exception):
    """The search was told to stop."""


def find_schedule(
    model: nn.Module,
    calibration: str | os.PathLike[str] | Source,
    target: Target,
    *,
    layers: Layers | None = None,
    method: str | None = None,
    prop_attn: bool | None = None,
    method_options: Mapping[str, Any] | None = None,
    settings: SearchSettings | None = None,
    observer: Observer | None = None,
) -> SearchReport:
    """Finds the schedule that meets a target with the least damage, without training.

    Args:
        model: A timm model of a supported family, with its weights; it stays as it was.
        calibration: Images as `open_source` takes them: never those that accuracy is told of.
        target: What is asked for.
        layers: 1-based numbers of the blocks that may reduce; all where None. Of a hierarchical model, the block of its
            third stage where that begins; any where None.
        method: A method's name; the family's default where None.
        prop_attn: Whether merged tokens weigh by size in later attention; the method's own default where None.
        method_options: Settings of the method, by name.
        settings: How the search runs.
        observer: Told how far it is, and asked whether to stop: then the best so far is returned.

    Returns:
        The report; `compress(model, keep=report.found.keep, layers=report.found.layers, method=...)` is the model.

    Raises:
        UsageError: An argument is out of range, or the method has to be trained first.
        TokencutError: The target cannot be met (the message says what can), or the images cannot be read.
        KeyboardInterrupt: It was told to stop before any schedule met the target.

    Example:
        >>> import tokencut
        >>> from tokencut.models.loading import load_model
        >>> digits = load_model("digits").model
        >>> settings = tokencut.SearchSettings(images=64, effort=5, workers=0, device="cpu")
        >>> dense = tokencut.profile(digits, latency=False).dense.gmacs
        >>> target = tokencut.Target(gmacs=0.6 * dense)
        >>> report = tokencut.find_schedule(digits, "digits", target, settings=settings)
        >>> model = tokencut.compress(digits, keep=report.found.keep, layers=report.found.layers)
        >>> report.found.gmacs <= 0.6 * dense
        True
    """
    chosen, started = settings or SearchSettings(), time.perf_counter()
    target.check()
    if method in methods() and methods()[method].needs_training:
        raise UsageError(f"the stages of method {method} mean nothing before they are trained, so there is nothing to "
                         "search by; type `keep=0.7` instead of a target, or `method='bat'`")  # fmt: skip
    check_number("effort", chosen.effort)
    check_number("images", chosen.images)
    check_number("batch_size", chosen.timing_batch_size)
    check_form(chosen.compile_mode, chosen.capture)
    device, model = resolve_device(chosen.device), plain_model(model)
    require_finite(model)
    adapter = adapter_for(model)
    # Of a hierarchical model one block reduces, and any of them may be the one.
    searched = () if adapter.hierarchical and layers is None else range(1, len(adapter.blocks(model)) + 1)
    reduced = compress(model, keep=1.0, layers=layers or searched or None, method=method, prop_attn=prop_attn,
                       method_options=method_options)  # fmt: skip
    source = open_source(calibration, split="train", observer=observer)
    with inference_state(reduced, device, precision_dtype(chosen.precision)):
        images = calibration_images(reduced, source, limit=chosen.images, batch_size=chosen.batch_size, device=device,
                                    seed=chosen.seed, workers=chosen.workers, observer=observer)  # fmt: skip
        run = _Run(reduced, target, chosen, device, observer or Observer(), layers)
        run.seek(images.batches, images.targets)
        return run.report(images.notes, time.perf_counter() - started)


class _Asking(Observer):
    """Passes on how far a search is, with the best schedule so far, and ends it where it is to stop."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.best: dict[str, float] = {}

    def progress(self, task: str, done: float, total: float, values: Mapping[str, float]) -> None:
        if self.observer.should_stop():
            raise _StoppedError
        self.observer.progress(task, done, total, {**values, **self.best})


class _Run:
    """One search: what it has tried, and how that becomes a report."""

    def __init__(
        self, model: CompressedModel, target: Target, settings: SearchSettings, device: torch.device,
        observer: Observer, layers: Layers | None,
    ) -> None:  # fmt: skip
        self.model = model
        self.layers = None if layers is None else tuple(model.recipe.layers)
        self.tokens_out = model.possible_counts() or model.method.tokens_out
        self.target = target
        self.settings = settings
        self.device = device
        self.observer = _Asking(observer)
        self.searcher: LocalSearch | None = None
        self.clock: ClockTarget | None = None
        self.bench: Bench | None = None
        self.counts: Counts | None = None
        self.measured: Measured | None = None
        self.interrupted = False
        self.costs = Costs(model)

    def seek(self, batches: tuple[torch.Tensor, ...], targets: torch.Tensor | None) -> None:
        """Searches until the target is met or somebody says stop."""
        try:
            if self.target.by_clock:
                self.clock = self._clock()
            probe = Probe(self.model, batches, targets, self._on_batch)
            self.searcher = LocalSearch(probe, self._space(), self.settings.seed, self._on_best)
            self.counts = self._sought(self.searcher, self.settings.effort * probe.passes)
        except _StoppedError:
            self.interrupted = True
            self.counts = None if self.searcher is None else self._so_far(self.searcher)
            if self.counts is None:
                raise KeyboardInterrupt from None

    def _clock(self) -> ClockTarget:
        """The target of seconds, by a table that is measured now."""
        settings, size = self.settings, self.settings.timing_batch_size
        smaller = f"type `timing_batch_size={size // 2}`" if size > 1 else "take a smaller model or `device='cpu'`"
        with enough_memory(size, self.device, smaller):
            self.bench = Bench(
                self.model, batch_size=size, device=self.device, precision=settings.precision,
                compile_mode=settings.compile_mode, capture=settings.capture,
            )  # fmt: skip
            table = latency_table(self.model, self.bench, observer=self.observer)
        waits = self.device.type == "cuda" and self.bench.conditions.form == "eager"
        larger = "a larger `timing_batch_size`"
        return ClockTarget(self.target, table, f"`capture=True`, or {larger}" if waits else larger)

    def _space(self) -> Space:
        shape, blocks = self.costs.shape, tuple(self.model.recipe.layers)
        # In whole steps of tokens there are few schedules, and the same ones come again and again.
        price: Price = self.costs.gmacs if self.clock is None else cache(self.clock.table.seconds)
        if self.model.adapter.hierarchical:
            blocks = self.layers or tuple(range(1, len(shape.blocks) + 1))
            return GridSpace(shape.patches, len(shape.blocks), blocks, price, self.tokens_out, shape.leaving)
        within = (shape.patches, len(shape.blocks), blocks, price, self.model.method.tokens_out)
        if self.clock is None:
            return Space(*within)
        prefix = self.model.adapter.num_prefix_tokens(self.model.model)
        return ClockSpace(*within, step=self.clock.table.step, prefix=prefix)

    def _sought(self, searcher: LocalSearch, effort: float) -> Counts:
        if self.target.gmacs is not None:
            return search_gmacs(searcher, self.target.gmacs, effort)
        if self.target.max_drop is not None:
            return search_drop(searcher, self.target.max_drop, effort)
        assert self.clock is not None
        counts, self.measured = search_clock(searcher, self.clock, effort, self._timed)
        return counts

    def _so_far(self, searcher: LocalSearch) -> Counts | None:
        if self.target.max_drop is not None:
            return cheapest(searcher, self.target.max_drop)
        if self.clock is not None:
            return within(searcher, self.clock.seconds)
        return within(searcher, self.target.gmacs or 0.0)

    def _on_batch(self) -> None:
        probe, effort = None if self.searcher is None else self.searcher.probe, float(self.settings.effort)
        done = 0.0 if probe is None else min(effort, probe.spent / probe.passes)
        self.observer.progress("trying schedules", done, effort, {})

    def _on_best(self, counts: Counts, outcome: Outcome) -> None:
        best = self._point(counts, outcome)
        agreement = {} if best.agreement is None else {"agreement": best.agreement}
        self.observer.best = {"gmacs": best.gmacs, "divergence": best.divergence, **agreement}

    def _timed(self, counts: Counts) -> Measured:
        """A schedule's time, dense and compressed in turn."""
        assert self.bench is not None
        layers, keep = keeps(self.costs.shape.patches, counts, self.tokens_out)
        recipe = self.model.recipe
        made = compress(self.model.model, keep=keep, layers=layers, method=recipe.method, prop_attn=recipe.prop_attn,
                        method_options=recipe.method_options).eval()  # fmt: skip
        return self.bench.beside_dense(made, self.observer)

    def _point(self, counts: Counts, outcome: Outcome) -> ParetoPoint:
        layers, keep = keeps(self.costs.shape.patches, counts, self.tokens_out)
        return ParetoPoint(
            layers=layers,
            keep=keep,
            tokens=counts,
            gmacs=self.costs.gmacs(counts),
            speedup=None if self.clock is None else self.clock.table.speedup(counts),
            divergence=outcome.mean,
            top1=None if outcome.right is None else _percent(outcome.right),
            agreement=None if outcome.agrees is None else _percent(outcome.agrees),
            cosine=None if outcome.agrees is not None else 100 * (1 - outcome.mean),
        )

    def report(self, notes: tuple[str, ...], seconds: float) -> SearchReport:
        """What was found."""
        assert self.searcher is not None and self.counts is not None
        tried, dense, space = self.searcher.tried, self.searcher.probe.dense, self.searcher.space
        points = {counts: self._point(counts, outcome) for counts, outcome in tried.items()}
        front = tuple(
            pareto_front(points.values(), cost=lambda point: point.gmacs, gain=lambda point: -point.divergence)
        )
        outcome, found = tried[self.counts], points[self.counts]
        rate = self._rate(front)
        drop, drop_error = mean_and_error(lost(outcome, dense))
        return SearchReport(
            target=str(self.target),
            found=found,
            metric=metric_of(dense),
            drop=drop,
            drop_error=drop_error,
            expected_drop=rate.expected(outcome.mean),
            sure_drop=rate.bound(outcome.mean),
            dense_gmacs=self.costs.gmacs(space.dense),
            dense_top1=None if dense.right is None else _percent(dense.right),
            speedup=None if self.measured is None else self.measured.speedup,
            images=self.searcher.probe.images,
            tried=len(tried),
            seconds=seconds,
            interrupted=self.interrupted,
            front=front,
            notes=(*notes, *self._clock_notes(), *memorisation_note(drop, drop_error, rate.bound(outcome.mean))),
            clock=self._clock_report(),
        )

    def _clock_report(self) -> ClockReport | None:
        if self.clock is None or self.bench is None:
            return None
        return ClockReport(self.bench.conditions, self.clock.table, self.measured)

    def _clock_notes(self) -> tuple[str, ...]:
        """What has to be said of the form, and of times that the machine does not show."""
        if self.clock is None or self.bench is None:
            return ()
        miss = None if self.measured is None else self.clock.miss(self.measured)
        return (*self.bench.notes, *(() if miss is None else (miss,)))

    def _rate(self, front: tuple[ParetoPoint, ...]) -> DropRate:
        assert self.searcher is not None
        return fit_rate([self.searcher.tried[point.tokens] for point in front], self.searcher.probe.dense)


def _percent(values: torch.Tensor) -> float:
    return 100 * float(values.double().mean())


def memorisation_note(drop: float, error: float, sure: float) -> tuple[str, ...]:
    """What has to be said where labels tell of a clearly larger loss than is expected on other images.

    Args:
        drop: Points lost by the labels of the calibration images.
        error: The standard error of that.
        sure: Points that are expected, with a standard error.
    """
    if drop - CLEAR * error <= sure:
        return ()
    return (
        f"calibration labels tell of {drop:.2f} ± {error:.2f} points lost where {sure:.2f} are expected on other "
        "images; a model knows images that it was trained on by heart: judge it by others, with tokencut eval",
    )
