"""A folder of timm's: timm loads the dense weights, tokencut the compressed model, and nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from model_files import compressed_model, images, names_in, same_weights, shaken
from torch import nn

from tokencut.errors import ArtifactError, ModelError, TokencutError, UsageError
from tokencut.export.run import ExportReport, export_model
from tokencut.export.runtimes import runtimes
from tokencut.export.timm_folder import FILES
from tokencut.model import compress
from tokencut.models import artifact
from tokencut.models.alterations import Alterations, alter
from tokencut.models.loading import load_model
from tokencut.models.metadata import Origin


def written(model: nn.Module, folder: Path, **options: Any) -> ExportReport:
    return export_model(model, folder, format="timm", limit=3, batch_size=3, **options)


def refusal(kind: type[TokencutError], model: nn.Module, folder: Path, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        written(model, folder, **options)
    return str(caught.value)


@torch.no_grad()
def test_both_read_it(tmp_path: Path) -> None:
    model = compressed_model()
    model.model.pretrained_cfg["label_names"] = ("a", "b", "c", "d", "e|")
    artifact.mark_origin(model.model, Origin("checkpoint", sha256="ab", licence="mit\nx: y"))
    folder = tmp_path / "new"
    report = written(model, folder, measured={"top1": 71.0, "dense_top1": 72.0, "images": 900})
    assert names_in(tmp_path) == ["new"] and names_in(folder) == sorted(FILES)
    assert report.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert (report.to_dict()["format"], report.agreement.largest_difference, report.opset) == ("timm", 0.0, None)
    dense = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert same_weights(dense, dict(model.model.state_dict()))
    assert torch.equal(dense(images()), model.model(images()))
    assert dense.pretrained_cfg["label_names"] == ["a", "b", "c", "d", "e|"]
    loaded = load_model(str(folder))
    assert loaded.recipe == model.recipe
    assert torch.equal(loaded.model(images()), model(images()))
    info = artifact.read_info(folder / "model.safetensors")
    assert info.measured["top1"] == 71.0 and info.measured["gmacs"] == report.info.gmacs
    readme = (folder / "README.md").read_text()
    assert readme.startswith('---\nlibrary_name: timm\nlicense: "mit x: y"\ntags:\n- timm\n')
    for row in ("| keep | 0.5 |", "| in blocks | 2, 4 |", "| image tokens | 16 -> 8 -> 4 |",
                "| top-1 in percent | 72.00 -> 71.00, on 900 images |"):  # fmt: skip
        assert row in readme
    assert str(tmp_path) not in readme + (folder / "config.json").read_text()


def test_a_dense_model(tmp_path: Path) -> None:
    model = compressed_model().model
    report = written(model, tmp_path / "dense")
    assert report.info.recipe is None and report.agreement.largest_difference == 0.0
    assert load_model(str(tmp_path / "dense")).recipe is None
    assert same_weights(load_model(str(tmp_path / "dense")).model, dict(model.state_dict()))
    assert "method" not in (tmp_path / "dense" / "README.md").read_text()


def test_only_what_was_written_here_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("x")
    model = compressed_model()
    written(model, folder)
    assert "exists; add `force=True` to replace it, or give another `path`" in refusal(ArtifactError, model, folder)
    written(compressed_model(method="topk"), folder, force=True)
    recipe = load_model(str(folder)).recipe
    assert recipe is not None and recipe.method == "topk"
    assert (folder / ".git" / "HEAD").read_text() == "x"
    (folder / "notes.txt").write_text("mine")
    message = refusal(ArtifactError, model, folder, force=True)
    assert "holds notes.txt, which was not written here; give another `path`" in message
    (folder / "notes.txt").unlink()
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit"}))  # another's, in timm's layout
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "holds README.md, config.json, model.safetensors, which" in refusal(ArtifactError, model, folder, force=True)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (tmp_path / "file").write_text("x")
    assert "cannot make the folder" in refusal(ArtifactError, model, tmp_path / "file", force=True)
    assert "does not exist" in refusal(ArtifactError, model, tmp_path / "no" / "folder")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencut.export.timm_folder._readme", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        written(compressed_model(), tmp_path / "new")
    assert names_in(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setattr("tokencut.export.timm_folder._by_timm", lambda _: compressed_model().model)
    other = shaken(compressed_model().model)
    assert "timm would load other weights from the folder; please" in refusal(ModelError, other, tmp_path / "new")
    assert names_in(tmp_path) == []


def test_what_timm_cannot_hold(tmp_path: Path) -> None:
    message = refusal(UsageError, compressed_model(method="dyvit"), tmp_path / "new")
    assert "the stages of method dyvit have weights of their own, which timm would refuse; pass on the" in message
    model = timm.create_model("test_vit", img_size=64, num_classes=5)
    alter(model, Alterations(pool="class+mean"))
    assert "the head reads the class token beside the mean of the" in refusal(UsageError, model, tmp_path / "new")
    assert "is for files of one graph, such as .onnx, and a folder of timm's holds none; leave it out" in refusal(
        UsageError, model, tmp_path / "new", with_preprocessing=True
    )
    assert names_in(tmp_path) == []


def test_an_epsilon_that_timm_has_no_argument_for_is_told(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=64, num_classes=5)
    alter(model, Alterations(norm_eps=1e-12))
    report = written(compress(model, keep=0.5), tmp_path / "new")
    assert any(note.startswith("its layer norms add 1e-12 to variances, for which timm") for note in report.notes)
    assert "Its layer norms add 1e-12 to variances" in (tmp_path / "new" / "README.md").read_text()
    assert load_model(str(tmp_path / "new")).dense.norm.eps == 1e-12


@pytest.mark.parametrize(
    ("path", "format", "message"),
    [
        ("folder", None, "type `path='folder.onnx'`, or `format='timm'` for a folder"),
        ("model.onnx", "pt2", "model.onnx does not end in .pt2, as a file of the format pt2 does; type `path='mod"),
        ("model", "tim", f"format 'tim' is none of {', '.join(runtimes())}, timm; type `format='timm'`, or leave "
         "it out"),
    ],
)  # fmt: skip
def test_formats(path: str, format: Any, message: str) -> None:  # noqa: A002
    with pytest.raises(UsageError) as caught:
        export_model(compressed_model(), path, format=format)
    assert message in str(caught.value)
