"""The small models that export tests write, and doing without the capture where a test is about something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tokencut.data.preprocessing import preprocessing_of
from tokencut.export.graph import Graph
from tokencut.export.runtimes import Runtime
from tokencut.export.runtimes.torch_export import TorchExport
from tokencut.model import CompressedModel, compress


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
    """The same as a model takes them."""
    return preprocessing_of(model).normalise(images, torch.device("cpu"))


def skip_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the capture, which takes a second, where a test is about what comes before and behind it."""
    models: list[nn.Module] = []

    def write(self: Runtime, graph: Graph, path: Path) -> None:
        models.append(graph.model)
        path.write_bytes(b"graph")

    monkeypatch.setattr(TorchExport, "write", write)
    monkeypatch.setattr(TorchExport, "open", lambda self, path: models[-1])
