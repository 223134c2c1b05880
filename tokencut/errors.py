"""What can go wrong: the library raises these, only the command line formats them and picks an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TokencutError(Exception):
    """Something could not be done; the message says what to do. Exit code 1."""


class UsageError(TokencutError, ValueError):
    """An argument or option is wrong in itself. Exit code 2."""


class ModelError(TokencutError):
    """A model could not be found, built, or is of a kind that tokencut does not know."""


class DataError(TokencutError):
    """A set of images is missing, unreadable, or does not fit the model."""


class ArtifactError(TokencutError):
    """A tokencut file is damaged, of a newer format, or could not be written."""


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
