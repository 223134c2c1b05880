"""Batches of images: none replaced, none lost, whoever loads them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import tar_of, write_folder
from timm.data.transforms import MaybePILToTensor
from torch import Tensor

from tokencut.data import loading
from tokencut.data.loading import (
    Batch,
    ImageDataset,
    Loader,
    Sample,
    Unreadable,
    default_workers,
    load_batches,
    make_loader,
)
from tokencut.data.sources import Source, open_source
from tokencut.errors import DataError, UsageError

CLASSES = ("ant", "bee", "cow")
# Python 3.12 and later warn of forking beside torch's threads, which is what torch's loader does on Linux.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of four images."""
    return write_folder(tmp_path / "set", CLASSES, 4)


def dataset(source: Source, indices: Sequence[int] | None = None) -> ImageDataset:
    """The images as they are, the classes numbered from 10."""
    return ImageDataset(source, MaybePILToTensor(), targets=[10, 11, 12], indices=indices)


def images_of(loader: Loader) -> Tensor:
    """All images that a loader gives, in its order."""
    return torch.cat([batch.images for batch in loader])


def test_batches_hold_images_targets_and_numbers(folder: Path) -> None:
    batches = list(make_loader(dataset(open_source(folder), [0, 5, 6, 11]), batch_size=3, workers=0))
    assert [len(batch) for batch in batches] == [3, 1]
    assert batches[0].images.shape == (3, 3, 32, 40)
    assert batches[0].targets.tolist() == [10, 11, 11]
    assert batches[0].indices.tolist() == [0, 5, 6]
    assert batches[1].targets.tolist() == [12]
    assert not batches[0].unreadable


def test_an_unreadable_image_is_named_and_none_takes_its_place(folder: Path) -> None:
    (folder / "bee/2.jpg").write_text("no image")
    (folder / "bee/3.jpg").unlink()
    (folder / "bee/3.jpg").symlink_to("nowhere.jpg")
    source = open_source(folder)
    (batch,) = make_loader(dataset(source), batch_size=12, workers=0)
    assert batch.indices.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert batch.images.shape[0] == 10
    assert batch.unreadable == (
        Unreadable(5, "not a JPEG, PNG, WEBP, BMP or TIFF image"),
        Unreadable(6, "No such file or directory"),
    )
    assert source.filename(5) == "bee/2.jpg"


def test_a_batch_of_nothing_is_empty(folder: Path) -> None:
    (folder / "ant/1.jpg").write_text("no image")
    (batch,) = make_loader(dataset(open_source(folder), [0]), batch_size=1, workers=0)
    assert (len(batch), batch.images.numel(), len(batch.unreadable)) == (0, 0, 1)


@forks
def test_workers_read_a_tar_side_by_side(folder: Path, tmp_path: Path) -> None:
    source = open_source(tar_of(folder, tmp_path / "set.tar"))
    alone = images_of(make_loader(dataset(source), batch_size=2, workers=0))
    assert torch.equal(images_of(make_loader(dataset(source), batch_size=2, workers=2)), alone)
    assert torch.equal(images_of(make_loader(dataset(open_source(folder)), batch_size=5, workers=0)), alone)


def test_batches_go_by_their_keys(folder: Path) -> None:
    loader = load_batches(dataset(open_source(folder)), [[7, 2], [11], [2]], workers=0)
    assert len(loader) == 3
    assert [batch.indices.tolist() for batch in loader] == [[7, 2], [11], [2]]


@forks
def test_the_global_random_numbers_stay_as_they_are(folder: Path) -> None:
    before = torch.get_rng_state()
    list(make_loader(dataset(open_source(folder)), batch_size=6, workers=1))
    assert torch.equal(torch.get_rng_state(), before)


@forks
def test_a_worker_that_dies_is_told_with_a_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "decode", lambda *_, **__: os._exit(3))
    with pytest.raises(DataError) as caught:
        list(make_loader(dataset(open_source(folder)), batch_size=6, workers=1))
    assert str(caught.value) == (
        "a process that loads images ended unexpectedly, often for want of (shared) memory; type `workers=0` to load "
        "them without further processes"
    )


def test_an_error_of_a_transform_is_no_unreadable_image(folder: Path) -> None:
    def broken(_: object) -> Tensor:
        raise RuntimeError("a bug")

    source = open_source(folder)
    with pytest.raises(RuntimeError, match="a bug"):
        list(make_loader(ImageDataset(source, broken, targets=[0, 1, 2]), batch_size=2, workers=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size=0` is not a whole number from 1 to 65536; type `batch_size=64`"),
        ({"batch_size": 1, "workers": -1}, "`workers=-1` is not a whole number from 0 to 1024; type `workers=0`"),
    ],
)
def test_out_of_range(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_loader(dataset(open_source(folder)), **options)
    assert str(caught.value) == message


def test_default_workers_are_as_many_as_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= default_workers() <= 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert default_workers() == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7}, raising=False)
    assert default_workers() == 1


@pytest.mark.gpu
def test_batches_can_be_pinned(folder: Path) -> None:
    (batch,) = make_loader(dataset(open_source(folder)), batch_size=12, workers=0, pin_memory=True)
    assert isinstance(batch, Batch)
    assert all(tensor.is_pinned() for tensor in (batch.images, batch.targets, batch.indices))


def test_collate_keeps_the_order() -> None:
    image = torch.zeros(3, 1, 1)
    batch = loading.collate([Sample(image, 1, 4), Unreadable(5, "why"), Sample(image, 0, 6)])
    assert (batch.indices.tolist(), batch.targets.tolist()) == ([4, 6], [1, 0])
    assert batch.unreadable == (Unreadable(5, "why"),)
