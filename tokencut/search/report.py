"""What a search takes and what it reports: the schedules that nothing tried beats."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tokencut.evaluation.statistics import if_known
from tokencut.search.accuracy_drop import METRIC_NAMES, Metric
from tokencut.search.latency_table import LatencyTable
from tokencut.search.space import Counts
from tokencut.search.timing import Conditions, Measured


@dataclass(frozen=True)
class ParetoPoint:
    """One schedule, on the calibration images.

    Attributes:
        layers: The 1-based blocks that reduce.
        keep: The keep rate of each.
        tokens: Image tokens leaving each block of the model.
        gmacs: Multiply-adds of an image, in units of 1e9.
        speedup: Dense time over compressed time, predicted for the machine that searched; None where it was not timed.
        divergence: Mean KL divergence from the dense model's probabilities, in nats; without a head, 1 less the mean
            cosine similarity of the pooled features.
        top1: Percent right; None where labels do not map to the head.
        agreement: Percent with the dense model's top-1; None without a head.
        cosine: Mean cosine similarity of the pooled features, in percent; None with a head.
    """

    layers: Counts
    keep: tuple[float, ...]
    tokens: Counts
    gmacs: float
    speedup: float | None
    divergence: float
    top1: float | None
    agreement: float | None
    cosine: float | None

    @property
    def arguments(self) -> str:
        """What to give `compress` for it, such as `keep=[0.9, 0.7], layers=[2, 5]`."""
        return f"keep={list(self.keep)}, layers={list(self.layers)}" if self.layers else "keep=1"

    def to_dict(self) -> dict[str, Any]:
        """The point for JSON; what is not known is not there."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        values["damage"] = values.pop("divergence")
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class SearchSettings:
    """How a search runs.

    Attributes:
        images: Calibration images to use, an evenly spread sample.
        effort: What it may take, in dense forwards of all of them.
        seed: Decides the order of images and what is tried.
        batch_size: Images a batch.
        timing_batch_size: Images a forward that is timed, for a target of seconds.
        workers: Processes that decode images; one a processor, 4 at most, where None.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
        compile_mode: For a target of seconds, time through `torch.compile` in this mode, such as `default`.
        capture: For a target of seconds, time from CUDA graphs, as `tokencut.capture` runs models.
    """

    images: int = 512
    effort: float = 40.0
    seed: int = 0
    batch_size: int = 64
    timing_batch_size: int = 16
    workers: int | None = None
    device: str | torch.device = "auto"
    precision: str = "fp32"
    compile_mode: str | None = None
    capture: bool = False


@dataclass(frozen=True)
class ClockReport:
    """What a target of seconds was held against.

    Attributes:
        conditions: Device, form, batch size, precision and versions that the times hold for.
        table: What the parts of the model take there, by which schedules were priced: the same table and images give
            the same schedule.
        measured: The schedule beside the dense model, timed at the end; None where the search was interrupted.
    """

    conditions: Conditions
    table: LatencyTable
    measured: Measured | None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        found = {} if self.measured is None else asdict(self.measured)
        return {**asdict(self.conditions), **found, "table": self.table.to_dict()}


@dataclass(frozen=True)
class SearchReport:
    """What a search found; its numbers are from calibration images.

    Attributes:
        target: What was asked for, such as `gmacs=2.6`.
        found: The schedule.
        metric: What a drop is counted in: `top1` on labels, `agreement` with the dense model, or `cosine` similarity.
        drop: Points that the schedule loses on these images; of top-1, by their labels.
        drop_error: The standard error of that, paired over the images; infinite for one image.
        expected_drop: Points to expect on other images, see `accuracy_drop`.
        sure_drop: That with one standard error on top: at most a target's `max_drop`.
        dense_gmacs: Multiply-adds of the dense model, in units of 1e9.
        dense_top1: Percent right, where labels map to the head.
        speedup: The speed-up as measured at the end, where the target is one of seconds.
        images: Calibration images that were used.
        tried: Schedules that ran over all of them.
        seconds: Wall-clock time.
        interrupted: Whether it was told to stop.
        front: The schedules that nothing tried beats, the cheapest first.
        notes: What a user should know.
        clock: Where a target of seconds was measured, and by which table; None for another.
    """

    target: str
    found: ParetoPoint
    metric: Metric
    drop: float
    drop_error: float
    expected_drop: float
    sure_drop: float
    dense_gmacs: float
    dense_top1: float | None
    speedup: float | None
    images: int
    tried: int
    seconds: float
    interrupted: bool
    front: tuple[ParetoPoint, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    clock: ClockReport | None = field(default=None, repr=False)

    @property
    def metric_name(self) -> str:
        """The metric in words."""
        return METRIC_NAMES[self.metric]

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, without the front."""
        values = {name: value for name, value in vars(self).items() if name not in ("found", "front", "notes", "clock")}
        known = {name: if_known(getattr(self, name)) for name in ("drop_error", "sure_drop")}
        clock = {} if self.clock is None else {"clock": self.clock.to_dict()}
        return {**values, **known, "found": self.found.to_dict(), **clock, "notes": list(self.notes)}
