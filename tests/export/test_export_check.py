"""The images that a file is compared with its model on, and what is said of the differences."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from export_models import skip_capture, small
from image_files import write_folder
from model_files import names_in
from torch import Tensor

from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import ArtifactError, DataError
from tokencut.export.check import Agreement, CheckImages, check_images, compare
from tokencut.export.run import export_model
from tokencut.model import compress
from tokencut.models import loading


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_capture(monkeypatch)


@pytest.mark.usefixtures("instant")
def test_a_model_without_a_head_has_no_top1(tmp_path: Path) -> None:
    report = export_model(small("topk", num_classes=0).model, tmp_path / "model.pt2", limit=2)
    assert report.agreement.equal_top1 is None
    assert (report.info.recipe, report.to_dict()["method"], report.to_dict()["keep"]) == (None, None, 1.0)


@pytest.mark.usefixtures("instant")
def test_a_check_on_real_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", ["a", "b"], 3)
    (folder / "a" / "1.jpg").write_bytes(b"no image")
    report = export_model(small("topk"), tmp_path / "model.pt2", data=folder, limit=4, batch_size=2)
    # 1, 2, 3 of a and 1 of b would be 4 of 6; evenly spread they are 1 and 2 of each.
    assert (report.agreement.images, report.agreement.data, report.notes) == (3, str(folder), ())


@pytest.mark.usefixtures("instant")
def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", ["a"], 2)
    for image in (folder / "a").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(
        DataError,
        match=r"none of 2 images in '.*' can be decoded, such as .*; leave out `data` to check "
        "on noise$",
    ):
        export_model(small("topk"), tmp_path / "model.pt2", data=folder)
    assert names_in(tmp_path) == ["set"]


def test_the_bundled_model_is_checked_on_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compress(loading.load_model("digits").model)
    images = check_images(model, None)
    assert (images.name, images.count, images.notes) == ("digits", 64, ())
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    without = check_images(model, None)
    assert without.name == "noise"
    assert without.notes == (
        "checked on 64 images of noise, since the digits images come with scikit-learn, which is not installed; type "
        "pip install 'tokencut[digits]'",
    )


@pytest.mark.parametrize(
    ("keep", "any_number", "runs", "differing"),
    [(0.5, True, [8, 8, 4, 20], 4), (0.5, False, [8, 8, 4], 0), (None, True, [8, 8, 4], 0)],
    ids=["any number", "one number", "dense"],
)
def test_more_images_than_tokens_are_run_at_once(
    keep: float | None, any_number: bool, runs: list[int], differing: int
) -> None:
    """Such a batch is what a runtime may get wrong that takes the number of tokens, here 16, for that of images."""
    model, seen = small("topk"), list[int]()
    ours = model if keep else model.model

    def faulty(images: Tensor) -> Tensor:
        seen.append(len(images))
        logits: Tensor = ours(images)
        return torch.cat((logits[:16], logits[16:] + 1.0))

    with torch.no_grad():
        found = compare(
            ours, faulty, CheckImages(preprocessing_of(model), 20, None), 8, normalises=False, any_number=any_number
        )
    assert (seen, found.images, found.differing) == (runs, 20, differing)


@pytest.mark.parametrize(("differing", "allowed", "fine"), [(0, 0, True), (1, 0, False), (1, 1, True), (2, 1, False)])
def test_near_ties_between_tokens_may_go_either_way(differing: int, allowed: int, fine: bool) -> None:
    found = Agreement("noise", 64, 0.25, 0.001, differing, allowed, 100.0, 0.0)
    if not fine:
        with pytest.raises(ArtifactError, match=f"{differing} of 64 images differ"):
            found.require(Path("m.onnx"))
        return
    found.require(Path("m.onnx"))
    assert found.notes() == (
        ("1 of 64 images differs by more than 1.0e-03, at most by 2.5e-01: two tokens were alike, and rounding decided "
         "between them",) if differing else ()
    )  # fmt: skip
