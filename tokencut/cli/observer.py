"""What commands do with what the library tells: notes become lines on stderr, progress one that moves."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tokencut.cli import render
from tokencut.cli.process import StopRequest
from tokencut.observers import Observer

if TYPE_CHECKING:
    from tokencut.data.sources import Source


class CommandObserver(Observer):
    """Prints notes, and shows how far it is where there is a place for that.

    Attributes:
        stop: Says whether to stop.
        values: How what is running stands, as it was told last.
    """

    def __init__(self, advance: render.Advance | None = None) -> None:
        """Prepares to listen.

        Args:
            advance: Shows how far it is, as `render.progress` gives it.
        """
        self.stop: StopRequest | None = None
        self.values: Mapping[str, float] = {}
        self._advance = advance

    def note(self, text: str) -> None:
        render.note(text)

    def warning(self, text: str) -> None:
        render.note(text)

    def progress(self, task: str, done: float, total: float, values: Mapping[str, float]) -> None:
        self.values = values
        if self._advance is not None:
            self._advance(task, done, total, standing(values), values.get("seconds_left"))

    def should_stop(self) -> bool:
        return self.stop is not None and self.stop.requested


@contextmanager
def watched(title: str) -> Iterator[CommandObserver]:
    """A line that shows how far it is, while something takes long.

    Args:
        title: What is going on, until it is told more exactly.

    Yields:
        What is to be told.
    """
    with render.progress(title) as advance:
        yield CommandObserver(advance)


def opened(data: str | os.PathLike[str], **how: Any) -> Source:
    """Images as `open_source` opens them, which may unpack an archive first."""
    from tokencut.data.sources import open_source

    with watched(f"opening {data}") as observer:
        return open_source(data, observer=observer, **how)


def standing(values: Mapping[str, float]) -> tuple[str, ...]:
    """How a task stands in words, such as `72.10 % top-1` and `512 images/s`, the most important first."""
    worded = {
        "gmacs": lambda gmacs: f"best {render.gmacs_text(gmacs)} GMACs",
        "divergence": lambda divergence: f"damage {divergence:.4g}",
        "agreement": lambda percent: f"{percent:.1f} % agree with dense",
        "epoch": lambda number: f"epoch {number:.0f}",
        "loss": lambda loss: f"loss {loss:.4f}",
        "top1": lambda percent: f"{percent:.2f} % top-1",
        "rows_left": lambda rows: f"{rows:.0f} row{'s' if rows != 1 else ''} left",
        "images_per_second": lambda rate: f"{rate:.0f} images/s",
    }
    return tuple(word(values[name]) for name, word in worded.items() if name in values)
