"""Running the command line as its users do, in this process, and the small files it is run on."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path

import pytest
from image_files import write_folder
from outcome import CLASSES, TINY, Outcome, Run

from tokencut.cli import progress
from tokencut.cli.app import main
from tokencut.profiling import latency


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which come where something takes long, as it may on a busy machine; test_progress asks for them."""
    monkeypatch.setattr(progress, "PAUSES", (math.inf,))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `tokencut` with the words given."""

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call


@pytest.fixture
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes samples of one forward, where a test is about times and not about how true they are."""
    defaults = latency.measure.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "min_seconds", 0.0)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four images."""
    return write_folder(tmp_path_factory.mktemp("pictures") / "val", CLASSES, images=4)


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images."""
    return write_folder(tmp_path_factory.mktemp("images") / "train", CLASSES, images=8)


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokencut file, to be read only: `bat` at keep 0.5."""
    path = tmp_path_factory.mktemp("compressed") / "tiny.safetensors"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["compress", *TINY, "--keep", "0.5", "-o", str(path)]) == 0
    return path
