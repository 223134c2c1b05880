"""What commands do with what the library tells: notes become lines on stderr, progress becomes a bar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tokencut.cli import render
from tokencut.cli.process import StopRequest
from tokencut.observers import Observer


class CommandObserver(Observer):
    """Prints notes, and moves a bar where there is one."""

    def __init__(self, advance: render.Advance | None = None, stop: StopRequest | None = None) -> None:
        """Prepares to listen.

        Args:
            advance: Moves the bar, as `render.progress` gives it.
            stop: Says whether to stop.
        """
        self._advance = advance
        self._stop = stop

    def note(self, text: str) -> None:
        render.note(text)

    def warning(self, text: str) -> None:
        render.note(text)

    def progress(self, task: str, done: float, total: float, values: Mapping[str, float]) -> None:
        if self._advance is not None:
            self._advance(task, done, total, standing(values))

    def should_stop(self) -> bool:
        return self._stop is not None and self._stop.requested


@contextmanager
def watched(title: str, stop: StopRequest | None = None) -> Iterator[CommandObserver]:
    """A bar for what takes long.

    Args:
        title: What is going on, until it is told more exactly.
        stop: Says whether to stop.

    Yields:
        What moves it.
    """
    with render.progress(title) as advance:
        yield CommandObserver(advance, stop)


def standing(values: Mapping[str, float]) -> str:
    """How a task stands in words, such as `72.10 % top-1, 512 images/s`."""
    worded = {
        "gmacs": lambda gmacs: f"best: {render.gmacs_text(gmacs)} GMACs",
        "divergence": lambda divergence: f"damage {divergence:.4g}",
        "agreement": lambda percent: f"{percent:.1f} % agree with dense",
        "top1": lambda percent: f"{percent:.2f} % top-1",
        "rows_left": lambda rows: f"{rows} row{'s' if rows != 1 else ''} left",
        "images_per_second": lambda rate: f"{rate:.0f} images/s",
    }
    return ", ".join(word(values[name]) for name, word in worded.items() if name in values)
