"""What is exported gives the model's logits, in one file without paths; what does not is not kept."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from image_files import write_folder
from torch import Tensor, nn

from tokencut import export, modelzoo
from tokencut.compression import CompressedModel, compress
from tokencut.errors import ArtifactError, DataError, ModelError, TokencutError, UsageError
from tokencut.export import ExportReport, export_model
from tokencut.export_check import Agreement, check_images
from tokencut.export_formats import onnx_translations
from tokencut.export_info import KEY, describe_export, export_info_from_text
from tokencut.preprocessing import preprocessing_of
from tokencut.reduction import methods


def small(method: str = "bat", keep: float = 0.5, depth: int = 1, **options: Any) -> CompressedModel:
    """Blocks of which the first reduces 16 image tokens to 8; the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", **{"img_size": 64, "num_classes": 5, "depth": depth, **options})
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    return compress(model, keep=keep, layers=(1,), method=method).eval()


def pixels(batch: int) -> Tensor:
    """Bytes, as transforms give them."""
    return torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def normalised(model: nn.Module, images: Tensor) -> Tensor:
    return preprocessing_of(model).normalise(images, torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads take longer to meet than these models take to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the capture, which takes a second, where a test is about what comes before and behind it."""
    models: list[nn.Module] = []
    monkeypatch.setattr(export, "captured", lambda model, info: models.append(model))
    monkeypatch.setattr(export, "write_pt2", lambda program, info, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(export, "read_pt2", lambda path, info: models[-1])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """An .onnx for any number of images."""
    path = tmp_path_factory.mktemp("dynamic") / "model.onnx"
    return export_model(small(), path, limit=5, batch_size=2, name="mine")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """A .pt2 for any number of images."""
    return export_model(small(), tmp_path_factory.mktemp("packed") / "model.pt2", limit=5, batch_size=2)


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
        "output": str(dynamic.output), "model": "mine", "method": "bat", "keep": 0.5, "opset": 18,
        "dynamic_batch": True, "batch_size": None, "with_preprocessing": False, "gmacs": dynamic.info.gmacs,
        "params": dynamic.info.params, "bytes": dynamic.output.stat().st_size, "data": "noise", "images": 5,
        "largest_difference": dynamic.agreement.largest_difference, "tolerance": 0.001, "differing": 0, "allowed": 1,
        "equal_top1": 100.0, "notes": ["checked on 5 images of noise, since no --data was given"],
    }  # fmt: skip


def test_an_onnx_file_is_sound_and_says_what_it_is(dynamic: ExportReport) -> None:
    model = onnx.load(dynamic.output)
    onnx.checker.check_model(model, full_check=True)
    assert {imported.domain: imported.version for imported in model.opset_import}[""] == 18
    (entry,) = model.metadata_props
    assert entry.key == KEY
    assert export_info_from_text(entry.value) == dynamic.info
    assert dynamic.info.recipe == small().recipe


@pytest.mark.parametrize("which", ["dynamic", "packed"])
def test_a_file_holds_no_path_and_stands_alone(which: str, request: pytest.FixtureRequest) -> None:
    report: ExportReport = request.getfixturevalue(which)
    content = report.output.read_bytes()
    package = Path(torch.__file__).parents[1].name.encode()
    assert package not in content
    assert str(Path(export.__file__).parents[1]).encode() not in content
    assert names(report.output.parent) == [report.output.name]


def test_a_pt2_file(packed: ExportReport) -> None:
    told = {KEY: ""}
    program = torch.export.load(io.BytesIO(packed.output.read_bytes()), extra_files=told)
    assert export_info_from_text(told[KEY]) == packed.info
    forward, model = program.module(), small()
    for batch in (1, 2, 5):
        images = normalised(model, pixels(batch))
        with torch.no_grad():
            assert torch.equal(forward(images), model(images))
    assert packed.to_dict()["opset"] is None


def test_preprocessing_and_batch_size_can_be_baked_in(tmp_path: Path) -> None:
    model = small("topk")
    options: dict[str, Any] = {"with_preprocessing": True, "dynamic_batch": False, "batch_size": 3, "limit": 4}
    report = export_model(model, tmp_path / "model.onnx", opset=22, **options)
    session = onnxruntime.InferenceSession(report.output)
    assert session.get_inputs()[0].shape == [3, 3, 64, 64]
    (logits,) = session.run(None, {"images": pixels(3).numpy().astype(np.float32) / 255})
    with torch.no_grad():
        expected = model(normalised(model, pixels(3)))
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)
    assert (report.agreement.images, report.info.batch_size, report.info.normalises) == (4, 3, True)
    packed = export_model(model, tmp_path / "model.pt2", **options)
    with torch.no_grad():
        forward = torch.export.load(io.BytesIO(packed.output.read_bytes())).module()
        torch.testing.assert_close(forward(pixels(3) / 255), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", sorted(set(methods()) - {"bat", "evit", "topk"}))
def test_every_method_gives_the_same_under_onnxruntime(method: str, tmp_path: Path) -> None:
    """Those that no other test here and in test_onnx_model.py exports."""
    report = export_model(small(method), tmp_path / "model.onnx", dynamic_batch=False, batch_size=4, limit=8)
    assert report.agreement.differing == 0
    assert report.agreement.largest_difference < 1e-5


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_equal_scores_keep_their_order(descending: bool, dtype: torch.dtype) -> None:
    """onnxruntime's TopK and torch's stable sort, on 6 values 50 times over."""

    class Sorts(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return torch.sort(scores, dim=1, descending=descending, stable=True).indices

    scores = torch.randint(-3, 3, (4, 300), generator=torch.Generator().manual_seed(1)).to(dtype)
    program = torch.onnx.export(
        torch.export.export(Sorts(), (scores,)), custom_translation_table=onnx_translations(), verbose=False
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (order,) = session.run(None, {session.get_inputs()[0].name: scores.numpy()})
    assert np.array_equal(order, Sorts()(scores).numpy())


@pytest.mark.usefixtures("instant")
def test_a_model_without_a_head_has_no_top1(tmp_path: Path) -> None:
    report = export_model(small("topk", num_classes=0).model, tmp_path / "model.pt2", limit=2)
    assert report.agreement.equal_top1 is None
    assert (report.info.recipe, report.to_dict()["method"], report.to_dict()["keep"]) == (None, None, 1.0)


def test_the_model_stays_as_it_was_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = small("topk").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, tmp_path / "model.onnx", dynamic_batch=False, limit=2)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("instant")
def test_a_check_on_real_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", ["a", "b"], 3)
    (folder / "a" / "1.jpg").write_bytes(b"no image")
    report = export_model(small("topk"), tmp_path / "model.pt2", data=folder, limit=4, batch_size=2)
    # 1, 2, 3 of a and 1 of b would be 4 of 6; evenly spread they are 1 and 2 of each.
    assert (report.agreement.images, report.agreement.data, report.notes) == (3, str(folder), ())


@pytest.mark.usefixtures("instant")
def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", ["a"], 2)
    for image in (folder / "a").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(
        DataError,
        match=r"none of 2 images in '.*' can be decoded, so nothing can be checked on them; leave out --data to check "
        "on noise$",
    ):
        export_model(small("topk"), tmp_path / "model.pt2", data=folder)
    assert names(tmp_path) == ["set"]


def test_the_bundled_model_is_checked_on_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compress(modelzoo.load_model("digits").model)
    images = check_images(model, None)
    assert (images.name, len(images.indices), images.notes) == ("digits", 64, ())
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    without = check_images(model, None)
    assert without.name == "noise"
    assert without.notes == (
        "checked on 64 images of noise, since the digits images come with scikit-learn, which is not installed; type "
        "pip install 'tokencut[digits]'",
    )


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("m.bin", {}, UsageError,
         "m.bin ends neither in .onnx nor in .pt2, which says what to write; type -o m.onnx"),
        ("m.onnx", {"opset": 17}, UsageError,
         "opset 17 is not one of 18 to 22, which tokencut can write; type --opset 18"),
        ("m.onnx", {"opset": 23}, UsageError,
         "opset 23 is not one of 18 to 22, which tokencut can write; type --opset 18"),
        ("m.pt2", {"opset": 18}, UsageError, "--opset is for .onnx files, and m.pt2 is none; leave it out"),
        ("m.pt2", {"batch_size": 0}, UsageError,
         "a batch size of 0 is too small, expected at least 1; type --batch-size 16"),
        ("m.pt2", {"limit": 0}, UsageError, "a limit of 0 leaves no images, expected at least 1; type --limit 1000"),
        ("nowhere/m.pt2", {}, ArtifactError,
         "cannot write nowhere/m.pt2: the folder nowhere does not exist; create it first"),
        ("there.pt2", {}, ArtifactError, "there.pt2 exists; add --force to replace it, or give another -o"),
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
    assert names(tmp_path) == ["there.pt2"]
    assert Path("there.pt2").read_text() == "before"


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(TokencutError) as raised:
        export_model(small(), tmp_path / "m.onnx")
    assert str(raised.value) == (
        f"writing {tmp_path / 'm.onnx'} needs onnx and onnxruntime and onnxscript, not installed here; type pip "
        "install 'tokencut[onnx]'"
    )


def test_weights_of_another_type_or_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError,
        match="^export takes a model in fp32, and this one has weights in bfloat16; call model.float\\(\\) first$",
    ):
        export_model(small().bfloat16(), tmp_path / "m.pt2")
    monkeypatch.setattr(export, "ONNX_LIMIT", 1000)
    with pytest.raises(
        ArtifactError,
        match=r"^the model has 0\.0 GiB of weights, and an \.onnx file holds less than 2; type -o .*m\.pt2$",
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
    assert names(tmp_path) == []


def test_an_operator_that_onnx_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", raises(RuntimeError("no function for it")))
    with pytest.raises(
        ModelError,
        match=r"^torch.onnx cannot translate mine \(no function for it\); type -o FILE\.pt2, and please report the "
        "model's name and options$",
    ):
        export_model(small("topk"), tmp_path / "m.onnx", name="mine")
    assert names(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "captured", lambda model, info: None)
    for form in ("write_onnx", "write_pt2"):
        monkeypatch.setattr(export, form, raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        path = tmp_path / f"m.{form.removeprefix('write_')}"
        with pytest.raises(ArtifactError, match=f"{path}: No space left on device; nothing was written$"):
            export_model(small("topk"), path, limit=2)
    assert names(tmp_path) == []


@pytest.mark.usefixtures("instant")
def test_another_models_logits_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = (tmp_path / "m.pt2").write_text("before")
    read = export.read_pt2
    monkeypatch.setattr(export, "read_pt2", lambda *given: lambda images: read(*given)(images) + 0.5)
    with pytest.raises(
        ArtifactError,
        match=r"m\.pt2 would not give the model's logits: 4 of 4 images differ by more than 1\.0e-03, at most by "
        r"5\.0e-01; nothing was written, please report the model's name and options$",
    ):
        export_model(small("topk"), tmp_path / "m.pt2", limit=4, force=True)
    assert (tmp_path / "m.pt2").read_text() == "before"
    assert kept == len("before")
    assert names(tmp_path) == ["m.pt2"]


@pytest.mark.usefixtures("instant")
def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    model = small("topk")
    model.model.head.bias.data[0] = float("nan")
    with pytest.raises(
        ModelError, match="^the model gives logits that are not finite numbers, so no file of it can be checked; "
    ):
        export_model(model, tmp_path / "m.pt2", limit=2)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("differing", "allowed", "fine"), [(0, 0, True), (1, 0, False), (1, 1, True), (2, 1, False)])
def test_near_ties_between_tokens_may_go_either_way(differing: int, allowed: int, fine: bool) -> None:
    found = Agreement("noise", 64, 0.25, 0.001, differing, allowed, 100.0)
    if not fine:
        with pytest.raises(ArtifactError, match=f"{differing} of 64 images differ"):
            found.require(Path("m.onnx"))
        return
    found.require(Path("m.onnx"))
    assert found.notes() == (
        ("1 of 64 images differs by more than 1.0e-03, at most by 2.5e-01: two tokens were alike, and rounding decided "
         "between them",) if differing else ()
    )  # fmt: skip


BEFORE = describe_export(small(), name="mine").to_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"format":1',
            '"format":2',
            "^the file has format 2, and this tokencut reads up to 1; type pip install --upgrade",
        ),
        ('"format":1', '"format":true', "its metadata's format is .*, not 1; export the model again$"),
        ('"depth":1', '"depth":0', "its metadata's depth is 0, not a whole number from 1 to 1000"),
        ('"gmacs":', '"gmac":', "its metadata has .* field"),
        ('"std":[0.2,', '"std":[0,', "preprocessing.std"),
        ('"kind":"', '"kind":"made up ', "origin.kind"),
        ('"tokens":16', '"tokens":"16"', "the recipe's tokens"),
        (BEFORE, "[]", "its metadata is not an object"),
        (BEFORE, BEFORE[:-1], "its metadata is not JSON; export the model again$"),
        (BEFORE, "[" * 100_000, "its metadata is not JSON"),
        (BEFORE, " " * 8_000_001, "its metadata has 8000001 characters, more than 8000000"),
    ],
    ids=str,
)
def test_damaged_metadata(old: str, new: str, message: str) -> None:
    assert old in BEFORE
    with pytest.raises(ArtifactError, match=message):
        export_info_from_text(BEFORE.replace(old, new))
