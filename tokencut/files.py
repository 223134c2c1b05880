"""The one way tokencut writes a file: all of it, or nothing."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokencut.errors import ArtifactError


def check_writable(path: str | os.PathLike[str], *, force: bool) -> Path:
    """Refuses an output that could not be written, before any work is done for it.

    Args:
        path: The file to be written.
        force: Whether a file of that name may be replaced.

    Returns:
        The path.

    Raises:
        ArtifactError: The folder does not exist or may not be written to, the path is a folder or a device, or the file
            exists and `force` is off.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ArtifactError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    if target.is_dir():
        example = target / "out.safetensors"
        raise ArtifactError(f"cannot write {target}: it is a folder; name a file in it, such as {example}")
    if target.exists() and not target.is_file():  # a device, which the file would take the place of
        raise ArtifactError(f"cannot write {target}: it is no file; give another name")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write {target}: no permission in {target.parent}; give another folder")
    if target.exists() and not force:
        raise ArtifactError(f"{target} exists; add --force to replace it, or give another -o")
    return target


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, force: bool = True) -> Iterator[Path]:
    """Gives a temporary file beside `path`, which takes its place when the block ends well.

    Args:
        path: The file to be written.
        force: Whether a file of that name may be replaced.

    Yields:
        The temporary path to write to. It is flushed to disk and renamed over `path` if the block ends without
        an exception (interrupts included), and removed otherwise: `path` holds its old content or the new, never a
        part.

    Raises:
        ArtifactError: The file cannot be written, with the system's reason (disk full, say).
    """
    target = check_writable(path, force=force)
    target = target.resolve() if target.is_symlink() else target  # the link stays, and points to the new content
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; the result gets those of the file it replaces, or of any new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~mask)
        temporary.replace(target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; nothing was written") from error
    finally:
        temporary.unlink(missing_ok=True)
