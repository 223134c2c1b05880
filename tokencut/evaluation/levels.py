"""Images of many batches, sorted into levels, so that each level's schedule runs in whole batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencut.data.loading import Batch

# So many batches wait for the images of rare levels, for each level; then what there is runs.
PATIENCE = 4


@dataclass
class _Waiting:
    """A batch, and the logits of those of its images that have run."""

    batch: Batch
    logits: dict[int, Tensor] = field(default_factory=dict)

    def result(self) -> tuple[Batch, Tensor | None]:
        rows = [self.logits[row] for row in range(len(self.batch))]
        return self.batch, torch.stack(rows) if rows else None

    @property
    def done(self) -> bool:
        return len(self.logits) == len(self.batch)


def in_levels(
    batches: Iterable[Batch],
    levels_of: Callable[[Tensor], Tensor],
    forwards: Sequence[Callable[[Tensor], Tensor]],
    pixels_of: Callable[[Batch], Tensor],
    size: int,
) -> Generator[tuple[Batch, Tensor | None], None, None]:
    """Runs images by level, `size` at a time, whichever batches they come from.

    Args:
        batches: The images.
        levels_of: The level of each image.
        forwards: What runs each level, from images to logits `(B, classes)`.
        pixels_of: A batch as the model takes it.
        size: Images a forward; what is left at the end is fewer.

    Yields:
        Each batch in its turn, and its logits in fp32; None where it has no image.
    """
    queue: deque[_Waiting] = deque()
    buckets: list[list[tuple[Tensor, _Waiting, int]]] = [[] for _ in forwards]

    def run(number: int) -> None:
        bucket, buckets[number] = buckets[number][:size], buckets[number][size:]
        logits = forwards[number](torch.stack([image for image, _, _ in bucket])).float()
        for (_, waiting, row), found in zip(bucket, logits, strict=True):
            waiting.logits[row] = found

    for batch in batches:
        queue.append(_Waiting(batch))
        if len(batch):
            pixels = pixels_of(batch)
            for row, number in enumerate(levels_of(pixels).tolist()):
                buckets[number].append((pixels[row], queue[-1], row))
        waited = len(queue) > PATIENCE * len(forwards)
        for number, bucket in enumerate(buckets):
            if len(bucket) >= size or (waited and bucket):
                run(number)
        while queue and queue[0].done:
            yield queue.popleft().result()
    for number in range(len(forwards)):
        while buckets[number]:
            run(number)
    while queue:
        yield queue.popleft().result()
