"""What a folder or an archive holds, and the class folders and images among it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from timm.utils.misc import natural_key

from tokencut.errors import DataError
from tokencut.messages import quoted

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass
class Listing:
    """What a folder or an archive holds, by paths relative to it, with `/` between their parts.

    Attributes:
        files: The plain files; in an archive with where their bytes start and how many they are.
        folders: The folders, empty ones too.
        others: What is neither: links in an archive, sockets, devices.
    """

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """What a source holds, in timm's natural order.

    Attributes:
        classes: The class folders, empty ones too.
        images: The path of each image, and the index of its class in `classes`.
        notes: What was passed over, and why; which classes are empty.
    """

    classes: tuple[str, ...]
    images: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()


def arrange(name: str, listing: Listing) -> Layout:
    """Finds classes and images in a listing.

    The classes are the top folders; a folder that merely wraps them (`val/` in a tar of `val`) is stepped into, and
    images in folders below a class belong to it. Hidden files and folders (`.name`) are passed over.

    Args:
        name: The source as the user wrote it, for messages.
        listing: All that the source holds.

    Raises:
        DataError: There are no images, or none inside class folders.
    """
    visible = [path for path in listing.files if not _is_hidden(path.rpartition("/")[0])]
    wanted = [path for path in visible if path.lower().endswith(EXTENSIONS)]
    hidden = [path for path in wanted if _is_hidden(path)]
    images = {path: tuple(path.split("/")) for path in wanted if not _is_hidden(path)}
    folders = {tuple(path.split("/")) for path in listing.folders if not _is_hidden(path)}
    folders |= {tuple(path.split("/")[:-1]) for path in visible}  # an archive need not list its folders
    folders = {parts[:depth] for parts in folders for depth in range(1, len(parts) + 1)}
    depth = _wrapper_depth(folders, images.values())
    classes = sorted({parts[depth] for parts in folders if len(parts) > depth}, key=_order)
    outside = [path for path, parts in images.items() if len(parts) == depth + 1]
    inside = sorted((path for path, parts in images.items() if len(parts) > depth + 1), key=_order)
    if not inside:
        raise DataError(_nothing_found(name, outside, len(listing.files)))
    number = {folder: index for index, folder in enumerate(classes)}
    placed = tuple((path, number[images[path][depth]]) for path in inside)
    filled = {target for _, target in placed}
    empty = [folder for folder, target in number.items() if target not in filled]
    extensions = set(visible) - set(wanted)
    notes = (
        _note(extensions, "files passed over for their extension"),
        _note(hidden, "hidden images passed over"),
        _note(listing.others, "links or special files passed over"),
        _note(outside, "images passed over outside the class folders"),
        _note(empty, "class folders without images"),
    )
    return Layout(tuple(classes), placed, tuple(note for note in notes if note))


def _order(path: str) -> tuple[list[int | str], str]:
    """timm's natural order; names that differ only in case, which it leaves to chance, by their letters."""
    return natural_key(path), path


def _is_hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def _wrapper_depth(folders: Iterable[tuple[str, ...]], images: Iterable[tuple[str, ...]]) -> int:
    """How many folders stand one in the other, alone and without images of their own, above the class folders."""
    by_depth = Counter(len(parts) for parts in folders)
    with_images = {len(parts) - 1 for parts in images}
    depth = 0
    # The only folder at the next depth, with folders in it, and no images in it or beside it.
    while by_depth[depth + 1] == 1 and by_depth[depth + 2] and not {depth, depth + 1} & with_images:
        depth += 1
    return depth


def _nothing_found(name: str, outside: Sequence[str], files: int) -> str:
    if outside:
        return (
            f"{name!r} holds images ({quoted(outside)}) but not in class folders: expected one sub-folder a class; "
            "move them into folders named after their classes"
        )
    kinds = ", ".join(EXTENSIONS)
    return f"{name!r} holds no images (other files: {files}): expected one sub-folder a class with {kinds} files"


def _note(paths: Iterable[str], what: str) -> str:
    names = sorted(paths, key=_order)
    return f"{what}: {len(names)} ({quoted(names)})" if names else ""


def scan_folder(root: Path) -> Listing:
    """Lists a folder. Links are followed, save those that lead back up; hidden folders are not entered."""
    listing = Listing()
    try:
        _scan_into(listing, root, "", frozenset())
    except OSError as error:
        raise DataError(
            f"cannot read the folder {error.filename!r}: {error.strerror or error}; give a folder that you may read"
        ) from error
    return listing


def _scan_into(listing: Listing, folder: str | os.PathLike[str], prefix: str, above: frozenset[str]) -> None:
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if entry.is_dir():
                if not entry.name.startswith("."):
                    listing.folders.add(path)
                    _scan_into(listing, entry.path, f"{path}/", above | {here})
            elif entry.is_file() or entry.is_symlink():  # a link to nowhere counts as a file that cannot be read
                listing.files[path] = (0, 0)
            else:
                listing.others.append(path)
