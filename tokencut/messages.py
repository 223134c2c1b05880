"""Short texts for messages: one line each, whatever they are made from."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any

# Names that a message quotes before it says how many more there are.
QUOTED = 3


def quoted(names: Collection[str], total: int | None = None) -> str:
    """The first few names, quoted, and how many more there are: one line, whatever the names hold.

    Args:
        names: The names, or the first of them.
        total: How many there are, where `names` holds only the first.
    """
    shown = [repr(name) for name in islice(names, QUOTED)]
    more = (len(names) if total is None else total) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def one_line(problem: object) -> str:
    """An error's text on one line, at most 200 characters."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def shorten(value: Any) -> str:
    """A value's repr for a message: one line, at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def nearest_known(word: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.5) -> str:
    """What stands between an unknown word and the list of known ones: `, did you mean evit?` or, if none is near, `;`.

    Args:
        word: What was typed.
        known: What can be typed.
        most: How many to offer.
        cutoff: How alike they must be, from 0 to 1.
    """
    close = difflib.get_close_matches(word, list(known), n=most, cutoff=cutoff)
    return f", did you mean {' or '.join(close)}?" if close else ";"
