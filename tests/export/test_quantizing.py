"""Files in eight bits: what is quantised and what is not, judged beside fp32, and not kept where it costs too much."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_models import small
from image_files import write_folder
from model_files import names_in
from torch import nn

from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import ArtifactError, UsageError
from tokencut.evaluation.accuracy import evaluate
from tokencut.export import onnx_int8, quantizing
from tokencut.export.graph import Normalised
from tokencut.export.node_names import block_names, is_of_blocks, name_nodes
from tokencut.export.run import ExportReport, check_export, export_model
from tokencut.export.runtimes import open_exported

CLASSES = ["0", "1", "2", "3", "4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images to calibrate by, and others to judge by, of the five classes of `small`."""
    root = tmp_path_factory.mktemp("images")
    return {name: write_folder(root / name, CLASSES, images=2) for name in ("train", "val")}


@pytest.fixture(scope="module")
def static(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """A quantised .onnx for three images at a time, which normalises them itself."""
    return export_model(
        small(depth=2), tmp_path_factory.mktemp("static") / "m.onnx", quantize="int8", calibration=folders["train"],
        data=folders["val"], allow_drop=100, dynamic_batch=False, batch_size=3, with_preprocessing=True,
    )  # fmt: skip


def products(path: Path, kind: str) -> list[str]:
    return [node.name for node in onnx.load(path).graph.node if node.op_type == kind]


WEIGHTED = [
    f"blocks.{block}.{layer}/MatMul" for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
]


@pytest.mark.slow
def test_the_products_with_weights_of_blocks_are_quantised_and_nothing_else(static: ExportReport) -> None:
    graph = onnx.load(static.output).graph
    made_by = {output: node for node in graph.node for output in node.output}
    quantised, scales = [], {weight.name: weight for weight in graph.initializer}
    for node in graph.node:
        if (
            node.op_type == "MatMul"
            and made_by.get(node.input[1], SimpleNamespace(op_type="")).op_type == "DequantizeLinear"
        ):
            assert made_by[node.input[0]].op_type == "DequantizeLinear"
            weights = made_by[node.input[1]]
            assert onnx.numpy_helper.to_array(scales[weights.input[0]]).dtype == np.int8
            assert (
                len(scales[weights.input[1]].dims) == 1 and scales[weights.input[1]].dims[0] > 1
            )  # one for each column
            quantised.append(node.name)
    assert quantised == WEIGHTED
    plain = {node.name for node in graph.node} - set(quantised)
    assert any(name.startswith("tokencut.stages.1/") for name in plain)
    assert {node.op_type for node in graph.node if node.name.startswith("tokencut.stages.")}.isdisjoint(
        {"QuantizeLinear", "DequantizeLinear"}
    )
    # Ranges are taken of what goes in alone: two a block before the MLP's halves, and two in it.
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 8


@pytest.mark.slow
def test_what_it_costs_is_told_and_the_file_says_what_it_is(static: ExportReport, folders: dict[str, Path]) -> None:
    found = static.quantized
    assert found is not None
    assert (found.kind, found.calibration, found.calibration_images) == ("int8", str(folders["train"]), 10)
    assert (found.judged_on, found.images) == (str(folders["val"]), 10)
    assert found.top1 is not None and found.fp32_top1 is not None
    assert found.difference == pytest.approx(found.top1 - found.fp32_top1)
    opened = open_exported(static.output)
    assert evaluate(opened, folders["val"], workers=0, device="cpu").top1 == found.top1
    assert (opened.info, opened.info.quantized, opened.info.normalises) == (static.info, "int8", True)
    assert static.bytes == static.output.stat().st_size < found.fp32_bytes
    assert names_in(static.output.parent) == ["m.onnx"]
    told = static.to_dict()
    assert (told["quantize"], told["quantized_top1"], told["quantized_images"]) == ("int8", found.top1, 10)


@pytest.mark.slow
def test_openvino_has_the_same_products_in_eight_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    openvino, path = importlib.import_module("openvino"), tmp_path / "m.xml"
    report = export_model(
        small(depth=2), path, quantize="int8", calibration=folders["train"], data=folders["val"], allow_drop=100
    )
    assert report.quantized is not None
    assert (report.info.quantized, report.quantized.images, report.quantized.calibration_images) == ("int8", 10, 10)
    assert names_in(tmp_path) == ["m.bin", "m.xml"]
    assert report.bytes < report.quantized.fp32_bytes
    assert open_exported(path).info == report.info
    operations = openvino.Core().read_model(path).get_ops()
    weights = [each for each in operations if each.get_type_name() == "Constant"
               and each.get_element_type() == openvino.Type.i8 and len(each.shape) == 2]  # fmt: skip
    sizes = sorted(tuple(sorted(each.shape)) for each in weights)  # some are kept transposed
    assert sizes == [(64, 64)] * 2 + [(64, 192)] * 6
    products = [each for each in operations if each.get_type_name() == "MatMul"]
    quantised = [each for each in products if each.input_value(0).get_node().get_type_name() == "FakeQuantize"]
    assert len(quantised) == 8 < len(products)
    # A stage's own numbers are read by none.
    assert sum(each.get_type_name() == "FakeQuantize" for each in operations) == 8


@pytest.mark.slow
def test_one_that_costs_too_much_is_not_left_behind(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantised file answers other classes: its last weights are turned round before it is judged."""
    path, whole = tmp_path / "m.onnx", onnx_int8.quantize_onnx

    def spoiled(source: Path, target: Path, *rest: Any) -> None:
        whole(source, target, *rest)
        made = onnx.load(target)
        head = next(weight for weight in made.graph.initializer if "head.bias" in weight.name)
        values = onnx.numpy_helper.to_array(head) + np.array([0, 0, 0, 0, 100], np.float32)
        head.CopyFrom(onnx.numpy_helper.from_array(values, head.name))
        onnx.save(made, target)

    monkeypatch.setattr("tokencut.export.runtimes.onnxruntime.quantize_onnx", spoiled)
    path.write_bytes(b"before")
    model = small("topk")
    with torch.no_grad():  # all are taken for the second class, of which a fifth are
        model.model.head.bias += torch.tensor([0.0, 50.0, 0.0, 0.0, 0.0])
    settings: dict[str, Any] = {"quantize": "int8", "data": folders["val"], "force": True}
    report = export_model(model, path, **settings)  # dynamic: 20 points before and after
    assert report.quantized is not None
    assert (report.quantized.difference, report.quantized.agreement) == (0.0, 0.0)
    assert products(path, "MatMulInteger") == [f"{name}_quant" for name in WEIGHTED[:4]]
    before = path.read_bytes()
    only_second = write_folder(folders["val"].parent / "second", CLASSES, images=1)
    for folder in only_second.iterdir():
        if folder.name != "1":
            for image in folder.iterdir():
                image.unlink()
            folder.rmdir()
    with pytest.raises(ArtifactError) as caught:
        export_model(model, path, **{**settings, "data": only_second})
    says = "int8 costs 100.00 ± unknown points of top-1 on 1 images (100.00 to 0.00 %), and 1 are allowed, so "
    assert str(caught.value).startswith(f"{says}{path} was not written")
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize(
    ("file", "settings", "says"),
    [
        ("m.onnx", {"allow_drop": 2.0}, "`allow_drop` is for a quantised file; give `quantize='int8'` as well"),
        ("m.onnx", {"calibration": "digits"}, "`calibration` is for a quantised file"),
        ("m.onnx", {"quantize": "fp8"}, "a .onnx file cannot be had in fp8, but in int8; give `path='FILE.onnx'`"),
        ("m.xml", {"quantize": "int8"}, "a .xml file in int8 has fixed ranges of numbers, taken from images; give"),
        ("m.pt2", {"quantize": "int8"}, "a .pt2 file cannot be had in int8; give `path='FILE.onnx'`"),
        ("m", {"quantize": "int8", "format": "timm"}, "a folder of timm's cannot be had in int8"),
        ("m.onnx", {"quantize": "int8", "allow_drop": -1.0}, "`allow_drop=-1.0` is not a number from 0 to 100"),
        ("m.onnx", {"quantize": "int8", "calibration_limit": 5}, "how many images to take of `calibration`; give both"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(
    file: str, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        check_export(tmp_path / file, **settings)
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


def node(operator: str, *scopes: str) -> Any:
    return SimpleNamespace(op_type=operator, name="", metadata_props={"pkg.torch.onnx.name_scopes": repr(list(scopes))})


@pytest.mark.parametrize("prefix", ["", "model."])
def test_nodes_are_called_after_timms_modules_and_stages(prefix: str) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        return Normalised(model, preprocessing_of(model)) if prefix else model

    model = small()
    nodes = [
        node("MatMul", "", f"{prefix}model", f"{prefix}model.blocks.0", f"{prefix}model.blocks.0.attn.qkv", "linear"),
        node("TopK", "", f"{prefix}stages.1", "topk"),
        node("TopK", "", f"{prefix}stages.1", "topk_1"),
        node("Concat", "", "cat"),
        SimpleNamespace(op_type="Shape", name="", metadata_props={}),
    ]
    name_nodes(nodes, wrap(model))
    assert [made.name for made in nodes] == [
        "blocks.0.attn.qkv/MatMul", "tokencut.stages.1/TopK", "tokencut.stages.1/TopK_1", "Concat", "Shape",
    ]  # fmt: skip
    blocks = block_names(wrap(model))
    assert blocks == ("blocks.0",) == block_names(wrap(model.model))
    assert [is_of_blocks(made.name, blocks) for made in nodes] == [True, False, False, True, True]
    assert not is_of_blocks("blocks.01/MatMul", blocks) and not is_of_blocks("head/Gemm", blocks)
    dense = [node("MatMul", "", *[prefix[:-1]] * bool(prefix), f"{prefix}blocks.0", "linear")]
    name_nodes(dense, wrap(model.model))
    assert dense[0].name == "blocks.0/MatMul"


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "flags : avx2 avx512f avx512_vnni", False),
        ("AMD64", "flags : avx2 avx_vnni", False),
        ("x86_64", "flags : avx2 avx512f", True),
        ("arm64", "", False),
    ],
)
def test_weights_get_seven_bits_where_sums_of_products_overflow(
    machine: str, flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", lambda self, errors: flags)
    assert onnx_int8.overflows() is expected


def test_batches_are_filled_up_to_the_size_that_a_file_takes(folders: dict[str, Path]) -> None:
    for fixed, sizes in ((None, [4, 4, 2]), (3, [3, 3, 3, 3])):
        plain = small()
        plain.info = SimpleNamespace(batch_size=fixed)  # type: ignore[assignment]
        batches = quantizing._Batches(plain, quantizing.open_source(folders["train"]), 128, 4)  # type: ignore[arg-type]
        assert [len(batch) for batch in batches] == sizes
        assert batches.count == 10
