"""What every test shares: the optional data beside the checkout, the GPU rule, and repeatable hypothesis runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no CUDA, and notes the mark in the JUnit report for CI to read."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    for item in marked:
        item.user_properties.append(("gpu", "yes"))
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
