"""What numbers may be: one table for the library's arguments and the command line's options, and one check.

Upper bounds are far above what is of use, and far below what would never end or fill a memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokencut.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """What a number may be.

    Attributes:
        low: The smallest.
        high: The largest.
        example: One that is of use.
        whole: Whether parts are refused.
        open: Whether `low` itself is too small.
    """

    low: float
    high: float
    example: float
    whole: bool = False
    open: bool = False

    def allow(self, value: Any) -> bool:
        """Whether a value is such a number; neither nan nor an infinity is."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return self.low <= value <= self.high and not (self.open and value == self.low) and (
            not self.whole or value == int(value)
        )  # fmt: skip

    @property
    def expected(self) -> str:
        """In words, such as `a whole number from 1 to 65536`."""
        kind = "a whole number" if self.whole else "a number"
        low, high = (str(bound) if isinstance(bound, int) else f"{bound:g}" for bound in (self.low, self.high))
        return f"{kind} above {low} and up to {high}" if self.open else f"{kind} from {low} to {high}"


def _whole(low: int, high: int, example: int) -> Limits:
    return Limits(low, high, example, whole=True)


_SHARE = Limits(0, 1, 0.1)

LIMITS: Mapping[str, Limits] = {
    "accumulate": _whole(1, 65_536, 1),
    "batch_size": _whole(1, 65_536, 64),
    "depth": _whole(1, 128, 12),
    "effort": Limits(0, 10_000, 40, open=True),
    "frame_stride": _whole(1, 10_000, 4),
    "frames": _whole(1, 1_024, 16),
    "images": _whole(1, 10**9, 512),
    "img_size": _whole(1, 4_096, 224),
    "levels": _whole(1, 14, 4),
    "limit": _whole(1, 10**9, 1000),
    "max_graphs": _whole(1, 1_024, 8),
    "num_classes": _whole(0, 10**6, 1000),
    "opset": _whole(18, 22, 20),
    "reduce_by": _whole(1, 65_536, 13),
    "rounds": _whole(3, 10_000, 21),
    "seed": _whole(-(2**63), 2**63 - 1, 0),
    "top": _whole(1, 10**6, 5),
    "views": _whole(1, 100, 5),
    "workers": _whole(0, 1_024, 0),
    # Points of top-1 that quantised weights may cost.
    "allow_drop": Limits(0, 100, 2.0),
    "static_keep": Limits(0, 1, 0.5, open=True),
    # What a search is to reach.
    "gmacs": Limits(0, 10**6, 2.6, open=True),
    "latency_ms": Limits(0, 10**7, 20, open=True),
    "max_drop": Limits(0, 100, 0.5, open=True),
    "speedup": Limits(1, 1_000, 1.6, open=True),
    # How images are prepared.
    "crop_pct": Limits(0.05, 2, 0.9),
    "mean": Limits(-1, 2, 0.5),
    "std": Limits(0.001, 1_000, 0.5),
    # How a model is fine-tuned; the examples are those of the recipe `short`, but where that has none.
    "alpha": Limits(0, 1_000, 0.0),
    "beta": Limits(0, 1_000, 0.0),
    "clip_grad": Limits(0, 10**6, 1.0),
    "color_jitter": Limits(0, 1, 0.3),
    "crop_scale": Limits(0.01, 1, 0.67),
    "cutmix": Limits(0, 100, 1.0),
    "distill_weight": Limits(0, 1, 0.5),
    "ema_decay": Limits(0, 1, 0.999),
    "epochs": _whole(1, 100_000, 5),
    "hflip": Limits(0, 1, 0.5),
    "keep_warmup": Limits(0, 100_000, 1.0),
    "label_smoothing": _SHARE,
    "layer_decay": Limits(0.001, 1, 0.75),
    "lr": Limits(1e-12, 10, 5e-5),
    "lr_batch": _whole(1, 10**6, 256),
    "min_lr": Limits(0, 1, 0.05),
    "mixup": Limits(0, 100, 0.8),
    "random_erasing": Limits(0, 1, 0.25),
    "temperature": Limits(0.001, 1_000, 1.0),
    "warmup_epochs": Limits(0, 100_000, 1.0),
    "weight_decay": Limits(0, 100, 0.05),
}


def check_number(name: str, value: Any) -> None:
    """Refuses an argument that is no number that it may be.

    Args:
        name: The argument, as `LIMITS` has it.
        value: What was given for it.

    Raises:
        UsageError: Saying what it may be.
    """
    limits = LIMITS[name]
    if not limits.allow(value):
        raise UsageError(f"`{name}={value!r}` is not {limits.expected}; type `{name}={limits.example}`")
