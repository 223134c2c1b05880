"""Lists of images with their labels, as timm, Hugging Face and spreadsheets write them: which columns, which files."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokencut.data.listing import EXTENSIONS, Layout, path_order, told
from tokencut.errors import DataError
from tokencut.files import open_plain, user_path
from tokencut.messages import listed, one_line, quoted

# Hugging Face's name for the list that lies among the images of a folder.
METADATA = "metadata.csv"
PATHS = ("file_name", "filename", "file", "path", "image", "image_path", "img_path", "filepath")
LABELS = ("label", "class", "class_name", "label_name", "category", "target")
DELIMITERS = (",", ";", "\t", "|")
# Where more than this share of the files is missing, it is the folder that is wrong, and not the files.
MISSING_SHARE = 0.01
EXPECTED = f"a list has a line of column names, with {PATHS[0]} and {LABELS[0]}, or two columns, a file and its label"


@dataclass(frozen=True)
class ImageList:
    """A list, read: its images in natural order and its labels as classes, and where each image's file is."""

    layout: Layout
    places: tuple[Path, ...]


def is_list(path: Path) -> bool:
    """Whether a file is named as lists of images are."""
    return path.suffix.lower() in (".csv", ".tsv")


def labels_images(path: Path, root: str | os.PathLike[str] | None = None) -> bool:
    """Whether a file that lies among images is a list of them with labels, by its first lines; not what cannot be read.

    Args:
        path: The file.
        root: See `read_list`.
    """
    try:
        with open_plain(path) as file:
            rows = _rows(path, _text(path, file.read(1 << 16), errors="ignore"))
    except (OSError, DataError):
        return False
    if len(rows) < 2:
        return False
    place, label = _column(rows[0], PATHS), _column(rows[0], LABELS)
    if place is None or label is None or len(rows[1]) <= place:
        return False
    return _place(path.parent if root is None else user_path(root), rows[1][place]).is_file()


def read_list(path: Path, root: str | os.PathLike[str] | None = None) -> ImageList:
    """Reads a list of images with their labels.

    Columns are known by name, in any order and with others beside them; commas, semicolons, tabs and bars part them. A
    list without names has two columns, of which the first holds files.

    Args:
        path: The list, in UTF-8 or, with a byte order mark, UTF-16.
        root: The folder that its paths are relative to; the list's own where None.

    Raises:
        DataError: It cannot be read, lacks a column, a label or images, gives a file two labels, or more than 1 % of
            the files do not exist.
    """
    folder = path.parent if root is None else user_path(root)
    try:
        with open_plain(path) as file:
            rows = _rows(path, _text(path, file.read()))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; give a file that you may read") from error
    labels, again = _labels(path, rows)
    names = sorted(labels, key=path_order)
    places = tuple(_place(folder, name) for name in names)
    missing = [name for name, place in zip(names, places, strict=True) if not place.exists()]
    if len(missing) > MISSING_SHARE * len(names):
        where = "" if root is None else f" in {os.fspath(root)!r}"
        raise DataError(
            f"{len(missing)} of the {len(names)} files in {path} do not exist{where}, such as {quoted(missing)}; give "
            "the folder that its paths are relative to, `image_root='DIR'`"
        )
    classes = sorted(set(labels.values()), key=path_order)
    number = {label: index for index, label in enumerate(classes)}
    placed = tuple((name, number[labels[name]]) for name in names)
    notes = (told(again, "images listed more than once, counted once"),)
    return ImageList(Layout(tuple(classes), placed, tuple(filter(None, notes))), places)


def _place(folder: Path, name: str) -> Path:
    """Where a file of a list is; a list that was written on Windows parts folders by backslashes."""
    place = folder / name
    return place if place.exists() or "\\" not in name else folder / name.replace("\\", "/")


def _text(path: Path, content: bytes, errors: str = "strict") -> str:
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        return content.decode("utf-16" if content.startswith(marks) else "utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8; save it again as CSV in UTF-8") from error


def _rows(path: Path, text: str) -> list[list[str]]:
    """The cells of each line that has any, without blanks around them."""
    first = next(iter(text.lstrip().splitlines()), "")
    # The first line tells: of what stands in it, what parts it into the most columns.
    delimiter = max(DELIMITERS, key=first.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=None), delimiter=delimiter))
    except csv.Error as error:
        raise DataError(f"{path} is not a list in CSV ({one_line(error)}); {EXPECTED}") from error
    return [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]


def _column(names: Sequence[str], known: Sequence[str]) -> int | None:
    """The place of the first known name among the names of the columns."""
    plain = [re.sub(r"[\s-]+", "_", name.casefold()) for name in names]
    return next((plain.index(name) for name in known if name in plain), None)


def _labels(path: Path, rows: list[list[str]]) -> tuple[dict[str, str], list[str]]:
    """The label of each file, and the files that are listed more than once.

    Raises:
        DataError: See `read_list`.
    """
    if not rows:
        raise DataError(f"{path} is empty; {EXPECTED}")
    head, body = rows[0], rows[1:]
    file, label = _column(head, PATHS), _column(head, LABELS)
    if file is None and label is None and len(head) == 2 and head[0].lower().endswith(EXTENSIONS):
        file, label, body = 0, 1, rows
    if file is None or label is None:
        what = "images" if file is None else "labels"
        raise DataError(f"{path} has no column of {what} among {listed([repr(name) for name in head], most=6)}; "
                        f"{EXPECTED}")  # fmt: skip
    short = [row for row in body if len(row) <= max(file, label) or not row[file] or not row[label]]
    if short:
        raise DataError(f"{len(short)} of {len(body)} lines in {path} lack a file or a label, such as "
                        f"{quoted([','.join(row) for row in short])}; give each both, or leave them out")  # fmt: skip
    if not body:
        raise DataError(f"{path} lists no images; {EXPECTED}")
    labels: dict[str, str] = {}
    again, twice = list[str](), list[str]()
    for row in body:
        if (name := row[file]) in labels:
            (again if labels[name] == row[label] else twice).append(name)
        labels.setdefault(name, row[label])
    if twice:
        raise DataError(f"{path} gives {quoted(twice)} different labels; give each image one, since accuracies of one "
                        "label an image are all that is measured")  # fmt: skip
    return labels, again
