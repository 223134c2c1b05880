"""What a search takes and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tokencut.search.accuracy_drop import METRIC_NAMES, Metric
from tokencut.search_front import FrontPoint


@dataclass(frozen=True)
class SearchSettings:
    """How a search runs.

    Attributes:
        images: Calibration images to use, an evenly spread sample.
        effort: What it may take, in dense forwards of all of them.
        seed: Decides the order of images and what is tried.
        batch_size: Images a batch.
        timing_batch_size: Images a forward that is timed, for a speed-up.
        workers: Processes that decode images; one a processor, 4 at most, where None.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
    """

    images: int = 512
    effort: float = 40.0
    seed: int = 0
    batch_size: int = 64
    timing_batch_size: int = 16
    workers: int | None = None
    device: str | torch.device = "auto"
    precision: str = "fp32"


@dataclass(frozen=True)
class SearchProgress:
    """How far a search is.

    Attributes:
        share: Of its effort, 0 to 1; it may end earlier.
        best: The best schedule at the price it works on; None before there is one.
    """

    share: float
    best: FrontPoint | None


@dataclass(frozen=True)
class SearchReport:
    """What a search found; its numbers are from calibration images.

    Attributes:
        target: What was asked for, as typed.
        found: The schedule.
        metric: What a drop is counted in: `top1` on labels, `agreement` with the dense model, or `cosine` similarity.
        drop: Points that the schedule loses on these images; of top-1, by their labels.
        drop_error: The standard error of that, paired over the images.
        expected_drop: Points to expect on other images, see `accuracy_drop`.
        sure_drop: That with one standard error on top: at most `--max-drop`.
        dense_gmacs: Multiply-adds of the dense model, in units of 1e9.
        dense_top1: Percent right, where labels map to the head.
        speedup: The speed-up as measured at the end, for `--target-speedup`.
        images: Calibration images that were used.
        tried: Schedules that ran over all of them.
        seconds: Wall-clock time.
        interrupted: Whether it was told to stop.
        front: The schedules that nothing tried beats, the cheapest first.
        notes: What a user should know.
    """

    target: str
    found: FrontPoint
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
    front: tuple[FrontPoint, ...] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def metric_name(self) -> str:
        """The metric in words."""
        return METRIC_NAMES[self.metric]

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, without the front."""
        values = {name: value for name, value in vars(self).items() if name not in ("found", "front", "notes")}
        return {**values, "found": self.found.to_dict(), "notes": list(self.notes)}
