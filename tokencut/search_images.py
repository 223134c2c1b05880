"""The images that schedules are compared on: an evenly spread sample, decoded once, the same for all."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokencut.data.labels import label_names, map_classes, quoted
from tokencut.data.loading import ImageDataset, make_loader
from tokencut.data.preprocessing import preprocessing_of
from tokencut.data.sources import Source, evenly_spread
from tokencut.errors import DataError
from tokencut.runtime.devices import weights_dtype


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
