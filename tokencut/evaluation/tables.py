"""CSV files of what a model says of each image."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence

from tokencut.errors import UsageError
from tokencut.files import atomic_write, check_writable, user_path, with_ending


def check_csv(path: str | os.PathLike[str], *, force: bool = False, parameter: str = "predictions") -> None:
    """Refuses a place for predictions, before any work is done.

    Args:
        path: The file to be written.
        force: Whether a file of that name may be replaced.
        parameter: What it was given by.

    Raises:
        UsageError: Its name does not end in .csv.
        ArtifactError: It could not be written, or exists and `force` is off.
    """
    target = user_path(path)
    if target.suffix.lower() != ".csv":
        example = with_ending(target, ".csv", "predictions")
        raise UsageError(
            f"`{parameter}={str(target)!r}` does not end in .csv, and predictions are written as CSV; type "
            f"`{parameter}={str(example)!r}`"
        )
    check_writable(target, force=force, argument=parameter)


def write_csv(path: str | os.PathLike[str], rows: Iterable[Sequence[object]], *, force: bool) -> None:
    """Writes a table; file names that are not UTF-8 come out as the bytes they are.

    Args:
        path: The file, as `check_csv` lets it pass.
        rows: Its rows, the names of the columns first.
        force: Whether a file of that name may be replaced.

    Raises:
        ArtifactError: It could not be written, or exists and `force` is off.
    """
    with (
        atomic_write(path, force=force) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file).writerows(rows)
