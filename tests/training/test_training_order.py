"""The training images: their order and their augmentation."""

from __future__ import annotations

import random
from typing import Any

import torch

from tokencut.data.sources import Source
from tokencut.training.order import Augmented, Order, seed_all


def test_an_order_gives_every_process_its_part_and_every_image_once() -> None:
    one = Order(images=23, batch=8, seed=5)
    two = [Order(images=23, batch=2, accumulate=2, seed=5, rank=rank, size=2) for rank in (0, 1)]
    assert (one.steps, two[0].steps) == (2, 2)
    whole = [{image for _, image in part} for part in one.passes(0)]
    parts = [list(order.passes(0)) for order in two]
    assert [len(part) for part in parts[0]] == [2, 2, 2, 2]
    for step in range(2):
        drawn = [key for part in parts for batch in part[2 * step : 2 * step + 2] for key in batch]
        assert {image for _, image in drawn} == whole[step]
        assert len(drawn) == 8
    assert list(one.passes(0, first=1)) == list(one.passes(0))[1:]
    assert list(one.passes(0)) != list(one.passes(1))


def test_fewer_images_than_a_step_takes_are_one_step() -> None:
    parts = [list(Order(5, 4, 2, rank=rank, size=2).passes(0)) for rank in (0, 1)]
    assert [[len(batch) for batch in part] for part in parts] == [[1, 1], [1, 2]]


def test_augmentation_follows_from_epoch_and_image(few: Source) -> None:
    class Numbers:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> float:
            return random.random() + torch.rand(1).item()

    images: Any = Augmented(Numbers(), seed=0)  # type: ignore[arg-type]
    first = images[0, 3]
    assert images[1, 3] != first != images[0, 4]
    assert images[0, 3] == first
    seed_all(0)
