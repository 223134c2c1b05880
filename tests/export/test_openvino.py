"""OpenVINO's files: two that belong together, with the model's logits, and stages that stay in fp32."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from export_models import normalised, pixels, small
from model_files import names_in
from torch import nn

from tokencut.errors import ArtifactError, ModelError, TokencutError
from tokencut.export.graph import Graph
from tokencut.export.info import describe_export
from tokencut.export.run import ExportReport, export_model
from tokencut.export.runtimes import open_exported
from tokencut.export.runtimes.openvino import DIGEST, OpenVino

OF_STAGES = ("CumSum", "GatherElements", "Less", "ReduceMean", "SoftMax")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_model(small("topk"), tmp_path_factory.mktemp("openvino") / "m.xml", limit=5, batch_size=2)


@pytest.mark.slow
def test_it_gives_the_models_logits(report: ExportReport) -> None:
    model = small("topk")
    assert names_in(report.output.parent) == ["m.bin", "m.xml"]
    assert report.bytes == sum(file.stat().st_size for file in report.output.parent.iterdir())
    assert (report.format, report.opset, report.agreement.differing) == ("openvino", None, 0)
    assert 0 < report.agreement.largest_difference < 1e-5
    assert report.notes[-1].endswith("it gives these logits with INFERENCE_PRECISION_HINT=f32")
    opened = open_exported(report.output)
    assert opened.info == report.info
    assert opened.runtime[0] == "openvino"
    images = normalised(model, pixels(40))  # more than tokens: OpenVINO has had its own idea of so many
    with torch.no_grad():
        expected = model(images)
    kept = opened(images[:1])
    torch.testing.assert_close(opened(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept, expected[:1], rtol=1e-5, atol=1e-5)  # another call leaves what was given


def test_its_stages_compute_in_fp32_wherever_bf16_is_the_rule(report: ExportReport) -> None:
    layers = ElementTree.parse(report.output).iter("layer")
    marked = {
        layer.get("type"): layer.find("rt_info/attribute[@name='DisablePrecisionConversion']") is not None
        for layer in layers
    }
    assert {kind: marked[kind] for kind in OF_STAGES} == dict.fromkeys(OF_STAGES, True)
    assert {kind: marked[kind] for kind in ("Convolution", "Gelu", "Result")} == dict.fromkeys(
        ("Convolution", "Gelu", "Result"), False
    )


def test_neither_file_holds_a_path(report: ExportReport) -> None:
    package = Path(torch.__file__).parents[1].name.encode()
    for file in report.output.parent.iterdir():
        assert package not in file.read_bytes()
        assert str(Path(__file__).parents[1]).encode() not in file.read_bytes()


def test_files_that_do_not_belong_together(report: ExportReport, tmp_path: Path) -> None:
    for file in report.output.parent.iterdir():
        shutil.copy(file, tmp_path)
    path, weights = tmp_path / "m.xml", tmp_path / "m.bin"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError) as raised:
        open_exported(path)
    assert str(raised.value) == (
        f"{weights} is not the file that was written with {path}; copy both files, or export the model again"
    )
    weights.unlink()
    with pytest.raises(ArtifactError) as raised:
        open_exported(path)
    assert str(raised.value) == f"the weights of {path} are not there: {weights} does not exist; copy both files"
    weights.write_bytes(b"")
    path.write_text("<net")
    with pytest.raises(ArtifactError, match=r"^OpenVINO cannot load .*m\.xml \(.*\); export the model again$"):
        open_exported(path)


def test_somebody_elses_file(report: ExportReport, tmp_path: Path) -> None:
    for file in report.output.parent.iterdir():
        shutil.copy(file, tmp_path)
    path = tmp_path / "m.xml"
    tree = ElementTree.parse(path)
    told = tree.find("rt_info")
    assert told is not None
    for key in ("tokencut", DIGEST):
        entry = told.find(key)
        assert entry is not None
        told.remove(entry)
    tree.write(path)
    with pytest.raises(ArtifactError, match="was not written by tokencut, so nobody knows what images it takes"):
        open_exported(path)


def test_without_openvino(report: ExportReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))
    for call, verb in (
        (lambda: open_exported(report.output), f"running {report.output}"),
        (lambda: export_model(small(), tmp_path / "m.xml"), f"writing {tmp_path / 'm.xml'}"),
    ):
        with pytest.raises(TokencutError) as raised:
            call()
        assert str(raised.value) == (
            f"{verb} needs openvino, which is not installed; type pip install 'tokencut[openvino]'"
        )


class Erf(nn.Module):
    """An operator that OpenVINO does not have."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(images).mean((2, 3))


@pytest.mark.slow
def test_an_operator_that_it_does_not_have(tmp_path: Path) -> None:
    graph = Graph(Erf(), describe_export(small(), name="mine"))
    with pytest.raises(ModelError, match=r"^OpenVINO cannot translate mine \(.*\); type `path='FILE\.onnx'`, and"):
        OpenVino().write(graph, tmp_path / "m.xml")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bat", "dpc", "kmedoids", "tome"])
def test_other_methods_and_one_batch_size(method: str, tmp_path: Path) -> None:
    report = export_model(
        small(method), tmp_path / "m.xml", dynamic_batch=False, batch_size=3, limit=4, with_preprocessing=True
    )
    assert report.agreement.largest_difference < 1e-5
    assert open_exported(report.output).info.batch_size == 3


class SignalStack(ctypes.Structure):
    """What `sigaltstack` says of a thread: `stack_t` of Linux."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> int | None:
    found = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    start: int | None = found.start
    return start


@pytest.mark.slow
def test_the_stack_for_signals_stays_that_of_the_thread(report: ExportReport) -> None:
    # OpenVINO puts another in its place where a plugin is loaded, and back what may be unmapped by then.
    before = signal_stack()
    first, second = (open_exported(report.output) for _ in range(2))
    assert signal_stack() == before
    del first
    gc.collect()
    del second
    gc.collect()
    assert signal_stack() == before
