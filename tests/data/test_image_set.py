"""The images that a model is to see: which they are, decoded once where they fit, and known again by their content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_files import encoded, picture, tar_of, write_folder
from observing import Seen

from tokencut.data import loading
from tokencut.data.image_set import HELD_BYTES, HeldBatches, ImageSet, images_for, open_images
from tokencut.data.loading import Batch, Unreadable
from tokencut.data.sources import open_source
from tokencut.errors import DataError, ModelError, UsageError

CLASSES = ["ant", "bee", "cow"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of four images."""
    return write_folder(tmp_path / "set", CLASSES, 4)


def images_of(where: Path, classes: int = 3, **options: Any) -> ImageSet:
    model = timm.create_model("test_vit", img_size=32, num_classes=classes)
    return open_images(model, str(where), **options)


def batches_of(where: Path, held_bytes: int = HELD_BYTES, **options: Any) -> HeldBatches:
    return images_of(where).batches(**{"batch_size": 5, "workers": 0, "held_bytes": held_bytes, **options})


def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by one for every image decoded."""
    log: list[str] = []
    real = loading.decode
    monkeypatch.setattr(loading, "decode", lambda file, mode, **how: log.append(mode) or real(file, mode, **how))
    return log


def pixels(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


def test_what_fits_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, batches = decodings(monkeypatch), batches_of(folder, held_bytes=12 * 3 * 32 * 32)
    first, second = list(batches), list(batches)
    assert len(log) == 12
    assert batches.held
    assert pixels(first).dtype == torch.uint8
    assert torch.equal(pixels(first), pixels(second))
    assert [len(batch) for batch in first] == [5, 5, 2]


def test_what_does_not_fit_is_decoded_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, batches = decodings(monkeypatch), batches_of(folder, held_bytes=12 * 3 * 32 * 32 - 1)
    assert torch.equal(pixels(list(batches)), pixels(list(batches)))
    assert len(log) == 24
    assert not batches.held


def test_a_pass_that_was_cut_short_holds_nothing(folder: Path) -> None:
    batches = batches_of(folder)
    going = iter(batches)
    next(going)
    going.close()
    assert not batches.held
    assert sum(map(len, batches)) == 12
    assert batches.held


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_what_workers_decoded_is_held_outside_shared_memory(folder: Path) -> None:
    batches = batches_of(folder, workers=1)
    handed = list(batches)
    held = list(batches)
    assert torch.equal(pixels(handed), pixels(held))
    assert handed[0].images.is_shared()
    for batch in held:  # each tensor there takes an open file
        assert not any(tensor.is_shared() for tensor in (batch.images, batch.targets, batch.indices))


def test_a_limit_takes_an_evenly_spread_sample(folder: Path) -> None:
    images = images_of(folder, limit=3)
    assert images.indices == [0, 4, 8]
    assert [batch.targets.tolist() for batch in images.batches(5, workers=0)] == [[0, 1, 2]]


def test_the_digest_knows_the_same_images_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    seen = Seen()
    digest = images_of(folder).digest(seen)
    assert [now[:3] for now in seen.told] == [("reading the images", done, 12) for done in range(1, 13)]
    assert images_of(tar_of(folder, tmp_path / "set.tar")).digest() == digest
    assert images_of(folder, limit=6).digest() != digest


@pytest.mark.parametrize("change", ["content", "name", "unreadable"])
def test_the_digest_tells_other_images(folder: Path, change: str) -> None:
    before = images_of(folder).digest()
    path = folder / "bee" / "2.jpg"
    if change == "content":
        path.write_bytes(encoded(picture(77)))
        assert images_of(folder).digest() != before
    elif change == "name":
        path.rename(path.with_name("2b.jpg"))
        assert images_of(folder).digest() != before
    else:
        images = images_of(folder)
        path.unlink()
        assert images.digest() != before


def test_the_digest_tells_other_classes(folder: Path) -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    digests = []
    for names in (["ant", "bee", "cow"], ["cow", "bee", "ant"]):
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
        digests.append(open_images(model, folder).digest())
    assert digests[0] != digests[1]


def test_a_model_without_a_head_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="has no classification head"):
        images_of(folder, classes=0)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}])
def test_options_out_of_range(folder: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        batches_of(folder, **options)


def test_a_limit_that_leaves_nothing(folder: Path) -> None:
    with pytest.raises(UsageError):
        images_of(folder, limit=0)


def test_a_seed_puts_the_same_images_into_another_order(folder: Path) -> None:
    model, source = timm.create_model("test_vit", img_size=32, num_classes=0), open_source(folder)
    shuffled = images_for(model, source, seed=1)
    assert list(shuffled.indices) != list(range(12))
    assert sorted(shuffled.indices) == list(range(12))
    assert shuffled.indices == images_for(model, source, seed=1).indices
    assert shuffled.indices != images_for(model, source, seed=2).indices


def test_images_whose_classes_do_not_count_need_no_head(folder: Path) -> None:
    images = images_for(timm.create_model("test_vit", img_size=32, num_classes=0), open_source(folder), limit=3)
    (batch,) = images.decoded(3, workers=0, otherwise="give others")
    assert (tuple(batch.images.shape), batch.targets.tolist()) == ((3, 3, 32, 32), [0, 0, 0])
    assert images.notes() == ("an evenly spread sample of 3 of 12 images",)


def test_where_none_can_be_decoded_some_are_named(folder: Path) -> None:
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        list(images_of(folder, limit=4).decoded(3, workers=0, otherwise="give others"))
    assert str(caught.value) == (
        f"none of 4 images in {str(folder)!r} can be decoded, such as 'ant/1.jpg', 'ant/4.jpg', 'bee/3.jpg' and 1 "
        "more; give others"
    )


def test_more_than_one_per_cent_unreadable_are_too_many(folder: Path) -> None:
    images, bad = images_of(folder), [Unreadable(5, "cut off")]
    with pytest.raises(DataError, match=r"at least 1 of 12 images in .*: 'bee/2\.jpg' \(cut off\); mend"):
        images.check_unreadable(bad)
    images.check_unreadable(bad, of=100)
    assert images.notes(bad)[-1] == "images skipped, since they could not be decoded: 1 of 12 ('bee/2.jpg')"
