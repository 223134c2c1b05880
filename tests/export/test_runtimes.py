"""A kind of exported file is one registered class, which is all that writing, opening, judging and timing it take."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from export_models import small
from image_files import write_folder
from model_files import names_in
from torch import nn

from tokencut.errors import ArtifactError, TokencutError, UsageError
from tokencut.evaluation.accuracy import evaluate
from tokencut.evaluation.comparison import compare
from tokencut.export.graph import Graph
from tokencut.export.info import KEY
from tokencut.export.run import export_model
from tokencut.export.runtimes import ExportedModel, Runtime, base, exported_kind, open_exported, runtimes
from tokencut.export.timing import profile_exported
from tokencut.models.exported import ENDINGS


class Remembered(Runtime):
    """Two files, of which one is what the other is about; run by the model that was written last."""

    name = "remembered"
    suffix = ".of.two"
    label = "memory"
    beside = (".half",)
    largest_batch = 3
    models: ClassVar[list[nn.Module]] = []
    sizes: ClassVar[list[int]] = []

    def write(self, graph: Graph, path: Path) -> None:
        self.models.append(graph.model)
        path.write_text(graph.info.to_text())
        self.files(path)[1].write_text("weights")

    def _open(self, path: Path) -> ExportedModel:
        def run(images: torch.Tensor) -> torch.Tensor:
            self.sizes.append(len(images))
            logits: torch.Tensor = self.models[-1](images)
            return logits

        return ExportedModel(
            path, path.read_text(), run, ("memory", "7"), largest_batch=self.largest_batch, notes=("be careful",)
        )


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> type[Remembered]:
    runtimes()
    monkeypatch.setitem(base.registered(), Remembered.name, Remembered())
    Remembered.models.clear()
    Remembered.sizes.clear()
    return Remembered


def test_a_new_kind_is_written_judged_and_timed(remembered: type[Remembered], tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "val", ["ant", "bee", "cow", "dog", "elk"], images=2)
    model = small("topk")
    report = export_model(model, tmp_path / "m.of.two", limit=5, batch_size=5)
    assert (report.format, report.bytes) == ("remembered", len((tmp_path / "m.of.two").read_text()) + len("weights"))
    assert remembered.sizes == [3, 2], "more than the largest batch at once"
    assert names_in(tmp_path) == ["m.half", "m.of.two", "val"]
    opened = open_exported(tmp_path / "m.of.two")
    expected, found = (evaluate(each, pictures, workers=0, device="cpu") for each in (model, opened))
    assert (found.correct, found.loss) == (expected.correct, pytest.approx(expected.loss))
    both = compare(opened, model, pictures, workers=0, device="cpu")
    assert both.agreement == 100.0
    timed = profile_exported(opened, rounds=3, batch_size=64)
    assert (timed.batch_size, timed.versions["memory"]) == (3, "7")
    assert timed.notes[0] == "timed with batches of 3, the largest ones that the file takes"


def test_neither_of_two_files_is_left_or_lost(
    remembered: type[Remembered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.half").write_text("the user's")
    with pytest.raises(ArtifactError, match=r"m\.half exists; add `force=True` to replace it"):
        export_model(small("topk"), tmp_path / "m.of.two", limit=2)
    monkeypatch.setattr(remembered, "open", lambda self, path: lambda images: torch.zeros(len(images), 5) + 9)
    with pytest.raises(ArtifactError, match=r"m\.of\.two would not give the model's logits"):
        export_model(small("topk"), tmp_path / "m.of.two", limit=2, force=True)
    assert names_in(tmp_path) == ["m.half"]
    assert (tmp_path / "m.half").read_text() == "the user's"


def test_a_name_decides_and_the_longer_ending_counts() -> None:
    assert exported_kind("a/model.onnx") is runtimes()["onnx"]
    assert exported_kind("MODEL.PT2") is runtimes()["pt2"]
    assert exported_kind("model.safetensors") is None
    with pytest.raises(UsageError, match=r"^m\.bin is no exported file: it ends in none of .*\.onnx, .*; name one"):
        open_exported("m.bin")


@pytest.mark.parametrize("kind", runtimes().values(), ids=lambda kind: kind.name)
def test_every_kind_is_refused_as_weights(kind: Runtime) -> None:
    """What takes weights, below this folder, knows how these names end."""
    assert f"model{kind.suffix}".endswith(ENDINGS)
    assert kind.suffix == kind.suffix.lower()


def test_no_other_pt2_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("ran what is in the file"))
    path = tmp_path / "m.pt2"
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ArtifactError, match=r"^torch cannot load .*m\.pt2 \(.*\); export the model again$"):
        open_exported(path)
    for content in (None, "x" * 20, '{"type": "exported-model", "format": 7}'):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("m/version", "1")
            if content is not None:
                archive.writestr(f"m/extra/{KEY}", content)
        path.write_bytes(buffer.getbuffer())
        with pytest.raises(TokencutError, match="was not written by tokencut|cannot load"):
            open_exported(path)
