"""Two models on the same images: counted by hand, agreement by class and not by number, and what cannot be compared."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from image_files import greys, write_folder
from judged_models import Answers, small_model

from tokencut.errors import ModelError
from tokencut.evaluation.accuracy import evaluate
from tokencut.evaluation.comparison import compare
from tokencut.model import compress


def by_level(*answers: int, classes: int = 3) -> Answers:
    """Answers the greys 0, 51, 102, ... (0, 0.2, 0.4, ...) by these classes."""
    table = torch.eye(classes)[list(answers)]
    return Answers(lambda level: table[(level * 5).round().long()], classes)


def test_counts_by_hand(tmp_path: Path) -> None:
    # Six images of three classes; each model is wrong in its own way.
    root = greys(tmp_path / "set", {"a": [0, 51], "b": [102, 153], "c": [204, 255]})
    first, second = by_level(0, 0, 1, 1, 0, 0), by_level(0, 1, 1, 0, 1, 0)
    report = compare(first, second, root, workers=0, device="cpu", names=("one", None))
    assert (report.images, report.first.model, report.first.top1) == (6, "one", pytest.approx(400 / 6))
    assert report.second.top1 == pytest.approx(200 / 6)
    assert (report.both_right, report.only_first_right, report.only_second_right) == (2, 2, 0)
    # The same class for images 1, 3 and 6, of which the last is wrong.
    assert report.agreement == 50.0
    differences = torch.tensor([0.0, 100, 0, 100, 0, 0])
    assert report.difference.points == pytest.approx(float(differences.mean()))
    assert report.difference.standard_error == pytest.approx(float(differences.std()) / math.sqrt(6))
    assert report.first.gmacs is None  # no family that tokencut knows
    values = report.to_dict()
    assert (values["difference"], values["standard_error"]) == (
        report.difference.points, report.difference.standard_error,
    )  # fmt: skip
    assert values["clear"] is False
    assert set(values["first"]) == {"model", "top1", "top5", "loss", "gmacs", "seconds", "images_per_second"}


def test_a_class_is_the_same_whatever_number_a_model_has_for_it(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [0], "b": [51], "c": [102]})
    one, other = by_level(0, 1, 1), by_level(2, 0, 0)
    one.pretrained_cfg = {**one.pretrained_cfg, "label_names": ["a", "b", "c"]}
    other.pretrained_cfg = {**other.pretrained_cfg, "label_names": ["b", "c", "a"]}
    report = compare(one, other, root, workers=0, device="cpu")
    assert (report.first.top1, report.second.top1) == (pytest.approx(200 / 3), pytest.approx(200 / 3))
    assert report.agreement == 100.0


def test_each_is_judged_as_alone_and_its_cost_is_known(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "val", ["ant", "bee", "cat"], images=4)
    dense = small_model()
    half = compress(dense, keep=0.5, layers=[2])
    report = compare(half, dense, root, workers=0, device="cpu", limit=7)
    for found, model in ((report.first, half), (report.second, dense)):
        alone = evaluate(model, root, workers=0, device="cpu", limit=7)
        assert (found.top1, found.loss, found.correct) == (alone.top1, alone.loss, alone.correct)
    assert report.first.gmacs is not None and report.second.gmacs is not None
    assert 0 < report.first.gmacs < report.second.gmacs
    assert report.notes.count("an evenly spread sample of 7 of 12 images") == 1
    same = compare(dense, dense, root, workers=0, device="cpu")
    assert (same.difference.points, same.difference.standard_error, same.agreement) == (0.0, 0.0, 100.0)


def test_an_image_that_cannot_be_read_counts_for_neither(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [0] * 100, "b": [51] * 100})
    (root / "a/7.png").write_text("no image")
    report = compare(by_level(0, 1, classes=2), by_level(0, 0, classes=2), root, workers=0, device="cpu")
    assert (report.images, report.both_right, report.only_first_right) == (199, 99, 100)


def test_a_model_without_a_head_is_refused_before_the_other_is_judged(tmp_path: Path) -> None:
    def fail(level: torch.Tensor) -> torch.Tensor:
        pytest.fail("judged the other")

    root = greys(tmp_path / "set", {"a": [0], "b": [51]})
    with pytest.raises(ModelError, match="has no classification head"):
        compare(Answers(fail, 2), small_model(classes=0), root, workers=0, device="cpu")
