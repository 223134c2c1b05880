"""What is not exported: said in one line, and no file, or the old one, is left."""

from __future__ import annotations

import errno
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import skip_capture, small
from model_files import names_in

from tokencut.errors import ArtifactError, ModelError, TokencutError, UsageError
from tokencut.export.run import export_model
from tokencut.export.runtimes import runtimes
from tokencut.export.runtimes.onnxruntime import OnnxRuntime
from tokencut.export.runtimes.torch_export import TorchExport

ENDINGS = ", ".join(sorted(kind.suffix for kind in runtimes().values()))


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_capture(monkeypatch)


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("m.bin", {}, UsageError,
         f"m.bin ends in none of {ENDINGS}, which say what to write; type `path='m.onnx'`, or "
         "`format='timm'` for a folder"),
        ("m.engine", {}, UsageError,
         "m.engine would be an engine, which TensorRT builds of an .onnx file on the GPU that runs it; type "
         "`path='m.onnx'`, and give that to trtexec there"),
        ("m.onnx", {"opset": 17}, UsageError,
         "`opset=17` is not a whole number from 18 to 22; type `opset=20`"),
        ("m.onnx", {"opset": 23}, UsageError,
         "`opset=23` is not a whole number from 18 to 22; type `opset=20`"),
        ("m.pt2", {"opset": 18}, UsageError, "`opset` is for .onnx files, and m.pt2 is none; leave it out"),
        ("m.pt2", {"batch_size": 0}, UsageError,
         "`batch_size=0` is not a whole number from 1 to 65536; type `batch_size=64`"),
        ("m.pt2", {"limit": 0}, UsageError, "`limit=0` is not a whole number from 1 to 1000000000; type `limit=1000`"),
        ("nowhere/m.pt2", {}, ArtifactError,
         "cannot write nowhere/m.pt2: the folder nowhere does not exist; create it first"),
        ("there.pt2", {}, ArtifactError, "there.pt2 exists; add `force=True` to replace it, or give another `path`"),
    ],
)  # fmt: skip
def test_refused_before_any_work(
    path: str, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("began"))
    Path("there.pt2").write_text("before")
    with pytest.raises(error) as raised:
        export_model(small(), path, **options)
    assert str(raised.value) == message
    assert names_in(tmp_path) == ["there.pt2"]
    assert Path("there.pt2").read_text() == "before"


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(TokencutError) as raised:
        export_model(small(), tmp_path / "m.onnx")
    assert str(raised.value) == (
        f"writing {tmp_path / 'm.onnx'} needs onnx and onnxruntime and onnxscript, which are not installed; type "
        "pip install 'tokencut[onnx]'"
    )


def test_weights_of_another_type_or_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError,
        match="^export takes a model in fp32, and this one has weights in bfloat16; call model.float\\(\\) first$",
    ):
        export_model(small().bfloat16(), tmp_path / "m.pt2")
    monkeypatch.setattr(OnnxRuntime, "most_weights", 1000)
    with pytest.raises(
        ArtifactError,
        match=r"^the model has 0\.0 GiB of weights, which is more than one \.onnx file holds; type `path='.*m\.pt2'`$",
    ):
        export_model(small(), tmp_path / "m.onnx")


def raises(error: Exception) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_model_that_is_not_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "export", raises(RuntimeError("data-dependent\nbranch")))
    with pytest.raises(
        ModelError,
        match=r"^torch.export cannot capture mine as one graph \(data-dependent branch\); please report the model's "
        "name and options$",
    ):
        export_model(small(), tmp_path / "m.pt2", name="mine")
    assert names_in(tmp_path) == []


def test_an_operator_that_onnx_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", raises(RuntimeError("no function for it")))
    with pytest.raises(
        ModelError,
        match=r"^torch.onnx cannot translate mine \(no function for it\); type `path='FILE\.pt2'`, and please report "
        "the model's name and options$",
    ):
        export_model(small("topk"), tmp_path / "m.onnx", name="mine")
    assert names_in(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (OnnxRuntime, TorchExport):
        monkeypatch.setattr(kind, "write", raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        path = tmp_path / f"m{kind.suffix}"
        with pytest.raises(ArtifactError, match=f"{path}: No space left on device; nothing was written$"):
            export_model(small("topk"), path, limit=2)
    assert names_in(tmp_path) == []


@pytest.mark.usefixtures("instant")
def test_another_models_logits_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = (tmp_path / "m.pt2").write_text("before")
    read = TorchExport.open
    monkeypatch.setattr(TorchExport, "open", lambda *given: lambda images: read(*given)(images) + 0.5)
    with pytest.raises(
        ArtifactError,
        match=r"m\.pt2 would not give the model's logits: 4 of 4 images differ by more than 1\.0e-03, at most by "
        r"5\.0e-01; nothing was written, please report the model's name and options$",
    ):
        export_model(small("topk"), tmp_path / "m.pt2", limit=4, force=True)
    assert (tmp_path / "m.pt2").read_text() == "before"
    assert kept == len("before")
    assert names_in(tmp_path) == ["m.pt2"]


@pytest.mark.usefixtures("instant")
def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    model = small("topk")
    model.model.head.bias.data[:] = torch.finfo(torch.float32).max  # finite, and beyond that with what is added
    model.model.head.weight.data[:] = torch.finfo(torch.float32).max
    with pytest.raises(
        ModelError, match="^the model gives logits that are not finite numbers, so no file of it can be checked; "
    ):
        export_model(model, tmp_path / "m.pt2", limit=2)
    model.model.head.bias.data[0] = float("nan")
    with pytest.raises(
        ModelError,
        match="^the model's weights cannot be used: 1 with numbers that are not finite: model.head.bias; give",
    ):
        export_model(model, tmp_path / "m.pt2", limit=2)
    assert names_in(tmp_path) == []
