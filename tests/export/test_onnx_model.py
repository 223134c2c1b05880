"""An exported file wherever a model may stand: the same logits, accuracy and reports, and what it refuses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import timm
import torch
from image_files import write_folder
from observing import Seen
from torch import Tensor

from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import ArtifactError, ModelError, TokencutError, UsageError
from tokencut.evaluation.accuracy import evaluate
from tokencut.export.info import KEY
from tokencut.export.run import export_model
from tokencut.export.runtimes import open_exported
from tokencut.export.timing import profile_exported
from tokencut.model import CompressedModel, compress
from tokencut.models.artifact import read_info
from tokencut.models.loading import load_model
from tokencut.profiling.measuring import profile

CLASSES = ("ant", "bee", "cow")


def small() -> CompressedModel:
    """One block, which reduces 16 image tokens to 8, with a head whose logits differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", img_size=64, num_classes=3, depth=1)
    model.head.weight.data.mul_(20)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": CLASSES, "mean": (0.4, 0.5, 0.6), "crop_pct": 0.8}
    return compress(model, keep=0.5, layers=(1,), method="evit").eval()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Files:
    """Exported files, to be read only: for any number of images, for 4 of them not normalised, and dense."""

    dynamic: Path
    fixed: Path
    dense: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    made = Files(*(folder / f"{name}.onnx" for name in ("dynamic", "fixed", "dense")))
    model = small()
    export_model(model, made.dynamic, limit=2)
    export_model(model, made.fixed, opset=22, limit=2, dynamic_batch=False, batch_size=4, with_preprocessing=True)
    export_model(model.model, made.dense, limit=2, dynamic_batch=False, batch_size=2)
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of six images."""
    return write_folder(tmp_path_factory.mktemp("pictures") / "val", CLASSES, images=6)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 4, 9])
def test_the_same_logits_for_any_number_of_images(files: Files, batch: int) -> None:
    model = small()
    with torch.no_grad():
        expected = model(images(batch))
        torch.testing.assert_close(open_exported(files.dynamic)(images(batch)), expected, rtol=1e-4, atol=1e-4)
        std = torch.tensor(model.pretrained_cfg["std"]).view(1, 3, 1, 1)
        mean = torch.tensor(model.pretrained_cfg["mean"]).view(1, 3, 1, 1)
        unnormalised = images(batch) * std + mean
        torch.testing.assert_close(open_exported(files.fixed)(unnormalised), expected, rtol=1e-4, atol=1e-4)


def test_preprocessing_batch_size_and_opset_are_the_files_own(files: Files) -> None:
    graph = onnx.load(files.fixed)
    assert [dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim] == [4, 3, 64, 64]
    assert {imported.domain: imported.version for imported in graph.opset_import}[""] == 22
    info = open_exported(files.fixed).info
    assert (info.batch_size, info.normalises) == (4, True)


def test_it_tells_what_images_it_takes(files: Files) -> None:
    own, plain = preprocessing_of(small()), preprocessing_of(open_exported(files.dynamic))
    assert plain.config == own.config
    baked = preprocessing_of(open_exported(files.fixed)).config
    assert baked == {**own.config, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    assert open_exported(files.dynamic).num_classes == 3
    assert not list(open_exported(files.dynamic).parameters())


@pytest.mark.parametrize("which", ["dynamic", "fixed"])
def test_the_same_accuracy(files: Files, which: str, pictures: Path) -> None:
    model = open_exported(getattr(files, which))
    expected = evaluate(small(), pictures, workers=0, device="cpu")
    found = evaluate(model, pictures, workers=0, device="cpu", batch_size=5)
    assert (found.top1, found.top5, found.images) == (expected.top1, expected.top5, 18)
    assert found.correct == expected.correct
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.notes == expected.notes == ()


def retold(path: Path, copy: Path, old: str, new: str) -> Path:
    """A copy of a file that says something else about its model."""
    graph = onnx.load(path)
    (entry,) = graph.metadata_props
    assert old in entry.value
    entry.value = entry.value.replace(old, new)
    onnx.save(graph, copy)
    return copy


def test_a_model_without_a_head_is_not_evaluated(files: Files, pictures: Path, tmp_path: Path) -> None:
    headless = retold(files.dense, tmp_path / "headless.onnx", '"num_classes":3', '"num_classes":0')
    with pytest.raises(ModelError, match=r"^test_vit.* has no classification head \(num_classes=0\)"):
        evaluate(open_exported(headless), pictures, workers=0, device="cpu")


def test_a_profile_alone(files: Files) -> None:
    model, seen = small(), Seen()
    report = profile_exported(open_exported(files.dynamic), batch_size=2, rounds=3, name="mine", observer=seen)
    expected = profile(model, latency=False)
    assert (report.model, report.method, report.keep, report.batch_size) == ("mine", "evit", 0.5, 2)
    assert report.dense == expected.dense
    assert (report.compressed.gmacs, report.compressed.params) == (
        expected.compressed.gmacs,
        expected.compressed.params,
    )
    assert report.flops_reduction == pytest.approx(expected.flops_reduction)
    assert report.stages == model.recipe.stages
    assert report.compressed.latency_ms
    assert (report.speedup, report.stage_share, report.speedup_spread) == (None, None, None)
    assert seen.told[-1] == ("timing mine", 3, 3, {})
    assert set(report.to_dict()["versions"]) == {"torch", "timm", "tokencut", "onnxruntime"}
    assert set(report.to_dict()["dense"]) == {"gmacs", "params"}


def test_a_profile_beside_the_dense_model(files: Files) -> None:
    report = profile_exported(open_exported(files.dynamic), dense=open_exported(files.dense), batch_size=2, rounds=3)
    assert report.speedup
    assert report.dense.latency_ms
    assert report.speedup == pytest.approx(report.dense.latency_ms / report.compressed.latency_ms)  # type: ignore[operator]
    assert report.model == "test_vit.r160_in1k"


def test_a_profile_of_the_dense_model(files: Files) -> None:
    report = profile_exported(open_exported(files.dense), batch_size=2, rounds=3)
    assert (report.method, report.keep, report.speedup, report.flops_reduction) == (None, 1.0, 1.0, 0.0)
    assert report.dense == report.compressed
    assert report.stages == ()


def test_a_profile_without_times(files: Files) -> None:
    report = profile_exported(open_exported(files.fixed), latency=False)
    assert (report.speedup, report.compressed.latency_ms, report.notes) == (None, None, ())


def test_a_file_for_one_batch_size_is_timed_with_that(files: Files) -> None:
    report = profile_exported(open_exported(files.fixed), dense=open_exported(files.dense), rounds=3)
    assert report.batch_size == 4
    assert report.notes[0] == "timed with batches of 4, the only ones that the file takes"


def test_the_dense_side_has_to_be_the_same_model_and_dense(files: Files, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        profile_exported(open_exported(files.dynamic), dense=open_exported(files.fixed))
    assert str(raised.value) == (
        f"{files.fixed} was exported with a reduction, so it is not the dense side; type "
        f"`tokencut.export_model(dense, {str(files.fixed)!r}, force=True)`"
    )
    other = retold(files.dense, tmp_path / "other.onnx", '"gmacs":0.', '"gmacs":9.')
    with pytest.raises(
        UsageError,
        match="other.onnx is not the dense side of .*: it has 9.002 GMACs and 92419 parameters, expected 0.002 and "
        "92419; export the same model with `dense=True`$",
    ):
        profile_exported(open_exported(files.dynamic), dense=open_exported(other))
    with pytest.raises(
        UsageError, match=r"^`batch_size=0` is not a whole number from 1 to 65536; type `batch_size=64`$"
    ):
        profile_exported(open_exported(files.dynamic), batch_size=0)


def test_without_onnxruntime(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(TokencutError) as raised:
        open_exported(files.dynamic)
    assert str(raised.value) == (
        f"running {files.dynamic} needs onnxruntime, which is not installed; type pip install 'tokencut[onnx]'"
    )


def test_no_file_a_damaged_file_and_somebody_elses(files: Files, tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"gone.onnx does not exist; type `tokencut\.export_model\(model, '.*'\)` to make it$"
    ):
        open_exported(tmp_path / "gone.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(files.dynamic.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"^onnxruntime cannot load .*damaged.onnx \(.*\); export the model again$"):
        open_exported(damaged)
    graph = onnx.load(files.dynamic)
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "bare.onnx")
    with pytest.raises(
        ArtifactError,
        match="bare.onnx was not written by tokencut, so nobody knows what images it takes; type "
        r"`tokencut\.export_model\(model, 'FILE\.onnx'\)`$",
    ):
        open_exported(tmp_path / "bare.onnx")
    graph.metadata_props.add(key=KEY, value='{"type": "exported-model", "format": 7}')
    onnx.save(graph, tmp_path / "newer.onnx")
    with pytest.raises(
        ArtifactError, match=r"^cannot load .*newer.onnx: the file has format 7, and this tokencut reads"
    ):
        open_exported(tmp_path / "newer.onnx")


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".XML"])
@pytest.mark.parametrize("opening", [load_model, read_info])
def test_other_commands_name_what_they_take(opening: Callable[[str], object], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"graph, and more of it than the length of a header")
    with pytest.raises(TokencutError) as raised:
        opening(str(path))
    assert str(raised.value) == (
        f"{path} is an exported model, which profile and eval run where its runtime is installed; name the tokencut "
        "file that it came from"
    )
