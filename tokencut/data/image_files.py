"""The single images that pictures are drawn of: named one by one, all that is wrong with them told at once."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import Image

from tokencut.data.listing import Layout, find_images, is_video, path_order, scan_folder
from tokencut.data.own_pictures import set_apart, start_of_file
from tokencut.data.preprocessing import FORMATS, UnreadableImageError, decode
from tokencut.data.sources import DIGITS, DigitsSource, Source
from tokencut.errors import DataError
from tokencut.files import open_plain, user_path
from tokencut.messages import listed

# So many of the test images stand for the word `digits`.
DIGITS_DRAWN = 4

_GIVE = f"give {', '.join(FORMATS[:-1])} or {FORMATS[-1]} files, or the word {DIGITS}"

Made = TypeVar("Made")


@dataclass(frozen=True)
class Photo:
    """An image to be drawn.

    Attributes:
        name: As the user wrote it.
        opened: Opens its encoded bytes.
        upright: Whether it is turned as its EXIF says.
    """

    name: str
    opened: Callable[[], BinaryIO]
    upright: bool = True


PhotoLike = str | os.PathLike[str] | Photo


def find_photos(images: Sequence[PhotoLike]) -> list[Photo]:
    """What the words on a command line name; nothing is read yet, but the bundled digits.

    Args:
        images: Paths of image files, or the word `digits` for the first of its test images (`./digits` is a file).

    Raises:
        DataError: The digits are asked for and scikit-learn, which holds them, is not installed.
    """
    found: list[Photo] = []
    for image in images:
        if isinstance(image, Photo):
            found.append(image)
        elif image == DIGITS:
            source = DigitsSource("test")
            found += [photo_of(source, index) for index in range(DIGITS_DRAWN)]
        else:
            found.append(Photo(os.fspath(image), partial(open_plain, user_path(image))))
    return found


class PhotoSource(Source):
    """Single photos, and all that are in some folders, upright: a source whose images are of no class."""

    upright = True

    def __init__(self, images: Sequence[PhotoLike]) -> None:
        """Finds the photos.

        Args:
            images: As `find_photos` takes them; of a folder, the images in it at any depth are meant.

        Raises:
            DataError: One does not exist, is no file, or is a folder without images: each such is named.
        """
        self._photos: list[Photo] = []
        notes: list[str] = []
        failures: list[str] = []
        for image in images:
            photos, passed, failure = _enter(image)
            self._photos += photos
            notes += passed
            failures += failure
        if failures:
            raise DataError(f"cannot read {', '.join(failures)}; {_GIVE}, or folders of them")
        names = [os.fspath(image) for image in images if not isinstance(image, Photo)]
        placed = tuple((photo.name, 0) for photo in self._photos)
        super().__init__(listed(names) or "photos", Layout(("",), placed, tuple(notes)))

    def open(self, index: int) -> BinaryIO:
        """Opens the photo's file."""
        return self._photos[index].opened()


def _enter(image: PhotoLike) -> tuple[list[Photo], Sequence[str], list[str]]:
    """The photos that a word names, what was passed over, and what is wrong with it."""
    if isinstance(image, Photo) or image == DIGITS:
        return find_photos([image]), (), []
    name, path = os.fspath(image), user_path(image)
    try:
        if path.is_dir():
            found = find_images(set_apart(scan_folder(path), start_of_file(path)))
            inner = sorted(found.images, key=path_order)
            photos = find_photos([str(Path(name) / one) for one in inner])
            return photos, found.notes, [] if photos else [f"{name!r} (no images in it)"]
        open_plain(path).close()
    except FileNotFoundError:
        return [], (), [f"{name!r} (does not exist)"]
    except OSError as error:
        return [], (), [f"{name!r} ({error.strerror or error})"]
    return find_photos([image]), (), []


def photo_of(source: Source, index: int) -> Photo:
    """An image of a source, named `SOURCE:PATH`, as it is judged."""
    return Photo(f"{source.name}:{source.filename(index)}", partial(source.open, index), source.upright)


def read_photos(photos: Sequence[Photo], mode: str, use: Callable[[Image.Image], Made]) -> list[Made]:
    """Decodes images one after the other, so that only one is held in memory at full size.

    Args:
        photos: The images.
        mode: Pillow's mode to decode to.
        use: What to make of each.

    Raises:
        DataError: Some cannot be read: each of them is named, with the reason.
    """

    def read(photo: Photo) -> Made:
        with photo.opened() as file:
            # Whole first: a decoder that fails on a socket or a device says less than reading does.
            content = io.BytesIO(file.read())
        return use(decode(content, mode, upright=photo.upright))

    return read_all(photos, read)


def read_all(photos: Sequence[Photo], read: Callable[[Photo], Made]) -> list[Made]:
    """Reads images, or videos, one after the other.

    Args:
        photos: What to read.
        read: Reads one.

    Raises:
        DataError: Some cannot be read: each of them is named, with the reason.
    """
    made, failures = [], []
    for photo in photos:
        try:
            made.append(read(photo))
        except IsADirectoryError:
            failures.append(f"{photo.name!r} (a folder; name the files in it, such as {Path(photo.name) / '*.jpg'})")
        except FileNotFoundError:
            failures.append(f"{photo.name!r} (does not exist)")
        except OSError as error:
            failures.append(f"{photo.name!r} ({error.strerror or error})")
        except UnreadableImageError as error:
            failures.append(f"{photo.name!r} ({error})")
    if failures:
        raise DataError(
            f"{len(failures)} of {len(photos)} image{'s' * (len(photos) != 1)} cannot be drawn: {', '.join(failures)}; "
            f"{_GIVE}"
        )
    return made


def check_photos(photos: Sequence[Photo]) -> None:
    """Refuses images that cannot be read, before any work is done for them; videos are left to the model that asks.

    Raises:
        DataError: As `read_photos`.
    """
    read_photos([photo for photo in photos if not is_video(photo.name)], "RGB", lambda image: None)
