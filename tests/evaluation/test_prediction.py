"""What a model takes photos for: by hand, against `evaluate`, by what names, and what is said of the photos."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_files import greys, picture, write_folder
from judged_models import Answers, small_model
from PIL import Image

from tokencut.data.labels import names_for_people
from tokencut.errors import ArtifactError, DataError, ModelError, TokencutError, UsageError
from tokencut.evaluation.accuracy import evaluate
from tokencut.evaluation.prediction import Guess, predict


def told(tmp_path: Path, *images: object, **options: Any) -> Any:
    return predict(small_model(), list(images), workers=0, device="cpu", **options)


def test_probabilities_are_the_softmax_of_the_logits(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [51]})
    # A grey of 51 is 0.2: logits 0, 0.2 and 2.
    model = Answers(lambda level: torch.stack([0 * level, level, 10 * level], dim=1), 3)
    (found,) = predict(model, root / "a/1.png", top=2, workers=0, device="cpu").predictions
    total = 1 + torch.tensor(0.2).exp() + torch.tensor(2.0).exp()
    assert found.image == str(root / "a/1.png")
    assert [(guess.label, guess.index) for guess in found.top] == [("2", 2), ("1", 1)]
    assert [guess.probability for guess in found.top] == pytest.approx(
        [float(torch.tensor(2.0).exp() / total), float(torch.tensor(0.2).exp() / total)]
    )


def test_it_sees_what_evaluate_sees(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "val", ["ant", "bee", "cat"], images=4)
    model = small_model(labels=["ant", "bee", "cat"])
    table = tmp_path / "eval.csv"
    evaluate(model, root, workers=0, device="cpu", predictions=table)
    report = predict(model, root, workers=0, device="cpu", batch_size=5)
    with table.open(newline="") as file:
        judged = {str(root / row["path"]): [row[f"top{rank}"] for rank in (1, 2, 3)] for row in csv.DictReader(file)}
    assert {one.image: [guess.label for guess in one.top] for one in report.predictions} == judged
    assert list(judged) == [one.image for one in report.predictions]


def test_a_photo_is_seen_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = picture(4, (64, 48))
    wide.save(tmp_path / "upright.png")
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png")
    report = told(tmp_path, *(tmp_path / f"{name}.png" for name in ("upright", "phone", "lying")))
    upright, phone, lying = (one.top for one in report.predictions)
    for seen in (phone, lying):
        assert [guess.label for guess in seen] == [guess.label for guess in upright]
    odds = [[guess.probability for guess in seen] for seen in (upright, phone, lying)]
    # To the last digits: where an image stands in its batch may change the order of a sum.
    assert odds[1] == pytest.approx(odds[0], rel=1e-5)
    assert odds[2] != pytest.approx(odds[0], rel=1e-3)
    assert not any("EXIF" in note for note in report.notes)


def test_folders_are_entered_at_any_depth_and_in_order(tmp_path: Path) -> None:
    for name in ("b/10.png", "b/9.png", "b/deep/er/1.png", "__MACOSX/x.png", ".hidden/x.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(1).save(tmp_path / "set" / name)
    (tmp_path / "set/b/notes.txt").write_text("text")
    report = told(tmp_path, tmp_path / "set", tmp_path / "set/b/9.png")
    expected = ["b/9.png", "b/10.png", "b/deep/er/1.png", "b/9.png"]
    assert [one.image for one in report.predictions] == [str(tmp_path / "set" / name) for name in expected]
    assert "files passed over for their extension: 1 ('b/notes.txt')" in report.notes
    assert "folders that systems leave behind passed over: 1 ('__MACOSX')" in report.notes


def test_what_cannot_be_decoded_is_named_and_the_others_are_told(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "good.png")
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    report = told(tmp_path, bad, tmp_path / "good.png")
    assert report.unreadable == (str(bad),)
    assert [one.image for one in report.predictions] == [str(tmp_path / "good.png")]
    assert report.notes[0] == f"images skipped, since they could not be decoded: 1 of 2 ('{bad}')"
    with pytest.raises(DataError) as caught:
        told(tmp_path, bad)
    assert str(caught.value) == (
        f"no image can be decoded: '{bad}' (not a JPEG, PNG, WEBP, BMP or TIFF image); give others"
    )


def test_names_come_from_the_model_from_imagenet_or_from_a_class_map(tmp_path: Path) -> None:
    own = small_model(labels=["ant", "bee", "cat"])
    assert names_for_people(own) == (("ant", "bee", "cat"), ())
    assert names_for_people(own, ("x", "y")) == (("x", "y", "2"), ())
    names, (note,) = names_for_people(small_model())
    assert names == ("0", "1", "2")
    assert note == "the model has no label names, so classes are numbers, the first of which is 0; give a `class_map`"
    imagenet = timm.create_model("test_vit", num_classes=1000)
    names, (note,) = names_for_people(imagenet)
    assert (names[0], names[999]) == ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue")
    assert note == "the model has no label names: its 1000 classes are taken for ImageNet's, by their number"
    wnids = timm.data.ImageNetInfo("imagenet-1k").label_names()
    imagenet.pretrained_cfg = {**imagenet.pretrained_cfg, "label_names": wnids}
    assert names_for_people(imagenet) == (names, ())
    imagenet.pretrained_cfg = {**imagenet.pretrained_cfg, "label_names": [f"own {i}" for i in range(1000)]}
    assert names_for_people(imagenet)[0][:2] == ("own 0", "own 1")


def test_a_class_map_names_the_classes(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "1.png")
    (tmp_path / "map.txt").write_text("mouse\nrat\nvole\n")
    by_number = told(tmp_path, tmp_path / "1.png").predictions[0].top
    named = told(tmp_path, tmp_path / "1.png", class_map=tmp_path / "map.txt").predictions[0].top
    renamed = {"0": "mouse", "1": "rat", "2": "vole"}
    assert named == tuple(Guess(renamed[guess.label], guess.index, guess.probability) for guess in by_number)


def test_the_table_is_written_once_and_whole(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a,b.png")
    report = told(tmp_path, tmp_path / "a,b.png", top=2)
    table = tmp_path / "out.csv"
    report.save(table)
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["path", "top1", "probability1", "top2", "probability2"]
    assert row["path"] == str(tmp_path / "a,b.png")
    assert float(row["probability1"]) == pytest.approx(report.predictions[0].top[0].probability, rel=1e-5)
    with pytest.raises(ArtifactError, match="exists"):
        report.save(table)
    report.save(table, force=True)


@pytest.mark.parametrize(
    ("images", "options", "kind", "message"),
    [
        ([], {}, UsageError, "no image given; name one, such as photo.jpg, a folder of them, or the word digits"),
        (["1.png"], {"top": 0}, UsageError, "`top=0` is not a whole number from 1 to 1000000; type `top=5`"),
        (["none.jpg", "empty", "pipe"], {}, DataError,
         "cannot read 'none.jpg' (does not exist), 'empty' (no images in it), 'pipe' (it is a pipe, not a file); give "
         "JPEG, PNG, WEBP, BMP or TIFF files, or the word digits, or folders of them"),
        (["1.png"], {"batch_size": 0}, UsageError, "`batch_size=0` is not a whole number from 1"),
        (["1.png"], {"class_map": "1.png"}, DataError, "cannot read the class map 1.png: it is not text"),
    ],
)  # fmt: skip
def test_refusals(images: list[str], options: dict[str, Any], kind: type[TokencutError], message: str, tmp_path: Path,
                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    picture(1).save("1.png")
    Path("empty").mkdir()
    os.mkfifo("pipe")
    with pytest.raises(kind) as caught:
        told(tmp_path, *images, **options)
    assert str(caught.value).startswith(message)


def test_a_model_without_a_head_predicts_nothing(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "1.png")
    with pytest.raises(ModelError, match="has no classification head .* so there is no class to predict; "):
        predict(small_model(classes=0), tmp_path / "1.png")


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [51]})
    model = Answers(lambda level: torch.stack([level, level * torch.nan], dim=1), 2)
    with pytest.raises(ModelError, match="not finite numbers in fp32; give it other weights"):
        predict(model, root, workers=0, device="cpu")
