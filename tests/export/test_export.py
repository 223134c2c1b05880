"""What is exported gives the model's logits, in one file without paths."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_models import normalised, pixels, small
from model_files import names_in
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
from tensorrt_rules import assert_tensorrt_takes

from tokencut.export import run as export
from tokencut.export.graph import INPUT
from tokencut.export.info import KEY, export_info_from_text
from tokencut.export.run import ExportReport, export_model
from tokencut.export.runtimes import open_exported
from tokencut.methods import methods
from tokencut.model import CompressedModel


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """An .onnx for any number of images."""
    path = tmp_path_factory.mktemp("dynamic") / "model.onnx"
    return export_model(small(), path, limit=5, batch_size=2, name="mine")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """A .pt2 for any number of images."""
    return export_model(small(), tmp_path_factory.mktemp("packed") / "model.pt2", limit=5, batch_size=2)


@pytest.mark.slow
def test_any_number_of_images(dynamic: ExportReport) -> None:
    session, model = onnxruntime.InferenceSession(dynamic.output), small()
    assert [dim if isinstance(dim, int) else "batch" for dim in session.get_inputs()[0].shape] == ["batch", 3, 64, 64]
    for batch in (1, 2, 5):
        images = normalised(model, pixels(batch))
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(images).numpy(), atol=1e-5)


def test_the_file_is_checked_and_told_about(dynamic: ExportReport) -> None:
    assert dynamic.agreement.equal_top1 == 100.0
    assert 0 < dynamic.agreement.largest_difference < 1e-5
    assert dynamic.to_dict() == {
        "output": str(dynamic.output), "format": "onnx", "model": "mine", "method": "bat", "keep": 0.5, "opset": 20,
        "dynamic_batch": True, "batch_size": None, "with_preprocessing": False, "gmacs": dynamic.info.gmacs,
        "params": dynamic.info.params, "bytes": dynamic.output.stat().st_size, "data": "noise", "images": 5,
        "largest_difference": dynamic.agreement.largest_difference, "tolerance": 0.001, "differing": 0, "allowed": 1,
        "equal_top1": 100.0, "relative_difference": pytest.approx(0, abs=1e-5),
        "notes": ["checked on 5 images of noise, since no `data` was given"],
    }  # fmt: skip


def test_an_onnx_file_is_sound_and_says_what_it_is(dynamic: ExportReport) -> None:
    model = onnx.load(dynamic.output)
    onnx.checker.check_model(model, full_check=True)
    assert {imported.domain: imported.version for imported in model.opset_import}[""] == 20
    (entry,) = model.metadata_props
    assert entry.key == KEY
    assert export_info_from_text(entry.value) == dynamic.info
    assert dynamic.info.recipe == small().recipe


@pytest.mark.slow
@pytest.mark.parametrize("which", ["dynamic", "packed"])
def test_a_file_holds_no_path_and_stands_alone(which: str, request: pytest.FixtureRequest) -> None:
    report: ExportReport = request.getfixturevalue(which)
    content = report.output.read_bytes()
    package = Path(torch.__file__).parents[1].name.encode()
    assert package not in content
    assert str(Path(export.__file__).parents[1]).encode() not in content
    assert names_in(report.output.parent) == [report.output.name]


def test_a_pt2_file(packed: ExportReport) -> None:
    told = {KEY: ""}
    program = torch.export.load(io.BytesIO(packed.output.read_bytes()), extra_files=told)
    assert export_info_from_text(told[KEY]) == packed.info
    forward, model = program.module(), small()
    for batch in (1, 2, 5):
        images = normalised(model, pixels(batch))
        with torch.no_grad():
            torch.testing.assert_close(forward(images), model(images), rtol=1e-5, atol=1e-5)
    assert packed.to_dict()["opset"] is None
    opened = open_exported(packed.output)
    assert opened.runtime == ("torch", torch.__version__)
    assert opened.notes == (
        f"{packed.output} may hold code, which opening it runs: open only files whose author you trust",
    )
    assert torch.equal(opened(images), forward(images))


def test_preprocessing_and_batch_size_can_be_baked_in(tmp_path: Path) -> None:
    """As .pt2; tests/test_onnx_model.py has such an .onnx file."""
    model = small("topk")
    report = export_model(
        model, tmp_path / "model.pt2", with_preprocessing=True, dynamic_batch=False, batch_size=3, limit=4
    )
    assert (report.agreement.images, report.info.batch_size, report.info.normalises) == (4, 3, True)
    forward = torch.export.load(io.BytesIO(report.output.read_bytes())).module()
    with torch.no_grad():
        expected = model(normalised(model, pixels(3)))
        torch.testing.assert_close(forward(pixels(3) / 255), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises((AssertionError, RuntimeError), match="3"):
        forward(pixels(4) / 255)


class Batches(CalibrationDataReader):
    """Two batches of images to calibrate by."""

    def __init__(self, model: CompressedModel, batch: int) -> None:
        self.batches = iter([{INPUT: normalised(model, pixels(batch)).numpy()}] * 2)

    def get_next(self) -> dict[str, Any]:
        return next(self.batches, {})


def assert_it_can_be_prepared(model: CompressedModel, report: ExportReport) -> None:
    """What comes before static quantisation and TensorRT (shapes, constants folded), and the quantisation itself."""
    path, batch = report.output, report.info.batch_size or 3
    inferred = SymbolicShapeInference.infer_shapes(onnx.load(path)).graph
    known = {
        value.name for value in (*inferred.value_info, *inferred.output) if value.type.tensor_type.HasField("shape")
    }
    assert not [node.op_type for node in inferred.node if not known.issuperset(filter(None, node.output))]
    assert_tensorrt_takes(onnx.shape_inference.infer_shapes(onnx.load(path)))
    prepared, quantised = path.with_name("prepared.onnx"), path.with_name("quantised.onnx")
    quant_pre_process(path, prepared)
    quantize_static(prepared, quantised, Batches(model, batch))
    given = normalised(model, pixels(batch))
    with torch.no_grad():
        expected = model(given).numpy()
    logits, rounded = (
        onnxruntime.InferenceSession(each).run(None, {INPUT: given.numpy()})[0] for each in (prepared, quantised)
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert rounded.shape == expected.shape and np.isfinite(rounded).all() and not np.array_equal(rounded, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Please consider to run pre-processing:UserWarning")
def test_a_file_for_any_number_of_images_can_be_prepared(dynamic: ExportReport) -> None:
    assert_it_can_be_prepared(small(), dynamic)


@pytest.mark.parametrize("method", sorted(set(methods(keeps_grid=False)) - {"bat", "evit"}))
@pytest.mark.slow
def test_every_method_gives_the_same_under_onnxruntime(
    method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those that no other test here and in test_onnx_model.py exports; the model stays as it was."""
    model = small(method).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export_model(model, tmp_path / "model.onnx", dynamic_batch=False, batch_size=4, limit=8)
    assert report.agreement.differing == 0
    assert report.agreement.largest_difference < 1e-5
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert_it_can_be_prepared(model.eval(), report)


@pytest.mark.slow
def test_a_model_of_other_channels_is_written(tmp_path: Path) -> None:
    report = export_model(small(in_chans=4), tmp_path / "model.pt2", with_preprocessing=True, limit=4)
    assert report.info.preprocessing["input_size"] == (4, 64, 64) and report.agreement.largest_difference < 1e-4
