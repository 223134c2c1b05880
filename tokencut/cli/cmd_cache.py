"""`tokencut cache`: the archives that were unpacked, and clearing them away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokencut.cli import render
from tokencut.cli.options import JsonFlag

if TYPE_CHECKING:
    from tokencut.data.cache import CachedArchive

CLEAR_HELP = "Remove them: what was unpacked, and nothing else."
# Seconds in a unit, the largest first.
UNITS = (("day", 86_400), ("hour", 3_600), ("minute", 60))


def cache(
    *,
    clear: Annotated[bool, typer.Option("--clear", help=CLEAR_HELP)] = False,
    as_json: JsonFlag = False,
) -> None:
    """Shows what is cached: each .tar.gz is unpacked once, into one folder.

    TOKENCUT_CACHE names the folder. With --clear, what was unpacked is removed;
    files that did not come out of an archive stay, and so does their folder.

    Examples:
      tokencut cache
      tokencut cache --clear
    """
    from tokencut.data.cache import cache_folder, cached_archives, clear_cache

    removed, kept = clear_cache() if clear else ([], cached_archives())
    if as_json:
        render.write_json({
            "folder": str(cache_folder()),
            "archives": [_values(found) for found in kept],
            "bytes": sum(found.bytes for found in kept),
            "removed": [_values(found) for found in removed],
            "removed_bytes": sum(found.bytes for found in removed),
        })  # fmt: skip
        return
    if clear:
        for found in kept:
            render.note(f"kept {found.path}: {found.kept}")
        render.show(f"removed {_counted(removed)} from {cache_folder()}")
        return
    if not kept:
        render.show(f"nothing is unpacked in {cache_folder()}")
        return
    rows = [(str(found.path), f"{found.files:,}", _size(found.bytes), _age(found.age_seconds)) for found in kept]
    render.show(render.table(("unpacked archive", "files", "size", "age"), rows))
    render.show(f"{_counted(kept)}; type tokencut cache --clear to remove them")


def _values(found: CachedArchive) -> dict[str, Any]:
    values = {"path": str(found.path), "bytes": found.bytes, "files": found.files, "age_seconds": found.age_seconds}
    return {**values, "kept": found.kept or None}


def _counted(archives: Sequence[CachedArchive]) -> str:
    return f"{len(archives)} archive{'s' * (len(archives) != 1)}, {_size(sum(found.bytes for found in archives))}"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _age(seconds: float) -> str:
    unit, length = next(((unit, length) for unit, length in UNITS if seconds >= length), ("second", 1))
    count = int(seconds // length)
    return f"{count} {unit}{'s' * (count != 1)}"
