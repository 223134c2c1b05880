"""Kernels run on the GPU where there is one, elsewhere in Triton's interpreter (tests/conftest.py), on the CPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> str:
    """Where the kernels of this run take their tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random tensors in every run."""
    torch.manual_seed(0)
