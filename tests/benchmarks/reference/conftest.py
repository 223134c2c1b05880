"""Small images, and a model trained on them, for the tests of the reference models and of the claims."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_files import write_folder
from reference import train
from reference_runs import CLASSES, arguments


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images to train on, and of four to judge by."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", CLASSES, images=8)
    write_folder(root / "val", CLASSES, images=4)
    return root


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs, in one go."""
    folder = tmp_path_factory.mktemp("runs") / "deit_tiny"
    run = train.Run(arguments(data, folder, "--small", "8", "--patch-drop-share", "0.6"))
    assert run.go()
    return folder
