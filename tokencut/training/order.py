"""The images of a fine-tune, in an order and with an augmentation that depend on seed, epoch and image alone.

So a run can be cut at any step and go on, and several processes see what one would see with their batches together.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from tokencut.data.loading import ImageDataset, Loader, Sample, Unreadable, load_batches

Key = tuple[int, int]  # epoch and image


def seed_all(*parts: int) -> None:
    """Seeds every generator that timm's augmentation, mixup, dropout and drop path draw from, on all devices.

    Args:
        parts: What the seed depends on, in order.
    """
    torch.manual_seed(seed_transforms(*parts))


def seed_transforms(*parts: int) -> int:
    """Seeds the generators that the transforms of one image draw from; the seed.

    Not those of GPUs: `torch.manual_seed`, where CUDA is not in use, notes a whole traceback for later, which takes
    twice as long as to decode a small image.

    Args:
        parts: What the seed depends on, in order.
    """
    text = ":".join(map(str, parts)).encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the generator that timm uses)
    torch.default_generator.manual_seed(seed)
    return seed


@contextlib.contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Leaves the global generators behind as they were; of GPUs, that of the one the model is trained on.

    Args:
        device: Where the model is trained. To ask every GPU of a machine for its state would take memory on each.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@dataclass(frozen=True)
class Order:
    """Which images make which step.

    A step is one update of the weights: `batch` images for each of `accumulate` backward passes of each of `size`
    processes. What is left at the end of an epoch waits for the next one, whose order is another.

    Attributes:
        images: How many images there are.
        batch: Images a backward pass of one process.
        accumulate: Backward passes a step.
        seed: Decides the order.
        rank: The number of this process.
        size: The number of processes.
    """

    images: int
    batch: int
    accumulate: int = 1
    seed: int = 0
    rank: int = 0
    size: int = 1

    @property
    def per_step(self) -> int:
        """Images of one step; all, where there are fewer."""
        return min(self.images, self.batch * self.accumulate * self.size)

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return self.images // self.per_step

    def passes(self, epoch: int, first: int = 0) -> Iterator[list[Key]]:
        """The images of each backward pass of this process, in the steps of an epoch from the `first` on."""
        drawn = hashlib.sha256(f"order:{self.seed}:{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(drawn[:7], "big"))
        order = torch.randperm(self.images, generator=generator).tolist()
        parts = self.size * self.accumulate
        for step in range(first, self.steps):
            images = order[step * self.per_step : (step + 1) * self.per_step]
            bounds = [len(images) * part // parts for part in range(parts + 1)]
            for number in range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate):
                yield [(epoch, image) for image in images[bounds[number] : bounds[number + 1]]]


class Augmented(Dataset[Sample | Unreadable]):
    """Images by epoch and number; what is random in a transform is drawn from both and the seed."""

    def __init__(self, images: ImageDataset, seed: int) -> None:
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Sample | Unreadable:
        seed_transforms(self.seed, 1, *key)
        return self.images[key[1]]


class _Passes:
    """A batch sampler over the epochs of a run."""

    def __init__(self, order: Order, epochs: int, epoch: int, step: int) -> None:
        self.order, self.epochs, self.epoch, self.step = order, epochs, epoch, step

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch in range(self.epoch, self.epochs):
            yield from self.order.passes(epoch, self.step if epoch == self.epoch else 0)

    def __len__(self) -> int:
        steps = (self.epochs - self.epoch) * self.order.steps - self.step
        return steps * self.order.accumulate


def training_loader(
    dataset: Augmented, order: Order, *, epochs: int, epoch: int, step: int, workers: int | None, pin_memory: bool
) -> Loader:
    """Loads what is left of a run, one batch a backward pass; the workers live as long as it does.

    Args:
        dataset: The images.
        order: Which of them make which step.
        epochs: Epochs of the whole run.
        epoch: The epoch to start in.
        step: The step to start at.
        workers: See `load_batches`.
        pin_memory: Likewise.
    """
    return load_batches(dataset, _Passes(order, epochs, epoch, step), workers=workers, pin_memory=pin_memory)
