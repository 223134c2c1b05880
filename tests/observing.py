"""An observer for tests: keeps what it is told, stops or fails where it is asked to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tokencut.observers import Observer, TrainingProgress


class Told(NamedTuple):
    """One call of `Observer.progress`."""

    task: str
    done: float
    total: float
    values: dict[str, float]


class Seen(Observer):
    """Keeps what it is told.

    Attributes:
        notes: Notes and warnings.
        told: All calls of `progress`.
        steps: Those of a fine-tune.
        epochs: How many rows the history had after each epoch, and the updates until then.
    """

    def __init__(
        self,
        stop: Callable[[Seen], bool] = lambda seen: False,
        on_step: Callable[[TrainingProgress], None] = lambda now: None,
    ) -> None:
        self.notes: list[str] = []
        self.told: list[Told] = []
        self.steps: list[TrainingProgress] = []
        self.epochs: list[tuple[int, int]] = []
        self._stop = stop
        self._on_step = on_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warning(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, task: str, done: float, total: float, values: Mapping[str, float]) -> None:
        self.told.append(Told(task, done, total, dict(values)))

    def step(self, now: TrainingProgress) -> None:
        self.steps.append(now)
        self._on_step(now)

    def epoch(self, history: list[dict[str, float]]) -> None:
        self.epochs.append((len(history), int(history[-1]["updates"])))

    def should_stop(self) -> bool:
        return self._stop(self)
