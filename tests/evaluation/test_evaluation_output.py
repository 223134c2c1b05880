"""What an evaluation tells: predictions, progress, and its report."""

from __future__ import annotations

import csv
import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from image_files import greys, write_folder
from judged_models import Answers, black_or_not, small_model
from observing import Seen

from tokencut.errors import ArtifactError, ModelError
from tokencut.evaluation.accuracy import EvaluationReport, evaluate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of eight images."""
    return write_folder(tmp_path / "set", ["ant", "bee", "cow"], 8)


def test_predictions_are_written_by_name(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a, b": [0, 9], "c": [9]})
    model = black_or_not()
    path = tmp_path / "out.csv"
    path.write_text("old")
    evaluate(model, root, workers=0, predictions=path, force=True)
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["path", "label", "top1", "top2"],
            ["a, b/1.png", "a, b", "a, b", "c"],
            ["a, b/2.png", "a, b", "c", "a, b"],
            ["c/1.png", "c", "c", "a, b"],
        ]


def test_predictions_hold_five_classes_in_the_models_words(folder: Path, tmp_path: Path) -> None:
    labels = ["cow", "dog", "Bee", "ant", "eel", "fox"]
    report = evaluate(small_model(6, labels), folder, workers=0, predictions=tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "top1", "top2", "top3", "top4", "top5"]
    assert tuple(row["label"] == row["top1"] for row in rows) == report.correct
    assert {row["label"] for row in rows} == {"cow", "Bee", "ant"}


def test_predictions_that_are_there_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    seen = Seen()
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(ArtifactError, match=r"out\.csv exists"):
        evaluate(small_model(), folder, workers=0, predictions=tmp_path / "out.csv", observer=seen)
    assert not seen.told and (tmp_path / "out.csv").read_text() == "mine"
    evaluate(small_model(), folder, workers=0, predictions=tmp_path / "out.csv", force=True)
    assert (tmp_path / "out.csv").read_text().startswith("path,label")


def test_a_folder_for_predictions_must_exist_before_anything_is_done(folder: Path, tmp_path: Path) -> None:
    seen = Seen()
    with pytest.raises(ArtifactError, match="does not exist"):
        evaluate(small_model(), folder, predictions=tmp_path / "no/out.csv", observer=seen)
    assert not seen.told


def test_a_failed_evaluation_writes_no_predictions(folder: Path, tmp_path: Path) -> None:
    model = Answers(lambda level: level[:, None] * float("nan") * torch.ones(3), 3)
    with pytest.raises(ModelError):
        evaluate(model, folder, workers=0, predictions=tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_progress_is_told_after_each_batch(folder: Path) -> None:
    seen = Seen()
    report = evaluate(small_model(), folder, batch_size=10, workers=0, observer=seen)
    assert [now[:3] for now in seen.told] == [(f"evaluating {report.model}", done, 24) for done in (10, 20, 24)]
    assert seen.told[-1].values["top1"] == report.top1
    assert seen.told[0].values["top1"] == 10 * sum(report.correct[:10])
    assert all(now.values["images_per_second"] > 0 for now in seen.told)


def test_the_report_becomes_json(folder: Path) -> None:
    report = evaluate(small_model(), folder, workers=0, gmacs=0.25)
    values = json.loads(json.dumps(report.to_dict()))
    assert list(values) == [
        *("model", "data", "images", "top1", "top5", "loss", "gmacs", "seconds", "images_per_second"),
        *("unreadable", "notes"),
    ]
    assert values["model"] == "test_vit.r160_in1k"
    assert values["top1"] == report.top1
    with pytest.raises(FrozenInstanceError):
        report.top1 = 100.0  # type: ignore[misc]
    assert isinstance(report, EvaluationReport)
