"""Images that cannot be decoded, or are unusual, in an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_files import encoded, greys, picture
from judged_models import Answers, black_or_not, small_model
from PIL import Image

from tokencut.errors import DataError
from tokencut.evaluation.accuracy import evaluate


def test_a_few_unreadable_images_are_named_and_skipped(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [0] * 99, "b": [9] * 101})
    (root / "a/7.png").write_text("no image")
    (root / "b/9.png").write_bytes(encoded(picture(1))[:-100])
    model = black_or_not()
    report = evaluate(model, root, workers=0, batch_size=7)
    assert (report.images, report.top1, len(report.correct)) == (198, 100.0, 198)
    assert report.unreadable == ("a/7.png", "b/9.png")
    assert report.notes[-1] == "images skipped, since they could not be decoded: 2 of 200 ('a/7.png', 'b/9.png')"


def test_more_than_one_percent_unreadable_ends_with_an_error(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [0] * 99, "b": [9] * 101})
    for number in range(20, 24):
        (root / f"a/{number}.png").write_text("no image")
    model = Answers(lambda level: torch.stack([level, level], dim=1), 2)
    with pytest.raises(DataError) as caught:
        evaluate(model, root, workers=0)
    reason = "not a JPEG, PNG, WEBP, BMP or TIFF image"
    assert str(caught.value) == (
        f"at least 4 of 200 images in '{root}' cannot be decoded, and at most 1 % may be: 'a/20.png' ({reason}), "
        f"'a/21.png' ({reason}), 'a/22.png' ({reason}); mend or remove them and run this again"
    )


def test_a_batch_of_nothing_but_unreadable_images_is_survived(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [0] * 100, "b": [9] * 100})
    (root / "a/1.png").write_text("no image")
    model = black_or_not()
    assert evaluate(model, root, workers=0, batch_size=1).images == 199


def test_odd_images_are_judged(tmp_path: Path) -> None:
    root = tmp_path / "set"
    odd = {
        "pixel.png": Image.new("RGB", (1, 1), "red"),
        "cmyk.jpg": picture(1).convert("CMYK"),
        "deep.png": Image.new("I;16", (20, 30), 40000),
        "palette.png": picture(2).convert("P"),
        "clear.webp": picture(3).convert("RGBA"),
    }
    (root / "a").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "a/notes.txt").write_text("text")
    for name, image in odd.items():
        image.save(root / "a" / name)
    (root / "b").mkdir()
    picture(4).save(root / "b" / "plain.jpg")
    report = evaluate(small_model(2), root, workers=0)
    assert report.images == 6
    assert report.notes == (
        "files passed over for their extension: 1 ('a/notes.txt')",
        "folders without images passed over: 1 ('empty')",
        "the model has no label names: the 2 folders stand for the model's classes in natural order",
    )


def test_images_that_their_exif_turns_are_judged_as_timm_sees_them_and_that_is_said(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [0] * 3, "b": [9] * 3})
    exif = Image.Exif()
    exif[0x0112] = 8
    wide = picture(3, (64, 32))
    wide.save(root / "a/4.png", exif=exif)
    model = small_model(2)
    report = evaluate(model, root, workers=0)
    assert report.notes[-1] == (
        "images seen as they are stored, as timm sees them, though their EXIF says to turn them: 1 of 7 ('a/4.png'); "
        "turn the files themselves to have them seen upright"
    )
    wide.save(root / "a/4.png")
    untold = evaluate(model, root, workers=0)
    assert (untold.loss, len(untold.notes)) == (report.loss, len(report.notes) - 1)
