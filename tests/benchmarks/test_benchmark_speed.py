"""The script on speed: its rows by hand, what it leaves out and says so, and that it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_forward
import pytest
import speed
import timing
import timing_table
import torch
from torch import Tensor, nn

from tokencut.errors import ModelError, TokencutError, UsageError
from tokencut.model import CompressedModel

SMALL = "--model test_vit --model-kwargs img_size=32 depth=1 --keep 0.5 --rounds 3 --max-seconds 0 --device cpu"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Has torch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["run.py speed", *SMALL.split(), *words])
    return speed.parse()


def row(**values: Any) -> Any:
    given = {"model": "bat 0.5", "form": "eager", "batch": 4, "tokens": 16, "gmacs": 2.0, "stage_gmacs": 0.1,
             "flops_ratio": 2.0, "ms": 10.0, "ms_spread": (9.0, 12.0)}  # fmt: skip
    return timing_table.Row(**{**given, **values})


def test_a_row_by_hand() -> None:
    slow = row(speedup=1.5, speedup_spread=(1.4, 1.625), stage_share=0.0421)
    assert slow.kept == 0.75
    assert [cell(slow) for cell in speed.COLUMNS.values()] == [
        "bat 0.5", "eager", "4", "2.000", "400", "10.00", "± 15.0 %", "1.50", "1.40 to 1.62", "2.00", "0.75", "4.2 %",
    ]  # fmt: skip


def test_runs_are_merged_by_their_medians() -> None:
    runs = [
        [row(model="dense", ms=30.0), row(ms=ms, speedup=faster, stage_share=share)]
        for ms, faster, share in ((10.0, 1.5, 0.25), (30.0, 1.75, None), (12.0, 1.25, 0.5))
    ]
    dense, other = timing_table.merged(runs)
    assert (dense.model, dense.ms, dense.ms_spread) == ("dense", 30.0, (30.0, 30.0))
    assert (other.ms, other.ms_spread) == (12.0, (10.0, 30.0))
    assert (other.speedup, other.speedup_spread) == (1.5, (1.25, 1.75))
    assert (other.stage_share, other.memory_mib) == (0.375, None)


def test_several_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is run with the same words, by itself, and reports by a file; what it prints is no result."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, pathlib, sys\n"
        f"row = {dataclasses.asdict(row())!r}\n"
        "first, *_, number, _, path = sys.argv[1:]\n"
        "print('printed', first, number)\n"
        "row['ms'] = {'1.json': 10.0, '2.json': 20.0}[pathlib.Path(path).name]\n"
        "pathlib.Path(path).write_text(json.dumps({'rows': [row], 'notes': ['a note']}))\n"
    )
    notes: list[str] = []
    [found] = timing_table.in_processes(2, [sys.executable, str(worker), "--keep"], notes.append)
    assert (found.ms, found.ms_spread, notes) == (15.0, (10.0, 20.0), ["a note"])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("printed --keep 1\n") == 2


def test_a_process_that_fails(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="^error: process 1 of 2 failed, as said above$"):
        timing_table.in_processes(2, [sys.executable, str(worker)], print)


def test_a_time_limit() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(timing.TooSlowError, match=r"^more than 0.01 s$"), timing.time_limit(0.01):
        time.sleep(10)
    with timing.time_limit(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) is before


def test_the_clock_of_the_process_is_for_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(monkeypatch, "--clock", "process")
    clock = timing.chosen_clock(args)
    before = clock.mark()
    time.sleep(0.5)
    assert 0 <= clock.seconds(before, clock.mark()) < 0.4  # nothing was done
    torch.set_num_threads(2)
    with pytest.raises(UsageError, match="^--clock process is for one thread of a CPU, and this is .*, 2 threads; type "
                                         "--device cpu --threads 1$"):  # fmt: skip
        timing.chosen_clock(args)
    args.clock = "wall"
    assert type(timing.chosen_clock(args)).__name__ == "WallClock"


def test_naive_models_materialise_attention_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    models = speed.candidates(arguments(monkeypatch, "--methods", "topk"))
    assert list(models) == ["dense", "topk 0.5"]
    naive = speed.naive(models["topk 0.5"])
    assert isinstance(naive, CompressedModel)
    assert not any(block.attn.fused_attn for block in naive.model.blocks)
    assert all(block.attn.fused_attn for block in models["topk 0.5"].model.blocks)


class Failing(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("CUDA out of memory\nand so on")


def test_what_cannot_be_timed_is_said_and_the_rest_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    args, notes = arguments(monkeypatch, "--methods", "topk", "random"), list[str]()
    models = speed.candidates(args)
    models = {"dense": models["dense"], "bat 0.5": Failing(), "tome 0.5": models["topk 0.5"], **models}

    def make(name: str) -> nn.Module:
        if name == "tome 0.5":
            raise ModelError("torch.compile failed")
        return models[name]

    rows = list(timing.in_turns("form, batch 2", "form", models, make, torch.zeros(2, 3, 32, 32), args, notes.append))
    assert [found.model for found in rows] == ["dense", "topk 0.5", "random 0.5"]
    assert notes == ["bat 0.5, form, batch 2: not timed (CUDA out of memory)",
                     "tome 0.5, form, batch 2: not timed (torch.compile failed)"]  # fmt: skip
    assert [found.stage_share for found in rows] == [None, None, None]  # of eager models only

    models["dense"] = Failing()
    with contextlib.suppress(StopIteration):
        next(
            timing.in_turns(
                "form, batch 2", "form", models, models.__getitem__, torch.zeros(2, 3, 32, 32), args, notes.append
            )
        )
    assert notes[2:] == [f"{name}, form, batch 2: not timed (CUDA out of memory)" for name in list(models)[1:]]


def test_compiling_has_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()

    def slow(images: Tensor) -> Tensor:
        seen.append(len(images))
        time.sleep(10)
        return images

    monkeypatch.setattr(speed, "compile_model", lambda model, mode: slow)
    with pytest.raises(timing.TooSlowError):
        speed.compiled(nn.Identity(), "default", torch.zeros(2, 3, 4, 4), 0.01)
    assert seen == [2]


def test_graphs_are_a_form_on_a_gpu_and_told_of_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args, notes = (
        arguments(monkeypatch, "--methods", "topk", "--batch-size", "2", "--no-eager", "--capture"),
        list[str](),
    )
    assert list(speed.measured(args, tmp_path, notes.append)) == []
    assert notes == ["dense, captured, batch 2: not timed (images on cpu are not captured: CUDA graphs need an NVIDIA "
                     "GPU)"]  # fmt: skip
    monkeypatch.setattr(speed.CapturedModel, "record", lambda graph, images: True)
    rows = list(speed.measured(args, tmp_path, notes.append))
    assert [(found.model, found.form, found.batch) for found in rows] == [
        ("dense", "captured", 2), ("topk 0.5", "captured", 2),
    ]  # fmt: skip


def test_exported_files_compute_in_fp32(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(monkeypatch, "--onnxruntime", "--precision", "bf16")
    wanted = "error: exported files compute in fp32, and --precision is bf16; leave out --onnxruntime\n"
    assert capsys.readouterr().err.endswith(wanted)


@pytest.mark.slow
def test_the_script_on_a_small_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    args = arguments(monkeypatch, "--methods", "topk", "--batch-size", "2", "--onnxruntime", "--compile")
    args.output, args.onnx_folder = tmp_path / "table.md", tmp_path
    # Capturing and compiling is for tests of the library; here it is a form as others are.
    monkeypatch.setattr(speed, "compile_model", lambda model, mode: model)
    monkeypatch.setattr(speed, "parse", lambda: args)
    speed.main()
    printed = capsys.readouterr().out
    assert args.output.read_text() == printed
    title, _, _, _, *lines = printed.splitlines()
    assert re.fullmatch(
        r"test_vit, .+, 1 thread, fp32, torch .+, timm .+, onnxruntime .+, load .+, \d{4}-\d\d-\d\d", title
    )
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| dense", "eager"], ["| topk 0.5", "eager"], ["| naive dense", "eager"], ["| naive topk 0.5", "eager"],
        ["| dense", "compiled (default)"], ["| topk 0.5", "compiled (default)"],
        ["| dense", "onnxruntime"], ["| topk 0.5", "onnxruntime"],
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "dense.onnx", "topk-0.5.onnx"}

    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    bound = onnx_forward.BoundSession(tmp_path / "dense.onnx", CPU)(images).numpy()  # as on a GPU
    assert torch.equal(torch.from_numpy(bound), onnx_forward.onnx_forward(tmp_path / "dense.onnx", CPU)(images))
    with pytest.raises(TokencutError, match="^this onnxruntime runs on .*CPUExecutionProvider and not on mps; type "
                                            "pip install onnxruntime-gpu, or --device cpu$"):  # fmt: skip
        onnx_forward.onnx_forward(tmp_path / "dense.onnx", torch.device("mps"))
