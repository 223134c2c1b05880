"""What a search has tried: the schedules that nothing tried beats, ready to be typed, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tokencut.files import atomic_write
from tokencut.search.space import Counts


@dataclass(frozen=True)
class FrontPoint:
    """One schedule, on the calibration images.

    Attributes:
        layers: The 1-based blocks that reduce.
        keep: The keep rate of each.
        tokens: Image tokens leaving each block of the model.
        gmacs: Multiply-adds of an image, in units of 1e9.
        speedup: Dense time over compressed time, predicted for the machine that searched; None where it was not timed.
        damage: Mean KL divergence from the dense model's probabilities, in nats; without a head, 1 less the mean cosine
            similarity of the pooled features.
        top1: Percent right; None where labels do not map to the head.
        agreement: Percent with the dense model's top-1; None without a head.
        cosine: Mean cosine similarity of the pooled features, in percent; None with a head.
    """

    layers: Counts
    keep: tuple[float, ...]
    tokens: Counts
    gmacs: float
    speedup: float | None
    damage: float
    top1: float | None
    agreement: float | None
    cosine: float | None

    @property
    def options(self) -> str:
        """What to type for it, such as `--keep 0.9/0.7 --layers 2,5`."""
        if not self.layers:
            return "--keep 1"
        return f"--keep {'/'.join(map(repr, self.keep))} --layers {','.join(map(str, self.layers))}"

    def to_dict(self) -> dict[str, Any]:
        """The point for JSON; what is not known is not there."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**{name: value for name, value in values.items() if value is not None}, "options": self.options}


def front_of(points: Iterable[FrontPoint]) -> tuple[FrontPoint, ...]:
    """The points that no cheaper or equally dear one beats, the cheapest first."""
    front: list[FrontPoint] = []
    for point in sorted(points, key=lambda point: (point.gmacs, point.damage)):
        # Dearer points stand behind: one that does more damage than a cheaper one is beaten.
        if not front or point.damage < front[-1].damage:
            front.append(point)
    return tuple(front)


def write_front(path: str | os.PathLike[str], front: Iterable[FrontPoint], about: dict[str, Any]) -> None:
    """Writes a front as JSON, all of it or nothing.

    Args:
        path: The file, replaced if it exists.
        front: The points, the cheapest first.
        about: What else stands in it: model, method, images, target.

    Raises:
        ArtifactError: It cannot be written.
    """
    with atomic_write(path) as temporary:
        text = json.dumps({**about, "front": [point.to_dict() for point in front]}, indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
