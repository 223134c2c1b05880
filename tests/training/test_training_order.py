"""The training images: their order, their augmentation, and what is held out."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tokencut.data.sources import Source, open_source
from tokencut.errors import DataError
from tokencut.training.order import Augmented, Order, Part, hold_out, seed_all


def test_held_out_images_are_a_seeded_share_of_every_class() -> None:
    source = open_source("digits", split="train")
    kept, held = hold_out(source, 0.1, seed=0)
    names = [[part.filename(i) for i in range(len(part))] for part in (kept, held)]
    assert len(names[0]) + len(names[1]) == 1197 == len({*names[0], *names[1]})
    counts = np.bincount(held.folders(), minlength=10)
    assert (len(held), counts.min(), counts.max()) == (120, 12, 12)
    assert hold_out(source, 0.1, seed=0)[1].indices == held.indices != hold_out(source, 0.1, seed=1)[1].indices
    with held[0][0] as first, source[held.indices[0]][0] as second:
        assert first.read() == second.read()
    with pytest.raises(DataError, match="are too few to hold some out for choosing an epoch; type --select last"):
        hold_out(Part(source, [0, 1]), 0.1, seed=0)


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
