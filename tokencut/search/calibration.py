"""The images that a search compares schedules on, loaded once, as the model takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokencut.data.image_set import ImageSet, images_for
from tokencut.data.labels import ClassMap, classes_for
from tokencut.data.loading import Unreadable
from tokencut.data.sources import Source
from tokencut.errors import DataError
from tokencut.messages import quoted
from tokencut.models.pretrained_cfg import class_count
from tokencut.observers import Observer
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
    model: nn.Module, source: Source, *, limit: int, batch_size: int, device: torch.device, seed: int = 0,
    workers: int | None = None, observer: Observer | None = None,
) -> CalibrationImages:  # fmt: skip
    """Loads calibration images.

    Args:
        model: The model whose preprocessing, classes and dtype they get.
        source: Where they come from.
        limit: An evenly spread sample of so many; all, if there are fewer.
        batch_size: Images a batch.
        device: Where the model is.
        seed: Decides their order: the first of them are to be like all of them.
        workers: Processes that decode.
        observer: Told how many are loaded.

    Raises:
        DataError: None can be decoded.
        UsageError: An argument is out of range.
    """
    class_map, notes = _classes(model, source)
    images = images_for(model, source, class_map, limit=limit, seed=seed)
    batches, targets, unreadable = _loaded(
        images, batch_size, workers, device, weights_dtype(model), observer or Observer()
    )
    if unreadable:
        names = quoted(images.filenames(unreadable))
        notes.append(f"calibration images that cannot be decoded: {len(unreadable)} ({names})")
    return CalibrationImages(tuple(batches), torch.cat(targets) if class_map else None, tuple(notes))


def _loaded(
    images: ImageSet, batch_size: int, workers: int | None, device: torch.device, dtype: torch.dtype, observer: Observer
) -> tuple[list[Tensor], list[Tensor], list[Unreadable]]:
    """Batches as the model takes them, the classes of each, and what could not be decoded."""
    pixels, targets, unreadable, done = [], [], list[Unreadable](), 0
    for batch in images.decoded(batch_size, workers=workers, otherwise="give another `calibration`"):
        unreadable += batch.unreadable
        if len(batch):
            # Copies: what a worker process hands over lies in shared memory.
            pixels.append(images.prepared.normalise(batch.views()[0].clone(), device, dtype))
            targets.append(batch.targets.clone())
        done += len(batch) + len(batch.unreadable)
        observer.progress("reading the images", done, len(images), {})
    return pixels, targets, unreadable


def _classes(model: nn.Module, source: Source) -> tuple[ClassMap | None, list[str]]:
    """The class of each folder, where the folders map to the head; and why not, where they do not."""
    if not class_count(model):
        return None, []
    try:
        return classes_for(model, source), []
    except DataError as error:
        return None, [f"calibration labels are not used: {error}"]
