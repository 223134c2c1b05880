"""Archives of images: reading a `.tar` where it lies, and unpacking a `.tar.gz` once into a cache."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from tokencut.data.cache import CACHE_VARIABLE, cache_folder, is_whole, list_of, locked, read_list, sizes_in
from tokencut.data.listing import Listing, inner_path
from tokencut.errors import DataError
from tokencut.files import atomic_write, remove_folder
from tokencut.messages import quoted
from tokencut.observers import Observer

GZIP_MAGIC = b"\x1f\x8b"


class _Member(tarfile.TarInfo):
    """A member of an archive that must end as archives do: tarfile takes a cut between two members for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # public, though the stubs leave it out
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def is_tar(path: Path) -> bool:
    """Whether a file is an uncompressed tar archive, by its content."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return False
    return True


def is_gzip(path: Path) -> bool:
    """Whether a file is gzip-compressed, by its content."""
    with path.open("rb") as file:
        return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC


def scan(path: Path) -> Listing:
    """Lists an uncompressed tar archive.

    Where a path occurs twice the later entry counts, as it would when unpacked. A hard link is the file that it names,
    as tar writes one that it has met before.

    Raises:
        DataError: The archive is truncated or damaged, holds a path that leads out of it, or goes on behind its end.
    """
    listing = Listing()
    with _reading(path), tarfile.open(path, "r:", tarinfo=_Member) as archive:
        for member in _members(archive):
            name = _inner_path(path, member)
            if member.isdir():
                listing.folders.add(name)
            elif member.isreg() and not member.issparse():
                listing.files[name] = (member.offset_data, member.size)
            elif member.islnk() and (earlier := _linked_path(path, member)) in listing.files:
                listing.files[name] = listing.files[earlier]
            else:
                listing.others.append(name)
        _check_end(path, archive)
    listing.folders.discard(".")
    return listing


def unpack(path: Path, observer: Observer | None = None) -> Path:
    """Unpacks a `.tar.gz` into the cache, unless that has been done and nothing is missing since.

    Only plain files and folders inside the archive are accepted. If it fails or is interrupted, nothing but an empty
    lock is left behind. Of several processes one unpacks, and the others wait for it. A list of what was unpacked lies
    beside it, since what cleans temporary folders takes old files away one by one.

    Args:
        path: The archive. Its path, size and time of change say whether the cache holds it.
        observer: Told that an unpacking begins, since that can take minutes, and how far it is.

    Returns:
        The folder with the archive's content.

    Raises:
        DataError: The archive is damaged, holds links or paths that lead out of it, or the cache cannot be written, or
            holds files that were never unpacked.
    """
    target = cache_folder() / _cache_name(path)
    if is_whole(target):
        return target
    told = observer or Observer()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target, lambda: told.note(f"another process unpacks {path}; waiting")):
            if not is_whole(target):
                if target.is_dir():
                    told.warning(f"{target}, where {path} was unpacked, is no longer as it was")
                    _clear(path, target)
                told.note(f"unpacking {path} into {target}, this once")
                _unpack(path, target, told)
    except (OSError, NotImplementedError) as error:  # the latter where a file system knows no locks
        reason = getattr(error, "strerror", None) or error
        # Names that clash or are too long for a file system would be no better elsewhere.
        elsewhere = getattr(error, "errno", None) not in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
        other = f"set {CACHE_VARIABLE} to a folder with room for it, or " if elsewhere else ""
        raise DataError(
            f"cannot unpack {path} into {target.parent}: {reason}; {other}unpack it yourself and give the folder"
        ) from error
    return target


def _clear(path: Path, target: Path) -> None:
    """Removes what was unpacked; nothing else.

    Raises:
        DataError: There is something else.
    """
    try:
        unpacked = set(read_list(target))
    except (FileNotFoundError, ValueError):
        with _reading(path), gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            unpacked = {_inner_path(path, member) for member in _members(archive)}
    strangers = set(sizes_in(target)) - unpacked
    if strangers:
        raise DataError(
            f"{target}, where {path} was unpacked, holds {quoted(sorted(strangers))}, which it did not come with; move "
            "that away"
        )
    remove_folder(target)


def _unpack(path: Path, target: Path, told: Observer) -> None:
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _extract(path, partial, told)
        with atomic_write(list_of(target)) as temporary:
            lines = (f"{size} {name}\0" for name, size in sizes_in(partial).items())
            temporary.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
        partial.chmod(0o755)  # mkdtemp's folders are for their maker alone
        partial.rename(target)
    finally:
        with contextlib.suppress(OSError):
            remove_folder(partial)


def _cache_name(path: Path) -> str:
    status = path.stat()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return f"{path.name.split('.')[0]}-{hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()[:16]}"


def _extract(path: Path, folder: Path, told: Observer) -> None:
    size = float(path.stat().st_size)
    with (
        _reading(path),
        path.open("rb") as packed,
        gzip.open(packed) as stream,
        tarfile.open(fileobj=stream, mode="r:", tarinfo=_Member) as archive,
    ):
        for member in _members(archive):
            told.progress(f"unpacking {path.name}", packed.tell(), size, {})
            name = _inner_path(path, member)
            if member.islnk() and (folder / (earlier := _linked_path(path, member))).is_file():
                _make_folder((folder / name).parent)
                shutil.copyfile(folder / earlier, folder / name)
                continue
            if not (member.isdir() or member.isreg()):
                raise DataError(
                    f"{path} holds {name!r}, which is a link or a device: only plain files and folders are unpacked; "
                    "unpack it yourself and give the folder"
                )
            _write(archive, member, folder / name)
        _check_end(path, archive)  # which lets gzip find out as well whether all came through whole


def _make_folder(place: Path) -> None:
    """Makes a folder and those above it; pathlib's own way calls itself for each, and fails where they are many."""
    missing = []
    while not place.is_dir():
        missing.append(place)
        place = place.parent
    for folder in reversed(missing):
        folder.mkdir()


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> None:
    """Writes a plain file or folder; owners, modes and times of the archive's maker are of no use in a cache.

    Not by `TarFile.extract`: what makes that safe, its filters, came with Python 3.10.12 and 3.11.4 only.
    """
    if member.isdir():
        _make_folder(place)
        return
    _make_folder(place.parent)
    content = archive.extractfile(member)
    assert content is not None  # as it is for a file
    with content, place.open("wb") as file:
        shutil.copyfileobj(content, file)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole tar archive ({error}); download or pack it again") from error


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members one after the other; tarfile's own list of them, a gigabyte for ImageNet, is kept empty."""
    for member in archive:
        archive.members.clear()  # type: ignore[attr-defined]  # public, though the stubs leave it out
        yield member


def _check_end(path: Path, archive: tarfile.TarFile) -> None:
    """Refuses what goes on behind the mark of its end, where only padding may be.

    Raises:
        DataError: It does.
    """
    stream = archive.fileobj
    assert stream is not None
    while content := stream.read(1 << 20):  # the mark was what was read last
        if content.strip(b"\0"):
            raise DataError(
                f"{path} goes on behind the mark of its end, as archives that were joined by cat do; unpack it with "
                "tar -i, which goes past the mark, and give the folder"
            )


def _inner_path(path: Path, member: tarfile.TarInfo) -> str:
    """A member's path without a leading `/` or `./`, which mean nothing in an archive."""
    return inner_path(path, member.name)


def _linked_path(path: Path, member: tarfile.TarInfo) -> str:
    """The path of the member that a hard link names."""
    return inner_path(path, member.linkname)
