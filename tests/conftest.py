"""What every test shares: processes and threads, the optional data beside the checkout, the GPU rule, hypothesis."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tokencut.data.sources import Source

# Before anything imports torch, and for the processes that tests start: on models this small threads take longer to
# meet than to work, and the cores have other tests to run. The tests hold for any number: OMP_NUM_THREADS=2 pytest.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU kernels run in Triton's interpreter; it reads this when it is imported, which torch.compile does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No deadline: a busy machine is not a bug. Derandomized: the same commit gives the same verdict.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: real checkpoints, images and golden files. Skips where there is none."""
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder shared/ beside the checkout")
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Folders run in two processes; named files and tests in this one, since each takes seconds to import torch."""
    return 0 if all(".py" in name for name in config.args) else 2


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs a script as typed, `run_script(path, *words)`: what it printed, and what it said on stderr."""

    def run(path: Path, *words: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
        runpy.run_path(str(path), run_name="__main__")
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def few() -> Source:
    """Forty training digits."""
    from tokencut.data.sources import Subset, open_source

    return Subset(open_source("digits", split="train"), range(40))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no CUDA, and notes the mark in the JUnit report for CI to read."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    for item in marked:
        item.user_properties.append(("gpu", "yes"))
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
