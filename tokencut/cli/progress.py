"""How a long task stands: what is running, how much of it is done, how long it still takes; in one line that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A bar is not drawn shorter than this, nor longer, in columns.
SHORTEST_BAR, LONGEST_BAR = 8, 30
# Of a task's name at least so many characters are shown; a longer one is cut where words want the room.
SHORTEST_NAME, LONG_NAME = 12, 24
GAP = "  "
# Where nothing can be drawn a line is printed after so many seconds, and then after ever more, up to the last.
PAUSES = (10.0, 20.0, 40.0, 60.0)


@dataclass(frozen=True)
class Line:
    """A line of progress for a terminal: a name, a bar of `bar` columns of which `filled` are done, and words."""

    name: str
    bar: int
    filled: int
    words: str


class Task:
    """What is running, as it was told last. One task may follow another in the same place."""

    def __init__(self, name: str, now: float) -> None:
        """A task of which nothing is known yet.

        Args:
            name: What it is called.
            now: The time in seconds, from any beginning, as in all methods.
        """
        self.name = name
        self.done = self.total = 0.0
        self.words: tuple[str, ...] = ()
        self._started = self._told = now
        self._first: tuple[float, float] | None = None
        self._known_left: float | None = None

    def update(
        self, name: str, done: float, total: float, words: Sequence[str], now: float, left: float | None = None
    ) -> None:
        """Takes in how it stands; a task of another total, or with less done, is another one.

        Args:
            name: What it is called now.
            done: How much is done.
            total: How much there is; a share is told of it where it is no whole number of things.
            words: How it stands, the most important first.
            now: The time.
            left: The seconds that it still takes, where that is known better than by the pace so far.
        """
        if total != self.total or done < self.done:
            self._started, self._first = self._told, None
        if self._first is None:
            self._first = now, done
        self.name, self.done, self.total, self.words = name, done, total, tuple(words)
        self._told, self._known_left = now, left

    def seconds_left(self, now: float) -> float | None:
        """How long it still takes, by its pace so far; None where there is none yet."""
        if self._known_left is not None:
            return max(0.0, self._known_left - (now - self._told))
        if self._first is None:
            return None
        since, done = self._first
        if self._told <= since:  # told once: it began when the one before it ended
            since, done = self._started, 0.0
        spent, gained = self._told - since, self.done - done
        if spent <= 0 or gained <= 0:
            return None
        return max(0.0, (self.total - self.done) * spent / gained - (now - self._told))

    def line(self, width: int, now: float) -> Line:
        """What fits into so many columns: name, done and total, and time left, then a bar and words."""
        if not self.total:
            words = duration(now - self._started)
            return Line(_cut(self.name, width - len(GAP) - len(words)), 0, 0, words)
        words = GAP.join((self._count("/"), *self._left(now)))
        room, bar = width - len(GAP) - len(words), SHORTEST_BAR + len(GAP)
        wanted = bar + sum(len(GAP) + len(word) for word in self.words)
        name = _cut(self.name, min(room, max(LONG_NAME, width // 3, room - wanted)))
        room -= len(name)
        reserved = bar if room >= bar else 0
        for word in self.words:
            if len(GAP) + len(word) > room - reserved:
                break
            words += GAP + word
            room -= len(GAP) + len(word)
        drawn = min(LONGEST_BAR, room - len(GAP)) if reserved else 0
        return Line(name, drawn, round(drawn * min(1.0, self.done / self.total)), words)

    def text(self, now: float) -> str:
        """The same for a file: all of it, on one line."""
        return f"{self.name}: " + ", ".join((self._count(" of "), *self._left(now), *self.words))

    def _count(self, of: str) -> str:
        if isinstance(self.total, int):
            return f"{self.done:,.0f}{of}{self.total:,}"
        return f"{100 * self.done / self.total:.0f} %"

    def _left(self, now: float) -> tuple[str, ...]:
        left = self.seconds_left(now)
        return () if left is None or self.done >= self.total else (f"{duration(left)} left",)


class Pauses:
    """When to print a line where nothing can be drawn: seldom, and ever more so."""

    def __init__(self, now: float) -> None:
        self._pauses = list(PAUSES)
        self._next = now + self._pauses[0]

    def over(self, now: float) -> bool:
        """Whether it is time for a line; the next pause begins then."""
        if now < self._next:
            return False
        if len(self._pauses) > 1:
            del self._pauses[0]
        self._next = now + self._pauses[0]
        return True


def duration(seconds: float) -> str:
    """A time as people say it: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _cut(name: str, room: int) -> str:
    """The name, or its beginning and its end: of a path the end tells more."""
    room = max(room, SHORTEST_NAME)
    end = 2 * room // 3
    return name if len(name) <= room else name[: room - end - 3] + "..." + name[-end:]
