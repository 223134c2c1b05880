"""What a folder or an archive holds, and the class folders and images among it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from tokencut.errors import DataError
from tokencut.messages import one_line, quoted, shorten

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv",
                    ".3gp")  # fmt: skip

# Folders that operating systems and network storage make of themselves, some of them with thumbnails in them. Hidden
# ones need not stand here.
LEFTOVERS = frozenset((
    "__macosx", "lost+found", "$recycle.bin", "recycler", "system volume information", "network trash folder",
    "temporary items", "@eadir", "@recycle", "#recycle", "#snapshot", "@recently-snapshot", "@tmp", "~snapshot",
))  # fmt: skip


def inner_path(archive: Path, name: str) -> str:
    """The path of an archive's member, without a leading `/` or `./`, which mean nothing there.

    Raises:
        DataError: It leads out of the archive.
    """
    # As this system reads it: on Windows a drive and a backslash lead out as well.
    inner = PurePath(name.lstrip("/"))
    if ".." in inner.parts or inner.anchor:
        raise DataError(f"{archive} holds {name!r}, a path that leads out of it; pack the images again without '..'")
    return inner.as_posix()


# On so many paths a folder may be reached by links; folders that link to each other make a path of every order of them.
MOST_PATHS = 100


@dataclass
class Listing:
    """What a folder or an archive holds, by paths relative to it, with `/` between their parts.

    Attributes:
        files: The plain files; in an archive with where their bytes start and how many they are.
        folders: The folders, empty ones too.
        others: What is neither: links in an archive, sockets, devices.
        own: Pictures that tokencut wrote, which are not among the files.
    """

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """What a source holds, in timm's natural order.

    Attributes:
        classes: The class folders, those with images in them.
        images: The path of each image, and the index of its class in `classes`.
        notes: What was passed over, and why.
        wrapper: The names of the folders around the class folders, the outermost first.
    """

    classes: tuple[str, ...]
    images: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()
    wrapper: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """The images of a listing with the parts of their paths, or its videos; what they are called; the folders that
    count; what was passed over, in words.
    """

    images: Mapping[str, tuple[str, ...]]
    called: str
    folders: frozenset[str]
    notes: tuple[str, ...]


def is_video(path: str) -> bool:
    """Whether a file is a video by its extension."""
    return path.lower().endswith(VIDEO_EXTENSIONS)


def find_images(listing: Listing) -> Found:
    """Finds the images in a listing, or the videos where these are more: by extension; not those that are hidden or in
    what systems leave behind.
    """
    folders = listing.folders | {path.rpartition("/")[0] for path in listing.files}
    leftovers = {part for folder in folders if (part := _leftover(folder))}
    counting = frozenset(folder for folder in folders if not (_is_hidden(folder) or _leftover(folder)))
    visible = [path for path in listing.files if path.rpartition("/")[0] in counting]
    wanted, called = [path for path in visible if path.lower().endswith(EXTENSIONS)], "images"
    if len(videos := [path for path in visible if is_video(path)]) > len(wanted):
        wanted, called = videos, "videos"
    hidden = [path for path in wanted if _is_hidden(path)]
    images = {path: tuple(path.split("/")) for path in wanted if not _is_hidden(path)}
    notes = (
        told(set(visible) - set(wanted), "files passed over for their extension"),
        told(hidden, f"hidden {called} passed over"),
        told(leftovers, "folders that systems leave behind passed over"),
        told(listing.others, "links or special files passed over"),
        told(listing.own, "pictures that tokencut wrote passed over"),
    )
    return Found(images, called, counting, tuple(filter(None, notes)))


def find_classes(name: str, listing: Listing) -> Layout:
    """Finds classes and images, or videos, in a listing.

    The classes are the top folders; a folder that merely wraps them (`val/` in a tar of `val`) is stepped into, and
    images in folders below a class belong to it. Passed over are hidden files and folders (`.name`), what systems leave
    behind, and folders without images: in a mapping by order they would put every class behind them on another.

    Args:
        name: The source as the user wrote it, for messages.
        listing: All that the source holds.

    Raises:
        DataError: There are no images, or none inside class folders.
    """
    found = find_images(listing)
    images = found.images
    with_images = {parts[:depth] for parts in images.values() for depth in range(1, len(parts))}
    depth = _wrapper_depth(with_images, images.values())
    outside = [path for path, parts in images.items() if len(parts) == depth + 1]
    inside = sorted((path for path, parts in images.items() if len(parts) > depth + 1), key=path_order)
    if not inside:
        raise DataError(_nothing_found(name, outside, len(listing.files), found.called))
    classes = sorted({images[path][depth] for path in inside}, key=path_order)
    number = {folder: index for index, folder in enumerate(classes)}
    placed = tuple((path, number[images[path][depth]]) for path in inside)
    wrapper = images[inside[0]][:depth]
    beside = {tuple(folder.split("/"))[: depth + 1] for folder in found.folders if folder}
    empty = ["/".join(parts) for parts in beside if parts not in with_images and parts != wrapper]
    notes = (
        *found.notes,
        told(outside, f"{found.called} passed over outside the class folders"),
        told(empty, f"folders without {found.called} passed over"),
    )
    return Layout(tuple(classes), placed, tuple(note for note in notes if note), wrapper)


def path_order(path: str) -> tuple[list[int | str], str]:
    """timm's natural order; names that differ only in case, which it leaves to chance, by their letters."""
    return natural_order(path), path


def natural_order(path: str) -> list[int | str]:
    """What timm sorts names by, `9` before `10`; of a digit that is no decimal, such as `²`, timm's own would raise."""
    # More digits than this in a row, which an archive's names may have, Python's int refuses.
    return [int(part[:4_000]) if part.isdecimal() else part for part in re.split(r"(\d+)", path.lower())]


def _is_hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def _leftover(folder: str) -> str:
    """The part of a path that some system left behind; empty where none did."""
    parts = folder.split("/")
    first = next((place for place, part in enumerate(parts) if part.casefold() in LEFTOVERS), len(parts))
    return "/".join(parts[: first + 1]) if first < len(parts) and not _is_hidden(folder) else ""


def _wrapper_depth(folders: Iterable[tuple[str, ...]], images: Iterable[tuple[str, ...]]) -> int:
    """How many folders stand one in the other, alone and without images of their own, above the class folders."""
    by_depth = Counter(len(parts) for parts in folders)
    with_images = {len(parts) - 1 for parts in images}
    depth = 0
    # The only folder at the next depth, with folders in it, and no images in it or beside it.
    while by_depth[depth + 1] == 1 and by_depth[depth + 2] and not {depth, depth + 1} & with_images:
        depth += 1
    return depth


def _nothing_found(name: str, outside: Sequence[str], files: int, called: str) -> str:
    if outside:
        return (
            f"{name!r} holds {called} ({quoted(outside)}) but not in class folders: expected one sub-folder a class; "
            "move them into folders named after their classes"
        )
    kinds = ", ".join(EXTENSIONS)
    return f"{name!r} holds no images (other files: {files}): expected one sub-folder a class with {kinds} files"


def told(paths: Iterable[str], what: str) -> str:
    """A note on some paths: what became of them, how many they are, and the first few; empty where there are none."""
    names = sorted(paths, key=path_order)
    return f"{what}: {len(names)} ({quoted(names)})" if names else ""


def scan_folder(root: Path) -> Listing:
    """Lists a folder, however deep. Links are followed, save those that lead back up; hidden folders and what systems
    leave behind, which often may not be read, are not entered.

    Raises:
        DataError: A folder may not be read, or folders link to each other, so that one is reached again and again.
    """
    # Folders are known by device and number: to resolve the links of a path takes long where it has many parts.
    listing, reached = Listing(), Counter[tuple[int, int]]()
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    try:
        while waiting:
            prefix, above = waiting.pop()
            status = (root / prefix).stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                continue
            reached[here] += 1
            if reached[here] > MOST_PATHS:
                raise DataError(f"the folders in {str(root)!r} link to each other: {shorten(prefix[:-1])} is one of "
                                f"over {MOST_PATHS} paths to one folder; remove links between them")  # fmt: skip
            folders = _scan_into(listing, root / prefix, prefix)
            waiting += ((f"{folder}/", above | {here}) for folder in folders)
    except OSError as error:
        raise DataError(
            f"cannot read the folder {one_line(repr(error.filename))}: {error.strerror or error}; give a folder that "
            "you may read"
        ) from error
    return listing


def _scan_into(listing: Listing, folder: Path, prefix: str) -> list[str]:
    """Adds what lies directly in a folder; the folders to be entered next."""
    inner = []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if _is_folder(entry):
                if not entry.name.startswith("."):
                    listing.folders.add(path)
                if not (entry.name.startswith(".") or _leftover(entry.name)):
                    inner.append(path)
            # A link to nowhere, or in circles, counts as a file that cannot be read.
            elif entry.is_symlink() or entry.is_file():
                listing.files[path] = (0, 0)
            else:
                listing.others.append(path)
    return inner


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        if entry.is_symlink():
            return False
        raise
