"""The images that models are judged on, or schedules compared: decoded once, the same for all."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from tokencut.data.labels import ClassMap, map_classes
from tokencut.data.loading import Batch, ImageDataset, Loader, make_loader
from tokencut.data.preprocessing import Preprocessing, preprocessing_of
from tokencut.data.sampling import evenly_spread
from tokencut.data.sources import Source, open_source
from tokencut.errors import DataError
from tokencut.messages import quoted
from tokencut.models.pretrained_cfg import label_names, require_head
from tokencut.runtime.devices import weights_dtype

# Held in memory up to this size: 14,000 images of 224 px, or 5,000 of 378 px. More are decoded anew for every model.
HELD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class ImageSet:
    """The images that models are judged on.

    Attributes:
        source: Where they come from.
        class_map: Which class each folder stands for.
        indices: Their numbers in the source.
        prepared: The preprocessing that all the models share.
        batches: The images, decoded and transformed, as bytes.
    """

    source: Source
    class_map: ClassMap
    indices: list[int]
    prepared: Preprocessing
    batches: HeldBatches

    def digest(self, on_image: Callable[[int], None] | None = None) -> str:
        """SHA-256 of the encoded images, in order, with the names and classes they go by.

        Args:
            on_image: Told the number of images read.
        """
        digest = hashlib.sha256()
        for done, index in enumerate(self.indices, start=1):
            digest.update(self._content(index))
            if on_image:
                on_image(done)
        return digest.hexdigest()

    def _content(self, index: int) -> bytes:
        name = os.fsencode(self.source.filename(index))
        try:
            file, folder = self.source[index]
            with file:
                content = hashlib.sha256(file.read()).digest()
        except OSError:  # judging skips it and says so
            return name + b"\0unreadable\0"
        return name + b"\0%d\0" % self.class_map.targets[folder] + content


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


def open_images(
    model: nn.Module,
    data: str | os.PathLike[str] | Source,
    *,
    device: torch.device,
    batch_size: int,
    workers: int | None = None,
    limit: int | None = None,
    held_bytes: int = HELD_BYTES,
    on_note: Callable[[str], None] | None = None,
) -> ImageSet:
    """Finds the images that a model is to be judged on; none is decoded yet.

    Args:
        model: The classifier whose preprocessing and classes they get.
        data: As `--data`, or an opened source.
        device: Where the model runs.
        batch_size: Images a batch.
        workers: Processes that decode; one a processor, 4 at most, where None.
        limit: An evenly spread sample of so many images.
        held_bytes: What may be held in memory, in bytes.
        on_note: Told what takes long: the unpacking of an archive.

    Raises:
        ModelError: The model has no classification head.
        DataError: The images cannot be found, or do not fit the model's classes.
        UsageError: An argument is out of range.
    """
    classes = require_head(model)
    source = open_source(data, on_note=on_note)
    class_map = map_classes(source.classes, label_names(model), classes)
    prepared, indices = preprocessing_of(model), evenly_spread(len(source), limit)
    dataset = ImageDataset(source, prepared.transform(), targets=class_map.targets, indices=indices, mode=prepared.mode)
    hold = len(indices) * prod(prepared.config["input_size"]) <= held_bytes
    # Page-locked memory is scarce, and held batches would all lie in it.
    loader = make_loader(dataset, batch_size=batch_size, workers=workers, pin_memory=device.type == "cuda" and not hold)
    return ImageSet(source, class_map, indices, prepared, HeldBatches(loader, hold=hold))


@dataclass(frozen=True)
class CalibrationImages:
    """Images as a model takes them.

    Attributes:
        batches: `(B, C, H, W)` each, on the model's device.
        targets: The class of each image; None where the folders do not map to the model's classes, or it has none.
        notes: What a user should know.
    """

    batches: tuple[Tensor, ...]
    targets: Tensor | None
    notes: tuple[str, ...]


def calibration_images(
    model: nn.Module,
    source: Source,
    *,
    limit: int,
    batch_size: int,
    device: torch.device,
    seed: int = 0,
    workers: int | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> CalibrationImages:
    """Loads calibration images.

    Args:
        model: The model whose preprocessing and classes they get.
        source: Where they come from.
        limit: An evenly spread sample of so many; all, if there are fewer.
        batch_size: Images a batch.
        device: Where the model is.
        seed: Decides their order: the first of them are to be like all of them, and sources are ordered by class.
        workers: Processes that decode.
        on_image: Told images decoded and images in all.

    Raises:
        DataError: None can be decoded.
        UsageError: An argument is out of range.
    """
    indices = evenly_spread(len(source), limit)
    random.Random(seed).shuffle(indices)
    targets, notes = _classes(model, source)
    prepared = preprocessing_of(model)
    dataset = ImageDataset(source, prepared.transform(), targets=targets or [0] * len(source.classes), indices=indices,
                           mode=prepared.mode)  # fmt: skip
    dtype = weights_dtype(model)
    images, labels, unreadable = [], [], []
    with closing(iter(make_loader(dataset, batch_size=batch_size, workers=workers))) as batches:
        for batch in batches:
            unreadable += [source.filename(image.index) for image in batch.unreadable]
            if len(batch):
                images.append(prepared.normalise(batch.images.clone(), device, dtype))
                labels.append(batch.targets.clone())
            if on_image:
                on_image(sum(map(len, images)), len(indices))
    if not images:
        raise DataError(f"none of {len(indices)} images in {source.name!r} can be decoded, such as "
                        f"{quoted(unreadable)}; give another --calibration")  # fmt: skip
    if unreadable:
        notes.append(f"calibration images that cannot be decoded: {len(unreadable)} ({quoted(unreadable)})")
    return CalibrationImages(tuple(images), torch.cat(labels) if targets else None, tuple(notes))


def _classes(model: nn.Module, source: Source) -> tuple[list[int] | None, list[str]]:
    """The class of each folder, where the folders map to the head; and why not, where they do not."""
    classes = int(getattr(model, "num_classes", 0) or 0)
    if not classes:
        return None, []
    try:
        return list(map_classes(source.classes, label_names(model), classes).targets), []
    except DataError as error:
        return None, [f"calibration labels are not used: {error}"]
