"""Weights that are no numbers: found in a file by its bytes, and refused in one wording by all that run a model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_files import write_folder
from safetensors.torch import save_file

import tokencut
from tokencut.errors import ModelError
from tokencut.models import finite
from tokencut.models.finite import not_finite_in


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_each_type_has_numbers_that_are_none(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "PART", 4)
    info = torch.finfo(dtype)
    tensors = {
        "extremes": torch.tensor([info.max, info.min, info.tiny, 0.0, -0.0, info.smallest_normal / 2], dtype=dtype),
        "nan": torch.tensor([0.0] * 9 + [float("nan")], dtype=dtype),
        "inf": torch.tensor([[1.0, float("inf")], [0.0, 0.0]], dtype=dtype),
        "minus": torch.tensor([-float("inf")], dtype=dtype),
        "scalar": torch.tensor(1.0, dtype=dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
        "whole": torch.tensor([2**31 - 1], dtype=torch.int32),  # as bits the same as a NaN's
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"nan": "x"})
    assert not_finite_in(tmp_path / "w.safetensors") == ["inf", "minus", "nan"]


@pytest.mark.slow
def test_it_needs_neither_torch_nor_timm() -> None:
    code = "import sys, tokencut.models.finite; print([name for name in ('torch', 'timm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "set", ["ant", "bee", "cat"], images=2)


RUNS: dict[str, Callable[[Any, Path, Path], object]] = {
    "draw": lambda model, images, _: tokencut.draw(model, images / "ant/1.jpg"),
    "export": lambda model, _, out: tokencut.export_model(model, out / "m.pt2"),
    "search": lambda model, images, _: tokencut.find_schedule(model.model, images, tokencut.Target(gmacs=0.001)),
    "evaluate": lambda model, images, _: tokencut.evaluate(model, images),
    "predict": lambda model, images, _: tokencut.predict(model, images),
    "compare": lambda model, images, _: tokencut.compare(timm.create_model("test_vit", num_classes=3), model, images),
    "sweep": lambda model, images, out: tokencut.sweep(model.model, images, out / "report"),
}


@pytest.mark.parametrize("run", RUNS)
def test_every_run_refuses_them_before_it_begins(
    run: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if run in ("draw", "sweep"):
        pytest.importorskip("matplotlib")
    model = tokencut.compress(timm.create_model("test_vit", img_size=32, num_classes=3), keep=0.5)
    with torch.no_grad():
        model.model.head.weight[0, 0] = torch.nan
    monkeypatch.setattr(type(model.model), "forward_features", lambda *_: pytest.fail("ran the model"))
    with pytest.raises(ModelError) as caught:
        RUNS[run](model, images, tmp_path)
    said = r"the model's weights cannot be used: 1 with numbers that are not finite: {}head.weight; give it others"
    assert str(caught.value) in {said.format(""), said.format("model.")}
    assert list(tmp_path.iterdir()) == []
