"""Core ML's packages: converted and held together here, run elsewhere."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from export_models import small
from model_files import names_in

from tokencut.errors import ArtifactError, ModelError
from tokencut.export.info import KEY, export_info_from_text
from tokencut.export.run import ExportReport, export_model
from tokencut.export.runtimes import open_exported
from tokencut.files import atomic_package


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_model(small("topk"), tmp_path_factory.mktemp("coreml") / "m.mlpackage", limit=3, batch_size=2)


@pytest.mark.slow
def test_a_package_takes_one_image_and_says_what_it_is(report: ExportReport) -> None:
    assert (report.format, report.info.batch_size, report.agreement.images) == ("coreml", 1, 3)
    assert report.agreement.largest_difference < 1e-5
    assert report.notes[-1] == "what Core ML was given was compared; the package itself was not run, which takes a Mac"
    assert names_in(report.output) == ["Data", "Manifest.json"]
    assert report.bytes == sum(file.stat().st_size for file in report.output.rglob("*") if file.is_file())
    proto = importlib.import_module("coremltools.proto.Model_pb2")
    spec = proto.Model.FromString(next(report.output.rglob("*.mlmodel")).read_bytes())
    assert export_info_from_text(spec.description.metadata.userDefined[KEY]) == report.info
    (given,), (made,) = spec.description.input, spec.description.output
    assert (given.name, list(given.type.multiArrayType.shape), made.name) == ("images", [1, 3, 64, 64], "logits")
    package = Path(torch.__file__).parents[1].name.encode()
    assert not [file for file in report.output.rglob("*") if file.is_file() and package in file.read_bytes()]


@pytest.mark.slow
def test_it_is_not_run_here(report: ExportReport) -> None:
    with pytest.raises(ArtifactError) as raised:
        open_exported(report.output)
    assert str(raised.value) == (
        f"{report.output} runs on a Mac, an iPhone or an iPad, in Core ML, and not in tokencut; type "
        "`tokencut.export_model(model, 'FILE.onnx')` for a file to judge and time here"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its folder
def test_what_core_ml_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("topk")
    monkeypatch.setattr(model, "forward", lambda images: torch.linalg.svdvals(images.mean(1)))
    with pytest.raises(ModelError, match=r"^Core ML cannot translate .* type `path='FILE.onnx'`"):
        export_model(model, tmp_path / "m.mlpackage", limit=1)
    assert names_in(tmp_path) == []


def test_a_package_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "m.package"

    def write(content: str, force: bool = True, fail: bool = False) -> None:
        with atomic_package(path, force=force, holding="marker") as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "marker").write_text(content)
            (temporary / "inner" / "file").write_text(content)
            if fail:
                raise KeyboardInterrupt

    write("first")
    with pytest.raises(ArtifactError, match=r"m\.package exists; add `force=True` to replace it"):
        write("second", force=False)
    with pytest.raises(KeyboardInterrupt):
        write("second", fail=True)
    assert (path / "inner" / "file").read_text() == "first"
    write("second")
    assert (path / "inner" / "file").read_text() == (path / "marker").read_text() == "second"
    assert names_in(tmp_path) == ["m.package"]
    (path / "marker").unlink()
    with pytest.raises(ArtifactError, match="what has that name holds no marker; move it, or give another name"):
        write("third")
    assert (path / "inner" / "file").read_text() == "second"
