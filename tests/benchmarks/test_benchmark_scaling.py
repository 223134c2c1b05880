"""The script on the number of tokens: its figures are the closed form's, and its plot is drawn."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timing
import timm
import torch

from tokencut import cost
from tokencut.model import compress, predicted_macs


@pytest.fixture
def scaling() -> Iterator[Any]:
    """The script, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("scaling")
    torch.set_num_threads(threads)


def run(scaling: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    given = "--model test_vit --size 32 64 --rounds 3 --max-seconds 0 --batch-size 2 --device cpu"
    monkeypatch.setattr(sys, "argv", ["run.py scaling", *given.split(), *words])
    scaling.main()


def cells(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_a_row_for_each_size_and_model(
    scaling: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "plot.png"
    run(scaling, monkeypatch, "--methods", "bat", "topk", "--keep", "0.5", "--plot", str(drawn))
    printed = capsys.readouterr().out
    assert printed.partition("\n")[0].endswith(", batch 2")
    names, *rows = cells(printed)
    assert names == list(scaling.COLUMNS)
    # 2 x 2 and 4 x 4 patches.
    assert [line[:2] for line in rows] == [[str(n), name] for n in (4, 16) for name in ("dense", "bat 0.5", "topk 0.5")]
    found = dict(zip(names, rows[4], strict=True))
    dense = timm.create_model("test_vit", img_size=64)
    blocks = predicted_macs(compress(dense, keep=0.5))
    assert found["GMACs"] == f"{cost.total(blocks) / 1e9:.3f}"
    assert found["stage GMACs"] == f"{sum(block.stage_macs for block in blocks) / 1e9:.3f}"
    assert float(found["ms an image"]) > 0
    assert 0 < float(found["stages"].removesuffix(" %")) < 100
    assert dict(zip(names, rows[3], strict=True))["stages"] == ""
    weights = sum(weight.nbytes for weight in dense.parameters()) / 2**20
    assert float(found["peak, MiB"]) >= int(weights)
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_a_size_that_does_not_fit_is_said_and_the_rest_is_timed(
    scaling: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = timing.beside_dense

    def small_machine(name: str, form: str, *others: Any, **options: Any) -> Any:
        if others[2].shape[-1] > 32:
            raise RuntimeError("can't allocate memory:\nyou tried to")
        return beside(name, form, *others, **options)

    monkeypatch.setattr(timing, "beside_dense", small_machine)
    run(scaling, monkeypatch, "--methods", "topk")
    printed = capsys.readouterr().out
    assert [line[:2] for line in cells(printed)[1:]] == [["4", "dense"], ["4", "topk 0.5"]]
    assert printed.endswith("\n\n- topk 0.5, 64 px: not timed (can't allocate memory:)\n")
