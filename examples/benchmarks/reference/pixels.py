"""Images of a folder or archive, decoded once into one tensor of bytes: 45,000 of 64 px are 553 MB."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokencut.data.loading import ImageDataset, make_loader
from tokencut.data.sources import open_source
from tokencut.errors import DataError
from tokencut.observers import Observer

# Images a worker hands over at once.
CHUNK = 250
# Mean and deviation are taken of an evenly spread sample of so many.
STATISTICS_IMAGES = 5000


@dataclass(frozen=True)
class Held:
    """Decoded images.

    Attributes:
        images: Bytes, `(N, 3, S, S)`.
        labels: The class of each, `(N,)`, int64.
        classes: The names of the classes: the folders, in timm's natural order.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> Held:
        """The same on a device."""
        return Held(self.images.to(device), self.labels.to(device), self.classes)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, of pixels from 0 to 1, to three digits."""
        sample = self.images[:: -(-len(self.images) // STATISTICS_IMAGES)].cpu()
        counts = [torch.bincount(sample[:, channel].flatten().int(), minlength=256) for channel in range(3)]
        count = torch.stack(counts).double()
        share, value = count / count.sum(dim=1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
        mean = (share * value).sum(dim=1)
        deviation = (share * (value - mean[:, None]) ** 2).sum(dim=1).sqrt()
        return [round(m, 3) for m in mean.tolist()], [round(d, 3) for d in deviation.tolist()]


def read(data: str, side: int, *, workers: int | None = None, observer: Observer | None = None) -> Held:
    """Decodes all images of a source.

    Args:
        data: A folder with one sub-folder a class, a `.tar` or a `.tar.gz` of one.
        side: Height and width that they are held in, px: others are scaled by their shorter side and cut to a square.
        workers: Processes that decode; one a processor, 4 at most, where None.
        observer: Told that an archive is being unpacked.

    Raises:
        DataError: There are none, or one cannot be decoded.
    """
    source = open_source(data, split="train", observer=observer)
    dataset = ImageDataset(source, partial(_bytes, side=side), targets=range(len(source.classes)))
    images = torch.empty(len(source), 3, side, side, dtype=torch.uint8)
    labels = torch.empty(len(source), dtype=torch.int64)
    for batch in make_loader(dataset, batch_size=CHUNK, workers=workers):
        if batch.unreadable:
            name, reason = source.filename(batch.unreadable[0].index), batch.unreadable[0].reason
            raise DataError(f"{name!r} in {data!r} cannot be decoded ({reason}); mend it or take it out")
        images[batch.indices], labels[batch.indices] = batch.images, batch.targets
    return Held(images, labels, source.classes)


def _bytes(image: Image.Image, side: int) -> Tensor:
    if image.size != (side, side):
        scale = side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
