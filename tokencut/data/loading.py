"""Batches of images from a source, for whoever evaluates, calibrates or trains: decoded, transformed, none replaced."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from tokencut.data.preprocessing import Transform, UnreadableImageError, decode, turn_of
from tokencut.data.sources import Source
from tokencut.data.videos import Sampling, decode_clips
from tokencut.errors import DataError
from tokencut.limits import check_number

# More workers than this rarely help one device, and each holds a copy of the list of images.
MOST_WORKERS = 4


@dataclass(frozen=True)
class Sample:
    """One image: its tensor `(C, H, W)`, its class, its number in the source, and whether it lies as its EXIF tells.

    Of a video `(views, C, frames, H, W)`, and whether it is too short for a clip.
    """

    image: Tensor
    target: int
    index: int
    lies: bool = False
    short: bool = False


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be decoded: its number in the source, and why."""

    index: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """The images of a batch that could be decoded, and those that could not.

    Attributes:
        images: `(B, C, H, W)`, as the transform left them; B is smaller by the unreadable images, and may be 0. Of
            videos `(B, views, C, frames, H, W)`.
        targets: The class of each image, `(B,)`.
        indices: Its number in the source, `(B,)`.
        unreadable: What is missing.
        lying: The numbers of the images that are seen as they are stored, though their EXIF says to turn them.
        short: The numbers of the videos too short for a clip, whose last frame is repeated.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    unreadable: tuple[Unreadable, ...]
    lying: tuple[int, ...] = ()
    short: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def views(self) -> tuple[Tensor, ...]:
        """What a model takes at a time, `(B, C, H, W)`; of videos `(B, C, frames, H, W)` for each of their clips."""
        return tuple(self.images.unbind(1)) if self.images.ndim == 6 else (self.images,)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, for a loader that feeds a GPU."""
        images, targets, indices = (tensor.pin_memory() for tensor in (self.images, self.targets, self.indices))
        return replace(self, images=images, targets=targets, indices=indices)


class ImageDataset(Dataset[Sample | Unreadable]):
    """The images of a source, decoded and transformed.

    timm's dataset puts the next image in the place of one that cannot be read; this one says which and why.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        targets: Sequence[int],
        indices: Sequence[int] | None = None,
        mode: str = "RGB",
    ) -> None:
        """Makes a dataset.

        Args:
            source: Where the images come from.
            transform: From a decoded image to a tensor.
            targets: The class of each class folder, as `map_classes` finds it.
            indices: The numbers of the images to use; all by default.
            mode: Pillow's mode of the images that the transform takes.
        """
        self.source = source
        self.transform = transform
        self.targets = tuple(targets)
        self.indices = range(len(source)) if indices is None else indices
        self.mode = mode

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample | Unreadable:
        index = self.indices[position]
        try:
            file, folder = self.source[index]
            with file:
                return self.read(file, self.targets[folder], index)
        except OSError as error:
            return Unreadable(index, error.strerror or str(error))
        except UnreadableImageError as error:
            return Unreadable(index, str(error))

    def read(self, file: BinaryIO, target: int, index: int) -> Sample:
        """Decodes and transforms one.

        Args:
            file: The encoded image.
            target: Its class.
            index: Its number in the source.

        Raises:
            UnreadableImageError: It cannot be decoded.
        """
        image = decode(file, self.mode, upright=self.source.upright)
        lies = not self.source.upright and turn_of(image) is not None
        return Sample(self.transform(image), target, index, lies)


class ClipDataset(ImageDataset):
    """The videos of a source, decoded to clips and transformed frame by frame."""

    def __init__(self, source: Source, transform: Transform, frames: int, **more: Any) -> None:
        """Makes a dataset.

        Args:
            source: Where the videos come from, and how clips are taken from them.
            transform: From a decoded frame to bytes.
            frames: Frames of a clip.
            more: As `ImageDataset` takes them.
        """
        super().__init__(source, transform, **more)
        self.sampling = Sampling(frames, source.stride, source.views)

    def read(self, file: BinaryIO, target: int, index: int) -> Sample:
        """As `ImageDataset.read`: `Sample.image` is `(views, C, frames, H, W)`."""
        clips, short = decode_clips(file, self.sampling, self.transform, self.mode)
        return Sample(clips, target, index, short=short)


class Batches(Protocol):
    """The keys of each batch, in order; gone through once by each iteration of a loader."""

    def __iter__(self) -> Iterator[list[Any]]: ...

    def __len__(self) -> int: ...


class Loader:
    """An iterable over the batches of a dataset, any number of times."""

    def __init__(self, batches: DataLoader[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Generator[Batch, None, None]:
        try:
            yield from self._batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a process that loads images ended unexpectedly, often for want of (shared) memory; type `workers=0` "
                "to load them without further processes"
            ) from error


def make_loader(
    dataset: ImageDataset, *, batch_size: int, workers: int | None = None, pin_memory: bool = False
) -> Loader:
    """Loads a dataset in batches, in its order, the last one smaller.

    Args:
        dataset: The images.
        batch_size: Images a batch, before unreadable ones are left out.
        workers: See `load_batches`.
        pin_memory: Likewise.

    Raises:
        UsageError: The batch size or the number of workers is out of range.
    """
    check_number("batch_size", batch_size)
    batches = BatchSampler(range(len(dataset)), batch_size, drop_last=False)
    return load_batches(dataset, batches, workers=workers, pin_memory=pin_memory)


def load_batches(
    dataset: Dataset[Sample | Unreadable], batches: Batches, *, workers: int | None = None, pin_memory: bool = False
) -> Loader:
    """Loads the batches that a list of keys names.

    Args:
        dataset: Gives an image for a key.
        batches: The keys of each batch. The workers live as long as one iteration over them.
        workers: Processes that decode; 0 for none but this one. By default as many as there are processors, 4 at most.
        pin_memory: Whether to put batches into page-locked memory.

    Returns:
        The batches. An interrupt ends the workers with this process.

    Raises:
        UsageError: The number of workers is out of range.
    """
    if workers is not None:
        check_number("workers", workers)
    return Loader(
        DataLoader(
            dataset,  # type: ignore[arg-type]  # torch's type says that collating changes nothing
            batch_sampler=batches,
            # A worker without a batch to load would cost its start and do nothing.
            num_workers=min(default_workers() if workers is None else workers, len(batches)),
            collate_fn=collate,
            pin_memory=pin_memory,
            worker_init_fn=quiet_worker,
            # Seeds the workers; torch's global generator is left alone.
            generator=torch.Generator().manual_seed(0),
        )
    )


def default_workers() -> int:
    """As many processes as this one may use processors, 4 at most."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, processors)


def collate(items: Sequence[Sample | Unreadable]) -> Batch:
    """Makes a batch of what a dataset gave."""
    samples = [item for item in items if isinstance(item, Sample)]
    return Batch(
        images=torch.stack([sample.image for sample in samples]) if samples else torch.empty(0),
        targets=torch.tensor([sample.target for sample in samples], dtype=torch.long),
        indices=torch.tensor([sample.index for sample in samples], dtype=torch.long),
        unreadable=tuple(item for item in items if isinstance(item, Unreadable)),
        lying=tuple(sample.index for sample in samples if sample.lies),
        short=tuple(sample.index for sample in samples if sample.short),
    )


def quiet_worker(worker: int) -> None:
    """Lets a process that loads images outlive the signals that go to all of a group.

    The main process ends the workers, which have nothing to say about it. A worker that died first would raise an
    error there at any point, in the middle of an update too.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
