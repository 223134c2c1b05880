"""These images for this model: which of a source, prepared how, and which of the model's classes they show."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Any, TypeVar

import torch
from torch import nn

from tokencut.data.labels import ClassMap, classes_for
from tokencut.data.loading import Batch, ClipDataset, ImageDataset, Loader, Unreadable, make_loader
from tokencut.data.preprocessing import Preprocessing, preprocessing_of
from tokencut.data.sampling import strided_subset
from tokencut.data.sources import Source, open_source
from tokencut.data.videos import require_decoder
from tokencut.errors import DataError
from tokencut.messages import QUOTED, quoted
from tokencut.models.checkpoints import require_finite
from tokencut.models.pretrained_cfg import frames_of, require_head
from tokencut.observers import Observer

# Held in memory up to this size: 14,000 images of 224 px, or 5,000 of 378 px. More are decoded anew for every model.
HELD_BYTES = 2 * 2**30
# Where more than this share of the images cannot be read, what the rest say is not true of the data set.
UNREADABLE_SHARE = 0.01

Failed = TypeVar("Failed")


@dataclass(frozen=True)
class ImageSet:
    """The images that a model is to see.

    Attributes:
        source: Where they come from.
        indices: Their numbers in the source, in the order in which they are seen.
        prepared: The model's preprocessing.
        class_map: Which class each folder stands for; None where that is not known or does not count.
    """

    source: Source
    indices: Sequence[int]
    prepared: Preprocessing
    class_map: ClassMap | None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def name(self) -> str:
        """The source as the user wrote it."""
        return self.source.name

    def dataset(self, **transform: Any) -> ImageDataset:
        """The images one by one, decoded and transformed; without known classes, all of class 0.

        Args:
            transform: As `Preprocessing.transform` takes it, for training; by default as the model is judged.
        """
        targets = self.class_map.targets if self.class_map else [0] * len(self.source.classes)
        made = self.prepared.transform(**transform)
        chosen: dict[str, Any] = {"targets": targets, "indices": self.indices, "mode": self.prepared.mode}
        if self.prepared.frames is not None:
            return ClipDataset(self.source, made, self.prepared.frames, **chosen)
        return ImageDataset(self.source, made, **chosen)

    def batches(
        self, batch_size: int, *, workers: int | None = None, device: torch.device | None = None, held_bytes: int = 0
    ) -> HeldBatches:
        """The images in batches, of bytes as the transform left them; none is decoded yet.

        Args:
            batch_size: Images a batch.
            workers: Processes that decode; one a processor, 4 at most, where None.
            device: Where they are to go.
            held_bytes: What may be held in memory for further passes, in bytes; where more is needed, nothing is.

        Raises:
            UsageError: The batch size or the number of workers is out of range.
        """
        hold = len(self) * self.source.views * prod(self.prepared.input_shape) <= held_bytes
        # Page-locked memory is scarce, and held batches would all lie in it.
        pin = device is not None and device.type == "cuda" and not hold
        loader = make_loader(self.dataset(), batch_size=batch_size, workers=workers, pin_memory=pin)
        return HeldBatches(loader, hold=hold)

    def decoded(self, batch_size: int, *, workers: int | None = None, otherwise: str) -> Iterator[Batch]:
        """The batches, for a use that any of the images will do for.

        Args:
            batch_size: Images a batch.
            workers: See `batches`.
            otherwise: What to do where there is none; the end of the error.

        Raises:
            DataError: None of them can be decoded.
            UsageError: See `batches`.
        """
        found, unreadable = 0, list[Unreadable]()
        with closing(iter(self.batches(batch_size, workers=workers))) as batches:
            for batch in batches:
                found += len(batch)
                unreadable += batch.unreadable
                yield batch
        if not found:
            raise DataError(f"none of {len(self)} {self.source.holds} in {self.name!r} can be decoded, such as "
                            f"{quoted(self.filenames(unreadable))}; {otherwise}")  # fmt: skip

    def filenames(self, images: Collection[Unreadable]) -> list[str]:
        """The names of some images."""
        return [self.source.filename(image.index) for image in images]

    def check_unreadable(self, unreadable: Collection[Unreadable], of: int | None = None) -> None:
        """Refuses images of which too many could not be read.

        Args:
            unreadable: Those images.
            of: How many there are in all, where these are a part.

        Raises:
            DataError: More than 1 % are unreadable.
        """
        check_unreadable(self.name, unreadable, of or len(self), self.told, self.source.holds)

    def told(self, image: Unreadable) -> str:
        """An image that could not be decoded: its name, and why."""
        return f"{self.source.filename(image.index)!r} ({image.reason})"

    def notes(
        self, unreadable: Collection[Unreadable] = (), lying: Collection[int] = (), short: Collection[int] = ()
    ) -> tuple[str, ...]:
        """What has to be said of them: their classes, a sample, those that could not be decoded or lie on their side.

        Args:
            unreadable: Images that could not be decoded.
            lying: The numbers of those that were seen as they are stored, though their EXIF says to turn them.
            short: The numbers of the videos that were too short for a clip.
        """
        called = self.source.holds
        sample = sample_note(len(self), len(self.source), called) if len(self) < len(self.source) else ""
        skipped = (
            f"{called} skipped, since they could not be decoded: {len(unreadable)} of {len(self)} "
            f"({quoted(self.filenames(unreadable))})" if unreadable else ""
        )  # fmt: skip
        classes = self.class_map.notes if self.class_map else ()
        turned = (
            f"images seen as they are stored, as timm sees them, though their EXIF says to turn them: {len(lying)} of "
            f"{len(self)} ({quoted([self.source.filename(index) for index in lying])}); turn the files themselves to "
            "have them seen upright" if lying else ""
        )  # fmt: skip
        repeated = (
            f"videos too short for a clip of {self.prepared.frames} frames at a stride of {self.source.stride}, whose "
            f"last frame was repeated: {len(short)} of {len(self)} "
            f"({quoted([self.source.filename(index) for index in short])}); a smaller `frame_stride` fits them"
            if short else ""
        )  # fmt: skip
        return tuple(note for note in (*self.source.notes, *classes, sample, skipped, turned, repeated) if note)

    def digest(self, observer: Observer | None = None) -> str:
        """SHA-256 of the encoded images, in order, with the names and classes they go by; how clips are taken counts.

        Args:
            observer: Told how many are read.
        """
        digest, told = hashlib.sha256(), observer or Observer()
        if self.source.videos:
            digest.update(b"%d %d\0" % (self.source.stride, self.source.views))
        for done, index in enumerate(self.indices, start=1):
            digest.update(self._content(index))
            told.progress("reading the images", done, len(self), {})
        return digest.hexdigest()

    def _content(self, index: int) -> bytes:
        name = os.fsencode(self.source.filename(index))
        try:
            file, folder = self.source[index]
            with file:
                content = hashlib.sha256(file.read()).digest()
        except OSError:  # judging skips it and says so
            return name + b"\0unreadable\0"
        return name + b"\0%d\0" % (self.class_map.targets[folder] if self.class_map else 0) + content


class HeldBatches:
    """Batches that are loaded when first gone through, and come from memory from then on where they fit.

    Attributes:
        held: Whether they are in memory.
    """

    def __init__(self, loader: Loader, *, hold: bool) -> None:
        self._loader = loader
        self._hold = hold
        self._kept: list[Batch] | None = None

    @property
    def held(self) -> bool:
        return self._kept is not None

    def __iter__(self) -> Generator[Batch, None, None]:
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        with closing(iter(self._loader)) as batches:
            for batch in batches:
                if self._hold:
                    # Copies: what a worker process hands over lies in shared memory, of which there may be little, each
                    # tensor in an open file of its own.
                    kept.append(replace(batch, images=batch.images.clone(), targets=batch.targets.clone(),
                                        indices=batch.indices.clone()))  # fmt: skip
                yield batch
        if self._hold:
            self._kept = kept


def images_for(
    model: nn.Module,
    source: Source,
    class_map: ClassMap | None = None,
    *,
    limit: int | None = None,
    seed: int | None = None,
) -> ImageSet:
    """Some images of a source, as a model takes them.

    Args:
        model: The model.
        source: Where they come from.
        class_map: Which class each folder stands for, where that counts (`classes_for`).
        limit: An evenly spread sample of so many; all where None, or where there are fewer.
        seed: Puts them in an order of chance: sources are ordered by class. In the source's order where None.

    Raises:
        ModelError: The model takes neither colour nor grey images.
        DataError: It takes clips and they are images, or the other way round.
        TokencutError: They are videos, and nothing is installed that decodes them.
        UsageError: The limit is out of range.
    """
    indices = strided_subset(len(source), limit)
    if seed is not None:
        random.Random(seed).shuffle(indices)
    images = ImageSet(source, indices, preprocessing_of(model), class_map)
    _check_kind(source, model)
    _ = images.prepared.mode  # a model that no image can be read for is refused before any work
    return images


def open_images(
    model: nn.Module,
    data: str | os.PathLike[str] | Source,
    *,
    limit: int | None = None,
    observer: Observer | None = None,
) -> ImageSet:
    """Finds the images that a classifier is to be judged on.

    Args:
        model: The classifier.
        data: As `open_source` takes it.
        limit: An evenly spread sample of so many images.
        observer: Told what takes long: the unpacking of an archive.

    Raises:
        ModelError: The model has no classification head, takes neither colour nor grey images, or its weights are not
            finite.
        DataError: The images cannot be found, or do not fit the model's classes.
        UsageError: The limit is out of range.
    """
    require_head(model)  # before anything is unpacked
    require_finite(model)
    source = open_source(data, observer=observer)
    _check_kind(source, model)  # before anything is said of classes
    return images_for(model, source, classes_for(model, source), limit=limit)


def _check_kind(source: Source, model: nn.Module) -> None:
    """Refuses images for a model of clips, and videos for one of images."""
    frames = frames_of(model)
    if frames is None and source.videos:
        raise DataError(f"{source.name!r} holds videos, and the model takes images; give images, or a model of clips, "
                        "such as VideoMAE; eval and predict have one of images see frames by `frames=8`")  # fmt: skip
    if frames is not None and not source.videos:
        raise DataError(f"{source.name!r} holds images, and the model takes clips of {frames} frames; give a folder "
                        "with one sub-folder a class, with .mp4, .webm or other videos in them")  # fmt: skip
    if source.videos:
        require_decoder(source.name)


def check_unreadable(
    data: str, unreadable: Collection[Failed], total: int, told: Callable[[Failed], str], holds: str = "images"
) -> None:
    """Refuses images of which too many could not be read.

    Args:
        data: What they are called.
        unreadable: Those images.
        total: How many there are in all.
        told: What the message calls one of them.
        holds: What they are, `images` or `videos`.

    Raises:
        DataError: More than 1 % are unreadable.
    """
    if len(unreadable) > UNREADABLE_SHARE * total:
        named = ", ".join(map(told, islice(unreadable, QUOTED)))
        raise DataError(
            f"at least {len(unreadable)} of {total} {holds} in {data!r} cannot be decoded, and at most 1 % may be: "
            f"{named}; mend or remove them and run this again"
        )


def sample_note(sampled: int, total: int, called: str = "images") -> str:
    """What is said where not all images are seen."""
    return f"an evenly spread sample of {sampled} of {total} {called}"
