"""The one way tokencut writes a file: all of it, or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tokencut.errors import ArtifactError, UsageError

# How the name of a temporary file ends.
PART = ".part"


KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def open_plain(path: Path) -> BinaryIO:
    """Opens a file to be read; what is none is refused, since to open a pipe waits until somebody writes to it.

    Raises:
        OSError: It cannot be opened, or is no file; `strerror` says why.
    """
    kind = KINDS.get(stat.S_IFMT(path.stat().st_mode))
    if kind is not None:
        code = errno.EISDIR if kind == KINDS[stat.S_IFDIR] else errno.EINVAL
        raise OSError(code, f"it is {kind}, not a file", str(path))
    return path.open("rb")


def unlike_a_file(path: Path) -> str | None:
    """Why a path is not that of a file, such as `does not exist` or `is a pipe, not a file`; None where it is."""
    try:
        kind = KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except OSError:
        return "does not exist"
    return kind and f"is {kind}, not a file"


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user gives it, where `~` and `~somebody` stand for home folders.

    Raises:
        UsageError: There is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"there is no home folder {Path(path).parts[0]}, where {os.fspath(path)} would lie; give the "
                         f"whole path, or ./{os.fspath(path)} where it is called so") from error  # fmt: skip


def with_ending(path: Path, ending: str, name: str) -> Path:
    """A path that ends in what it should, as an example of what to give.

    Args:
        path: One that does not.
        ending: Such as `.png`.
        name: What the file could be called without it, where the path is a folder's.
    """
    is_folder = path.name in ("", "..") or path.is_dir()
    return path / f"{name}{ending}" if is_folder else path.with_suffix(ending)


def check_writable(path: str | os.PathLike[str], *, force: bool, argument: str = "path") -> Path:
    """Refuses an output that could not be written, before any work is done for it.

    Args:
        path: The file to be written.
        force: Whether a file of that name may be replaced.
        argument: What it was given by.

    Returns:
        The path.

    Raises:
        ArtifactError: The folder does not exist or may not be written to, the path is a folder or a device, leads in
            circles or is too long, or the file exists and `force` is off.
    """
    target = user_path(path)
    place = _place_of(target)
    if place.is_dir():
        example = target / "out.safetensors"
        raise ArtifactError(f"cannot write {target}: it is a folder; name a file in it, such as {example}")
    if place.exists() and not place.is_file():  # a device, which the file would take the place of
        raise ArtifactError(f"cannot write {target}: it is no file; give another name")
    _check_permission(target, place.parent)
    if place.exists() and not force:
        raise ArtifactError(f"{target} exists; add `force=True` to replace it, or give another `{argument}`")
    return target


def check_writable_folder(path: str | os.PathLike[str], *, parents: bool = False) -> Path:
    """Refuses a folder that files could not be written to, before any work is done for them.

    Args:
        path: The folder, which need not exist.
        parents: Whether what it lies in need not exist either.

    Returns:
        The path.

    Raises:
        ArtifactError: It is a file, what it lies in does not exist, one of them may not be written to, or the path
            leads in circles or is too long.
    """
    target = user_path(path)
    place = _place_of(target, parents=parents)
    while parents and not os.path.lexists(place):
        place = place.parent
    if place.exists() and not place.is_dir():
        what = "it" if place.name == target.name else place
        raise ArtifactError(f"cannot make the folder {target}: {what} is a file; move that, or give another name")
    _check_permission(target, place if place.is_dir() else place.parent)
    return target


def _place_of(target: Path, *, parents: bool = False) -> Path:
    """Where a path leads by its links; what it lies in is there, unless `parents` may be made.

    Raises:
        ArtifactError: It leads nowhere, with the system's reason.
    """
    place = Path(os.path.realpath(target))
    try:
        with contextlib.suppress(FileNotFoundError):
            place.stat()
        if place.is_symlink():  # a loop of links, which some systems only find when asked for more
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except NotADirectoryError:
        pass  # told below, by the part of the path that is a file
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; give another name") from error
    if not parents and not place.parent.is_dir():
        shown = place.parent if target.is_symlink() else target.parent
        raise ArtifactError(f"cannot write {target}: the folder {shown} does not exist; create it first")
    return place


def _check_permission(target: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write {target}: no permission in {folder}; give another folder")


def part_prefix(target: Path) -> str:
    """How the names of a file's temporary files begin: short, so that any name that can be written leaves room."""
    return f".{target.name[:40]}"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, force: bool = True, argument: str = "path") -> Iterator[Path]:
    """Gives a temporary file beside `path`, which takes its place when the block ends well.

    Args:
        path: The file to be written.
        force: Whether a file of that name may be replaced.
        argument: What it was given by.

    Yields:
        The temporary path to write to. It is flushed to disk and renamed over `path` if the block ends without
        an exception (interrupts included), and removed otherwise: `path` holds its old content or the new, never a
        part.

    Raises:
        ArtifactError: The file cannot be written, with the system's reason (disk full, say).
    """
    target = check_writable(path, force=force, argument=argument)
    target = target.resolve() if target.is_symlink() else target  # the link stays, and points to the new content
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f"{part_prefix(target)}.", suffix=PART)
        os.close(handle)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; the result gets those of the file it replaces, or of any new file.
        temporary.chmod(_mode_of(target))
        temporary.replace(target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; nothing was written") from error
    finally:
        temporary.unlink(missing_ok=True)


def _mode_of(target: Path) -> int:
    """Who may do what with a file: as with the one that it replaces, or as with any new one."""
    mask = os.umask(0)
    os.umask(mask)
    return target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~mask


@contextlib.contextmanager
def atomic_files(path: str | os.PathLike[str], *beside: Path, force: bool = True) -> Iterator[Path]:
    """Gives a path in a temporary folder, for what tells a file by its name or writes several at once.

    Args:
        path: The file to be written.
        beside: Others to be written with it, in the same folder.
        force: Whether files of these names may be replaced.

    Yields:
        A path of the same name in an empty folder beside `path`. What is written there under the names asked for is
        flushed to disk and takes their places if the block ends without an exception, the file itself last; if one of
        them cannot, none does. Whatever else was written is removed.

    Raises:
        ArtifactError: A file cannot be written, with the system's reason.
    """
    target = check_writable(path, force=force)
    targets = [check_writable(file, force=force) for file in beside] + [target]
    try:
        folder = Path(tempfile.mkdtemp(dir=target.resolve().parent, prefix=f"{part_prefix(target)}.", suffix=PART))
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield folder / target.name
        pairs = [(folder / file.name, file.resolve()) for file in targets]
        for written, place in pairs:
            with written.open("rb+") as content:
                os.fsync(content.fileno())
            written.chmod(_mode_of(place))
        _replace_all(pairs, folder)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; nothing was written") from error
    finally:
        remove_folder(folder)


def _replace_all(pairs: Sequence[tuple[Path, Path]], folder: Path) -> None:
    """Puts each file in its place; where one cannot be, those before it are put back."""
    done: list[tuple[Path, Path | None]] = []
    try:
        for number, (written, place) in enumerate(pairs):
            before = folder / f"{number}.before" if place.exists() and len(pairs) > 1 else None
            if before is not None:
                try:
                    before.hardlink_to(place)
                except OSError:  # a file system without links
                    shutil.copy2(place, before)
            written.replace(place)
            done.append((place, before))
    except BaseException:
        for place, before in reversed(done):
            if before is None:
                place.unlink()
            else:
                before.replace(place)
        raise


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`, whose files take their places in it when the block ends well.

    Args:
        folder: The folder, which need not exist; what lies in it besides stays.

    Yields:
        The temporary folder, for files alone. They are flushed to disk, and moved if the block ends without an
        exception (interrupts included); otherwise `folder` is as it was.

    Raises:
        ArtifactError: It cannot be written, with the system's reason.
    """
    target = folder.resolve()
    try:
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{part_prefix(target)}.", suffix=PART))
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        files = sorted(temporary.iterdir())
        for file in files:
            with file.open("rb+") as written:
                os.fsync(written.fileno())
            file.chmod(0o666 & ~mask)
        if target.is_dir():
            for file in files:
                file.replace(target / file.name)
        else:
            temporary.chmod(0o777 & ~mask)
            temporary.replace(target)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        remove_folder(temporary)


def check_writable_package(path: str | os.PathLike[str], *, force: bool, holding: str) -> Path:
    """Refuses a folder that counts as one file, and could not be written, before any work is done for it.

    Args:
        path: The folder to be written.
        force: Whether a folder of that name and kind may be replaced.
        holding: What lies in each of its kind.

    Raises:
        ArtifactError: There is something of that name that is no such folder, or `force` is off, or it cannot be made.
    """
    target = user_path(path)
    place = _place_of(target)
    _check_permission(target, place.parent)
    if place.exists() and not (place / holding).is_file():
        raise ArtifactError(f"cannot write {target}: what has that name holds no {holding}; move it, or give another "
                            "name")  # fmt: skip
    if place.exists() and not force:
        raise ArtifactError(f"{target} exists; add `force=True` to replace it, or give another `path`")
    return target


@contextlib.contextmanager
def atomic_package(path: str | os.PathLike[str], *, force: bool, holding: str) -> Iterator[Path]:
    """Gives a path for a folder that counts as one file: all of it is there, or what was there before.

    Args:
        path: As `check_writable_package` takes it; so are the others.
        force: Likewise.
        holding: Likewise.

    Yields:
        A path of the same name in an empty folder beside `path`. The folder written there is flushed to disk and takes
        its place if the block ends without an exception.

    Raises:
        ArtifactError: It cannot be written, with the system's reason.
    """
    target = check_writable_package(path, force=force, holding=holding)
    place = target.resolve()
    try:
        around = Path(tempfile.mkdtemp(dir=place.parent, prefix=f"{part_prefix(target)}.", suffix=PART))
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from error
    written, before = around / target.name, around / "before"
    try:
        yield written
        for file in written.rglob("*"):
            if file.is_file():
                with file.open("rb+") as content:
                    os.fsync(content.fileno())
        if place.exists():
            place.replace(before)
        try:
            written.replace(place)
        except BaseException:
            if before.exists():
                before.replace(place)
            raise
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; nothing was written") from error
    finally:
        remove_folder(around)


def remove_folder(folder: Path) -> None:
    """Removes a folder of ours and all in it, however deep; nothing where there is none. Links are not followed.

    `shutil.rmtree` calls itself for each folder in the other, and fails where they are many.
    """
    waiting, found = [folder] if folder.is_dir() else [], list[Path]()
    while waiting:
        found.append(waiting.pop())
        with os.scandir(found[-1]) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                else:
                    os.unlink(entry.path)  # noqa: PTH108 (of 1.3 million files, each would be made a Path first)
    for emptied in reversed(found):
        emptied.rmdir()
