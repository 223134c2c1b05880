"""Where images come from: a folder with one sub-folder a class, an archive of one, a list, or the bundled digits."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from timm.data.readers.reader import Reader

from tokencut.data import archives
from tokencut.data.image_lists import METADATA, is_list, labels_images, read_list
from tokencut.data.listing import Layout, find_classes, is_video, scan_folder
from tokencut.data.own_pictures import START, set_apart, start_of_file
from tokencut.data.sampling import stratified
from tokencut.data.zips import is_zip, read_member, read_start, scan_zip
from tokencut.errors import DataError, UsageError
from tokencut.files import open_plain, unlike_a_file, user_path
from tokencut.limits import check_number
from tokencut.messages import quoted
from tokencut.observers import Observer

DIGITS = "digits"
CLASS_MAP = "give a text file with the name of a class folder in each line, in the order of the model's classes"
EXPECTED = (
    "a folder with one sub-folder a class, a .tar, .tar.gz or .zip of one, a .csv list of images, or the word digits"
)


class Source(Reader):
    """Images by number, in natural order, with the class folder of each: a timm reader.

    `source[i]` is the i-th image's encoded bytes, as a file, and its index into `classes`. A source holds no open file,
    so the worker processes of a loader can share it.

    Attributes:
        name: The source as the user wrote it.
        classes: The class folders.
        notes: What a user should know: files passed over, classes without images.
        class_order: The folders' names in the order of a model's classes, where the user told it.
        wrapper: The names of the folders around the class folders, the outermost first.
        upright: Whether images are turned as their EXIF says. Single photos are; sets of images are read as timm reads
            them, which does not, so that an accuracy is timm's.
        videos: Whether they are videos, and no images.
        stride: Of videos, the frames from one of a clip to the next.
        views: Of videos, the clips that are taken from each, whose probabilities are averaged.
    """

    upright = False
    # What messages call a class.
    called = "folder"
    # Of videos, how a clip is taken from them: `Sampling.stride` and `Sampling.views`.
    stride, views = 4, 1

    def __init__(self, name: str, layout: Layout) -> None:
        super().__init__()
        self.name = name
        self.classes = layout.classes
        self.notes = layout.notes
        self.wrapper = layout.wrapper
        self.class_order: tuple[str, ...] = ()
        self._images = layout.images
        self.videos = bool(layout.images) and is_video(layout.images[0][0])

    @property
    def holds(self) -> str:
        """What is in it, for messages."""
        return "videos" if self.videos else "images"

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.open(index), self._images[index][1]

    def sample(self, frame_stride: int | None, views: int | None) -> None:
        """Says how clips are taken from videos; as it is where None.

        Raises:
            UsageError: A number is out of range, or there are no videos.
        """
        for name, value in (("frame_stride", frame_stride), ("views", views)):
            if value is not None:
                check_number(name, value)
                if not self.videos:
                    raise UsageError(f"`{name}` says how clips are taken from videos, and {self.name!r} holds images; "
                                     "leave it out")  # fmt: skip
        self.stride, self.views = frame_stride or self.stride, views or self.views

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """Opens the i-th image's encoded bytes."""

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self._images[index][0]
        return PurePosixPath(path).name if basename else path


class FolderSource(Source):
    """Images in a folder with one sub-folder a class."""

    def __init__(self, name: str, root: Path) -> None:
        super().__init__(name, find_classes(name, set_apart(scan_folder(root), start_of_file(root))))
        self.root = root

    def open(self, index: int) -> BinaryIO:
        """Opens the image's file."""
        return open_plain(self.root / self._images[index][0])

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return str(self.root / self._images[index][0]) if absolute else super()._filename(index, basename)


def read_span(file: BinaryIO, start: int, size: int) -> bytes:
    """So many bytes of a file from a place on; fewer where it ends."""
    file.seek(start)
    return file.read(size)


class TarSource(Source):
    """Images in an uncompressed tar archive, read where it lies."""

    def __init__(self, name: str, path: Path) -> None:
        listing = archives.scan(path)
        with path.open("rb") as archive:
            set_apart(listing, lambda name: read_span(archive, listing.files[name][0], START))
        super().__init__(name, find_classes(name, listing))
        self.path = path
        self._spans = [listing.files[image] for image, _ in self._images]

    def open(self, index: int) -> BinaryIO:
        """Reads the image's bytes. To open the archive each time takes microseconds, and no process shares a handle."""
        start, size = self._spans[index]
        with self.path.open("rb") as archive:
            return io.BytesIO(read_span(archive, start, size))


class ZipSource(Source):
    """Images in a zip archive, read where it lies."""

    def __init__(self, name: str, path: Path) -> None:
        listing, members = scan_zip(path)
        with path.open("rb") as archive:
            set_apart(listing, lambda name: read_start(archive, members[name], START))
        super().__init__(name, find_classes(name, listing))
        self.path = path
        self._members = [members[image] for image, _ in self._images]

    def open(self, index: int) -> BinaryIO:
        """Reads and unpacks the image's bytes, whose place is known: the directory is read once."""
        with self.path.open("rb") as archive:
            return io.BytesIO(read_member(archive, self._members[index]))


class ListSource(Source):
    """Images that a list names, with their labels."""

    called = "label"

    def __init__(self, name: str, path: Path, root: str | os.PathLike[str] | None = None) -> None:
        found = read_list(path, root)
        super().__init__(name, found.layout)
        self._places = found.places

    def open(self, index: int) -> BinaryIO:
        """Opens the image's file."""
        return open_plain(self._places[index])

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return str(self._places[index]) if absolute else super()._filename(index, basename)


class DigitsSource(Source):
    """The bundled handwritten digits, held in memory."""

    def __init__(self, split: str) -> None:
        from tokencut.data import digits

        images, labels = digits.images(split)
        names = [(f"{digits.LABELS[label]}/{number:04}.png", label) for number, label in enumerate(labels)]
        super().__init__(DIGITS, Layout(tuple(digits.LABELS), tuple(names)))
        self._encoded = []
        for image in images:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            self._encoded.append(buffer.getvalue())

    def open(self, index: int) -> BinaryIO:
        """The image as PNG, which loses nothing."""
        return io.BytesIO(self._encoded[index])


def read_class_map(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads the order of classes from a text file, as timm's class maps are: a folder's name a line, class 0 first.

    Raises:
        DataError: It cannot be read, is no text, or names a class twice or none.
    """
    try:
        with open_plain(user_path(path)) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"cannot read the class map {path}: {reason}; {CLASS_MAP}") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        what = f"has {quoted(twice)} twice" if twice else "is empty"
        raise DataError(f"the class map {path} {what}; {CLASS_MAP}")
    return tuple(names)


def open_source(
    data: str | os.PathLike[str] | Source,
    *,
    split: str = "test",
    observer: Observer | None = None,
    class_map: str | os.PathLike[str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    frame_stride: int | None = None,
    views: int | None = None,
) -> Source:
    """Finds the images to judge, train or search by.

    Args:
        data: A folder with one sub-folder a class, a `.tar`, `.tar.gz` or `.zip` of one (known by content, not name), a
            `.csv` list of images with labels (see `read_list`) or a folder with such a `metadata.csv` in it, the word
            `digits` (`./digits` is a folder of that name), or a source, which is returned as it is.
        split: The part of `digits`: `"test"`, or `"train"` for training and calibration.
        observer: Told what takes long: the unpacking of an archive.
        class_map: A text file with the folders' names in the order of the model's classes, see `read_class_map`.
        image_root: The folder that the paths of a list are relative to; the list's own where None.
        frame_stride: Of videos, the frames from one of a clip to the next; 4 where None.
        views: Of videos, the clips that are taken from each; 1 where None.

    Returns:
        The images, or videos, with at least one among them.

    Raises:
        DataError: There is no such folder or file, it is of another kind, or it holds no images in class folders.
    """
    if isinstance(data, Source):
        return data
    if class_map is not None:
        order = read_class_map(class_map)
        source = open_source(data, split=split, observer=observer, image_root=image_root, frame_stride=frame_stride,
                             views=views)  # fmt: skip
        source.class_order = order
        return source
    if frame_stride is not None or views is not None:
        source = open_source(data, split=split, observer=observer, image_root=image_root)
        source.sample(frame_stride, views)
        return source
    if data == DIGITS:
        return DigitsSource(split)
    name, path = os.fspath(data), user_path(data)
    if path.is_dir():
        listed = path / METADATA
        if not labels_images(listed, image_root):
            return FolderSource(name, path)
        source = ListSource(name, listed, image_root)
        source.notes += (f"labels are those in {METADATA}, as Hugging Face writes it",)
        return source
    what = unlike_a_file(path)
    if what is not None:
        raise DataError(f"no images at {name!r}: it {what}; expected {EXPECTED}")
    try:
        if archives.is_gzip(path):
            return FolderSource(name, archives.unpack(path, observer))
        if archives.is_tar(path):
            return TarSource(name, path)
        if is_zip(path):
            return ZipSource(name, path)
        if is_list(path):
            return ListSource(name, path, image_root)
    except OSError as error:
        raise DataError(f"cannot read {name!r}: {error.strerror or error}; give a file that you may read") from error
    raise DataError(f"{name!r} is a file of an unknown kind: expected {EXPECTED}")


def check_apart(output: Path, *sources: Source | None) -> None:
    """Refuses an output among images, where the next run would take it for a class or an image.

    Args:
        output: A file or folder to be written.
        sources: Where the images of this run come from.

    Raises:
        DataError: It lies in the folder of one of them.
    """
    place = output.resolve()
    for source in sources:
        if isinstance(source, FolderSource) and place.is_relative_to(root := source.root.resolve()):
            raise DataError(f"{output} would lie among the images of {source.name!r}, where the next run would take it "
                            f"for one of them; give a place outside, such as {root.parent / output.name}")  # fmt: skip


class Subset(Source):
    """Some images of a source, renumbered."""

    def __init__(self, whole: Source, indices: Sequence[int]) -> None:
        chosen = tuple(whole._images[index] for index in indices)
        super().__init__(whole.name, Layout(whole.classes, chosen, whole.notes, whole.wrapper))
        self.class_order = whole.class_order
        self.upright, self.called = whole.upright, whole.called
        self.stride, self.views = whole.stride, whole.views
        self.whole = whole
        self.indices = tuple(indices)

    def open(self, index: int) -> BinaryIO:
        """Opens the image in the whole source."""
        return self.whole.open(self.indices[index])

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.whole._filename(self.indices[index], basename, absolute)

    def folders(self) -> list[int]:
        """The class folder of each image."""
        return [folder for _, folder in self._images]


def hold_out(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """Splits a source by chance, with every class in proportion.

    Args:
        source: All images.
        share: The share that is held out.
        seed: Another seed, another split.

    Returns:
        The images to train on, and those held out.

    Raises:
        DataError: One of the two would be empty.
    """
    labels = Subset(source, range(len(source))).folders()
    held = stratified(labels, round(share * len(labels)), seed)
    if not 0 < len(held) < len(labels):
        raise DataError(f"{len(labels)} images in {source.name!r} are too few to hold some out for choosing an epoch; "
                        "type `select='last'`")  # fmt: skip
    apart = set(held)
    return Subset(source, [index for index in range(len(labels)) if index not in apart]), Subset(source, held)
