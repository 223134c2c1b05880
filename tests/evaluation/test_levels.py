"""Images of many batches run by level in whole batches, and come back in their order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokencut.data.loading import Batch
from tokencut.evaluation.levels import PATIENCE, in_levels


def batch_of(*values: float) -> Batch:
    return Batch(torch.tensor(values), torch.zeros(len(values), dtype=torch.long), torch.arange(len(values)), ())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_image_comes_back_in_its_place(size: int) -> None:
    batches = [batch_of(0.0, 11.0, 2.0), batch_of(), batch_of(13.0, 4.0), batch_of(15.0)]
    seen: list[list[float]] = [[], []]

    def forward(number: int, images: Tensor) -> Tensor:
        assert len(images) <= size
        seen[number] += images.tolist()
        return torch.stack((images, images * 100), 1)

    found = list(in_levels(
        batches, lambda images: (images > 10).long(), [lambda i: forward(0, i), lambda i: forward(1, i)],
        lambda batch: batch.images, size,
    ))  # fmt: skip
    assert [batch for batch, _ in found] == batches
    for batch, logits in found:
        assert (logits is None) == (len(batch) == 0)
        if logits is not None:
            torch.testing.assert_close(logits, torch.stack((batch.images, batch.images * 100), 1))
    assert [sorted(values) for values in seen] == [[0, 2, 4], [11, 13, 15]]


def test_rare_levels_hold_up_only_so_many_batches() -> None:
    taken = 0

    def batches():  # type: ignore[no-untyped-def]
        nonlocal taken
        for number in range(40):
            taken += 1
            yield batch_of(99.0 if number == 0 else 1.0)

    running = in_levels(batches(), lambda images: (images > 10).long(), [lambda i: i.unsqueeze(1)] * 2,
                        lambda batch: batch.images, 8)  # fmt: skip
    next(running)
    assert taken == PATIENCE * 2 + 1
