"""ExecuTorch's files: the model's logits for any number of images up to the largest, by its own runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_models import normalised, pixels, small

from tokencut.errors import ArtifactError
from tokencut.export.run import ExportReport, export_model
from tokencut.export.runtimes import open_exported, runtimes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_model(small("topk"), tmp_path_factory.mktemp("executorch") / "m.pte", limit=5, batch_size=2)


def test_it_gives_the_models_logits(report: ExportReport) -> None:
    model = small("topk")
    assert (report.format, report.opset, report.agreement.differing) == ("executorch", None, 0)
    assert 0 <= report.agreement.largest_difference < 1e-5
    opened = open_exported(report.output)
    assert opened.info == report.info
    assert opened.runtime[0] == "executorch"
    assert opened.largest_batch == runtimes()["executorch"].largest_batch == 32
    images = normalised(model, pixels(35))
    with torch.no_grad():
        expected = model(images)
    kept = opened(images[:1])
    torch.testing.assert_close(opened(images), expected, rtol=1e-5, atol=1e-5)  # in two parts
    torch.testing.assert_close(kept, expected[:1], rtol=1e-5, atol=1e-5)  # another call leaves what was given


def test_it_holds_no_path(report: ExportReport) -> None:
    content = report.output.read_bytes()
    assert Path(torch.__file__).parents[1].name.encode() not in content
    assert str(Path(__file__).parents[1]).encode() not in content


def test_other_files_are_refused(report: ExportReport, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, path = report.output.read_bytes(), tmp_path / "m.pte"
    for bad in (b"", b"no program", content[: len(content) // 2]):
        path.write_bytes(bad)
        with pytest.raises(ArtifactError, match=r"^ExecuTorch cannot load .*m\.pte \(.*\); export the model again$"):
            open_exported(path)
    assert capfd.readouterr() == ("", "")  # the runtime's own lines
