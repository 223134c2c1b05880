"""What can go wrong: the library raises these, only the command line formats them and picks an exit code.

Messages speak Python and name arguments as code between backticks, such as `batch_size=64`; the command line makes
options of them.
"""

from __future__ import annotations


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
