"""The cache of unpacked archives: where it is, what of it is whole, what is in it, and clearing it of what is ours."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tokencut.errors import DataError
from tokencut.files import remove_folder, user_path
from tokencut.messages import quoted

CACHE_VARIABLE = "TOKENCUT_CACHE"
# What an archive is unpacked into: its name, and a digest of its path, size and time of change. Beside that stand a
# list of what was unpacked, a lock, which stays, and, until all is unpacked, a folder of that name behind a dot.
UNPACKED = re.compile(r"(?!\.).*-[0-9a-f]{16}")
BESIDE = re.compile(r"\.(?P<name>.*-[0-9a-f]{16})(\.list|-[a-z0-9_]{8})")

Sizes = dict[str, int]  # of files, in bytes, by their paths in a folder


@dataclass(frozen=True)
class CachedArchive:
    """An archive that was unpacked.

    Attributes:
        path: The folder with its content.
        bytes: How large its files are together.
        files: How many they are.
        age_seconds: How long ago it was unpacked.
        kept: Why it is not cleared away; empty where it may be.
    """

    path: Path
    bytes: int
    files: int
    age_seconds: float
    kept: str = ""


def cache_folder() -> Path:
    """Where archives are unpacked: `TOKENCUT_CACHE`, or `tokencut` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return user_path(chosen)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tokencut"


def cached_archives() -> list[CachedArchive]:
    """What was unpacked into the cache and is still there, by name.

    Raises:
        DataError: The cache may not be read.
    """
    with _reading():
        return [_look_at(place) for place in _entries() if UNPACKED.fullmatch(place.name) and _is_ours(place)]


def clear_cache() -> tuple[list[CachedArchive], list[CachedArchive]]:
    """Removes what was unpacked into the cache, and what an unpacking that was killed has left; only locks stay.

    What holds files that did not come out of the archive, or that were changed, stays as it is; so does what another
    process is unpacking just now. A process that reads images out of the cache at the same time loses them.

    Returns:
        What was removed, and what was kept.

    Raises:
        DataError: The cache may not be read or written.
    """
    removed, kept = list[CachedArchive](), list[CachedArchive]()
    with _reading():
        for found in cached_archives():
            with locked(found.path) as alone:
                now = _look_at(found.path, busy=not alone)
                if not now.kept:
                    remove_folder(found.path)
                (kept if now.kept else removed).append(now)
        _clear_leftovers()
    return removed, kept


def _clear_leftovers() -> None:
    """Removes lists of folders that are gone, and folders that were never finished."""
    for place in _entries():
        match = BESIDE.fullmatch(place.name)
        if match is None or place.is_symlink():
            continue
        target = place.with_name(match["name"])
        with locked(target) as alone:
            if alone and place.is_dir():
                remove_folder(place)
            elif alone and not target.exists():
                place.unlink()


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read or clear the cache {cache_folder()}: {error.strerror or error}; set "
                        f"{CACHE_VARIABLE} to a folder of your own") from error  # fmt: skip


def _entries() -> list[Path]:
    folder = cache_folder()
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_ours(place: Path) -> bool:
    """Whether a folder was unpacked here: only then is there a list of what was."""
    return place.is_dir() and not place.is_symlink() and list_of(place).is_file()


def _look_at(place: Path, *, busy: bool = False) -> CachedArchive:
    sizes = sizes_in(place)
    try:
        unpacked = read_list(place)
    except ValueError:
        unpacked = {}
    strangers = sorted(name for name in sizes if unpacked.get(name) != sizes[name])
    why = f"it holds {quoted(strangers)}, which did not come out of the archive so" if strangers else ""
    age = max(0.0, time.time() - list_of(place).stat().st_mtime)
    return CachedArchive(place, sum(sizes.values()), len(sizes), age, "it is being unpacked" if busy else why)


@contextlib.contextmanager
def locked(target: Path, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Keeps other processes from unpacking into a folder of the cache.

    Args:
        target: The folder.
        on_wait: Told that another process has the lock, which is then waited for; it is not where None.

    Yields:
        Whether no other process has it.
    """
    lock = FileLock(target.with_name(f".{target.name}.lock"), mode=0o666)  # a cache may be shared with other users
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_wait is None:
            yield False
            return
        on_wait()
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()


def list_of(target: Path) -> Path:
    """The list of what was unpacked into a folder."""
    return target.with_name(f".{target.name}.list")


def is_whole(target: Path) -> bool:
    """Whether all that was unpacked is there, as long as it was, and nothing else."""
    try:
        return target.is_dir() and read_list(target) == sizes_in(target)
    except (FileNotFoundError, ValueError):  # no list, or a damaged one
        return False


def read_list(target: Path) -> Sizes:
    """What was unpacked into a folder.

    Raises:
        FileNotFoundError: There is no list.
        ValueError: It is damaged.
    """
    lines = list_of(target).read_text(encoding="utf-8", errors="surrogateescape").split("\0")
    return {name: int(size) for size, _, name in (line.partition(" ") for line in lines if line)}


def sizes_in(folder: Path) -> Sizes:
    """All files of a folder."""
    found: Sizes = {}
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{prefix}{entry.name}/")
                else:
                    found[prefix + entry.name] = entry.stat(follow_symlinks=False).st_size
    return found
