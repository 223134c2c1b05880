"""Zip archives of images, read where they lie: no image is unpacked before it is wanted, nor to more than it says."""

from __future__ import annotations

import bz2
import errno
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tokencut.data.listing import Listing, inner_path
from tokencut.errors import DataError
from tokencut.messages import quoted

# Of a file with members, and of one without.
MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
# A member that says to be larger is no image: Pillow reads none of so many bytes.
MOST_BYTES = 2**30
# A member's own header, of which only the lengths of name and extra field count: the rest stands in the directory.
HEADER = struct.Struct("<4s22xHH")
ENCRYPTED = 1
UNIX = 3

DECOMPRESSORS: dict[int, Callable[[], Any]] = {
    zipfile.ZIP_DEFLATED: lambda: zlib.decompressobj(-zlib.MAX_WBITS),
    zipfile.ZIP_BZIP2: bz2.BZ2Decompressor,
}


@dataclass(frozen=True)
class Member:
    """Where a member's bytes are, and what they should become: method, lengths in bytes, CRC-32."""

    start: int
    packed: int
    size: int
    method: int
    crc: int


def is_zip(path: Path) -> bool:
    """Whether a file is a zip archive, by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) in MAGIC


def scan_zip(path: Path) -> tuple[Listing, dict[str, Member]]:
    """Lists a zip archive; its files may be where the listing says, and are read by `read_member`.

    Where a path occurs twice the later entry counts, as it would when unpacked.

    Raises:
        DataError: The archive is truncated or damaged, encrypted, packed by a method that is not read here, one of
            several that were joined, or holds a path that leads out of it or a file that is larger than any image.
    """
    listing, members = Listing(), dict[str, Member]()
    locked, unknown, bombs = [], [], []
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a whole zip archive ({error}); download or pack it again") from error
    for info in infos:
        # The standard wants `/`; some programs on Windows write `\\`.
        name = inner_path(path, info.filename if info.create_system == UNIX else info.filename.replace("\\", "/"))
        if info.is_dir() or info.filename.endswith("\\"):
            listing.folders.add(name)
        elif info.create_system == UNIX and stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            listing.others.append(name)
        else:
            listing.files[name] = (info.header_offset, info.compress_size)
            members[name] = Member(info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
            if info.flag_bits & ENCRYPTED:
                locked.append(name)
            elif info.compress_type not in (zipfile.ZIP_STORED, *DECOMPRESSORS):
                unknown.append(f"{name} (method {info.compress_type})")
            elif info.file_size > MOST_BYTES:
                bombs.append(f"{name} ({info.file_size / 1e9:,.1f} GB, packed into {info.compress_size / 1e6:,.1f} MB)")
    listing.folders.discard(".")
    if infos and min(info.header_offset for info in infos) > 0:
        raise DataError(
            f"{path} has something in front of its files, as archives that were joined by cat have, of which only the "
            "last would be read; unpack each of them yourself and give the folder"
        )
    if locked:
        raise DataError(f"{path} is encrypted ({quoted(locked)}); unpack it with its password and give the folder")
    if unknown:
        raise DataError(f"{path} is packed in a way that is not read here ({quoted(unknown)}); unpack it yourself and "
                        "give the folder")  # fmt: skip
    if bombs:
        raise DataError(f"{path} holds files larger than any image: {quoted(bombs)}; pack the images alone")
    return listing, members


def read_member(archive: BinaryIO, member: Member) -> bytes:
    """Reads and unpacks a file of an open archive, of which never more is made than the archive says.

    Raises:
        OSError: It is not as the archive says; `strerror` says so.
    """
    content = _unpacked(archive, member, member.packed, member.size + 1)
    if len(content) != member.size or zlib.crc32(content) != member.crc:
        raise _damaged("its checksum or length is another than the archive says")
    return content


def read_start(archive: BinaryIO, member: Member, size: int) -> bytes:
    """Reads the first bytes of a file; fewer where it ends.

    Raises:
        OSError: It is damaged; `strerror` says so.
    """
    # Images hardly shrink: what is wanted of one is in few more bytes than it has. bzip2 packs by large blocks.
    packed = member.packed if member.method == zipfile.ZIP_BZIP2 else min(member.packed, 4 * size + 1024)
    return _unpacked(archive, member, packed, size)[:size]


def _unpacked(archive: BinaryIO, member: Member, packed: int, most: int) -> bytes:
    """At most so many bytes of what so many packed ones become."""
    archive.seek(member.start)
    header = archive.read(HEADER.size)
    if len(header) < HEADER.size or header[:4] != MAGIC[0]:
        raise _damaged("its header is not where the archive says")
    _, name, extra = HEADER.unpack(header)
    archive.seek(name + extra, os.SEEK_CUR)
    content = archive.read(packed)
    if member.method == zipfile.ZIP_STORED:
        return content
    try:
        unpacked: bytes = DECOMPRESSORS[member.method]().decompress(content, most)
    except (zlib.error, OSError, ValueError) as error:
        raise _damaged(str(error)) from error
    return unpacked


def _damaged(why: str) -> OSError:
    return OSError(errno.EIO, f"damaged in the archive: {why}")
