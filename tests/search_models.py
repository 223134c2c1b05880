"""A small model and the images that its schedules are searched with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_files import write_folder
from torch import nn

from tokencut import compress
from tokencut.model import CompressedModel

CLASSES = ("ant", "bee", "cow")


def small_model(**kwargs: Any) -> nn.Module:
    """timm's test_vit: 6 blocks, 16 image tokens at 64 px."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64, **{"num_classes": 3, **kwargs}).eval()


def reduced(model: nn.Module | None = None, **settings: Any) -> CompressedModel:
    """The model with stages in all blocks."""
    return compress(small_model() if model is None else model, **{"keep": 0.8, "layers": "all", **settings}).eval()


def images(count: int = 12) -> tuple[torch.Tensor, ...]:
    """Three batches of noise."""
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1)).split(count // 3)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four images."""
    return write_folder(tmp_path_factory.mktemp("calibration") / "train", CLASSES, images=4)
