"""Short texts for messages: one line each, whatever they are made from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any

# Names that a message quotes before it says how many more there are.
QUOTED = 3


def one_line(what: object, most: int = 200) -> str:
    """A text, or an error's, on one line.

    Args:
        what: The text or the error; of an error that says nothing, its class.
        most: How many characters it may have.
    """
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def printable(text: str) -> str:
    """A text as one line that does nothing but show: line breaks and control characters become spaces."""
    one_line = re.sub(r"\s*[\r\n\u0085\u2028\u2029]\s*", " ", text)
    return "".join(character if character.isprintable() else " " for character in one_line)


def shorten(value: Any) -> str:
    """A value as Python writes it, on one line of at most 60 characters."""
    return one_line(repr(value), 60)


def index_in(text: object) -> int | None:
    """The number that a text writes in decimal digits, of no more than eighteen of them; None where it writes none.

    Python's own `int` raises at digits that are no decimals, and at thousands of those that are.
    """
    digits = str(text)
    return int(digits) if len(digits) <= 18 and digits.isdecimal() else None


def listed(texts: Collection[str], most: int | None = QUOTED, total: int | None = None) -> str:
    """The first few texts, and how many more there are.

    Args:
        texts: The texts, or the first of them.
        most: How many to tell; all where None.
        total: How many there are, where `texts` holds only the first.
    """
    shown = list(islice(texts, most))
    more = (len(texts) if total is None else total) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def quoted(names: Collection[str], total: int | None = None) -> str:
    """The first few names in quotes, and how many more there are: one line, whatever the names hold.

    Args:
        names: The names, or the first of them.
        total: How many there are, where `names` holds only the first.
    """
    return listed([repr(name) for name in islice(names, QUOTED)], total=len(names) if total is None else total)


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
