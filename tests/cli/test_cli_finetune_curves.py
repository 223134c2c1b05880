"""`--tensorboard` beside a fine-tune, and the run of two processes, of which one writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import names_in
from outcome import FINETUNE, Run, log_of
from safetensors.torch import load_file

from tokencut.errors import ArtifactError
from tokencut.training.step import Trainer
from tokencut.training.tensorboard_log import TensorboardLog


def curves(folder: Path) -> dict[str, list[int]]:
    """The updates that each of TensorBoard's curves has a value of."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.slow
def test_curves_for_tensorboard_go_on_where_the_run_does(
    run: Run, tmp_path: Path, train: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "compress",
        compressed,
        *FINETUNE,
        "--train-data",
        train,
        "--data",
        train,
        "--tensorboard",
        tmp_path / "runs",
    )
    step = Trainer.step

    def failing(trainer: Trainer, epoch: int, number: int, batches: Any) -> dict[str, float]:
        if (epoch, number) == (1, 3):
            raise OSError("the power went off")
        return step(trainer, epoch, number, batches)

    with monkeypatch.context() as broken:
        broken.setattr(Trainer, "step", failing)
        assert run(*words, "-o", tmp_path / "out.safetensors").code == 1
    assert curves(tmp_path / "runs" / "out")["train/loss"] == list(range(1, 10))  # 6 updates saved, 3 more lost
    done = run(*words, "-o", tmp_path / "out.safetensors", "--resume", "--json")
    assert done.code == 0, done.err
    found = curves(tmp_path / "runs" / "out")
    assert {tag for tag, updates in found.items() if updates == list(range(1, 13))} == {
        "train/loss", "train/task", "train/distillation", "train/lr",
    }  # fmt: skip
    assert {tag for tag, updates in found.items() if updates == [6, 12]} == {
        "epoch/loss", "epoch/task", "epoch/distillation", "epoch/top1", "epoch/images_per_second", "epoch/seconds",
    }  # fmt: skip


def test_curves_that_cannot_be_written_do_not_stop_the_run(
    run: Run, tmp_path: Path, train: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise ArtifactError("cannot write to runs: No space left on device; free space on its disk")

    monkeypatch.setattr(TensorboardLog, "add", full)
    output = tmp_path / "out.safetensors"
    done = run("compress", compressed, *FINETUNE, "--train-data", train, "--tensorboard", tmp_path, "-o", output)
    assert done.code == 0
    said = "no more curves are written: cannot write to runs: No space left on device; free space on its disk"
    assert done.notes.count(said) == 1


def test_tensorboard_is_asked_for_before_any_work(
    run: Run, tmp_path: Path, train: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = ("--train-data", train, "--tensorboard", tmp_path / "runs", "-o", tmp_path / "out.safetensors")
    done = run("compress", compressed, *words)
    assert (done.code, done.err) == (
        1,
        "error: --tensorboard needs tensorboard, which is not installed; type pip install 'tokencut[tensorboard]'\n",
    )
    assert names_in(tmp_path) == []


@pytest.mark.slow
def test_two_processes_give_what_one_gives_with_the_doubled_batch(
    run: Run, tmp_path: Path, train: Path, pictures: Path, compressed: Path
) -> None:
    one, two, runs = tmp_path / "one.safetensors", tmp_path / "two.safetensors", tmp_path / "runs"
    words = ("compress", compressed, "-j", "0", "--finetune-epochs", "1", "--train-data", train, "--data", pictures,
             "--beta", "0.1", "--tensorboard", runs, "--json", "-o")  # fmt: skip
    alone = run(*words, one, "-b", "8")
    assert alone.code == 0, alone.err
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "tokencut", *map(str, words), str(two), "-b", "4"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = load_file(one), load_file(two)
    before = load_file(compressed)
    assert not torch.equal(before["head.weight"], second["head.weight"])
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-5)
    assert done.stdout.count('"output"') == 1  # one process prints
    assert done.stderr.count("epoch 1:") == 1
    assert len(names_in(runs / "two")) == 1  # one process writes curves
    assert curves(runs / "two")["train/loss"] == [1, 2, 3]
    told, heard = alone.json, type(alone)(0, done.stdout, "").json
    assert heard["images"] == told["images"] == 12  # no image twice
    assert heard["dense_top1"] == told["dense_top1"]
    assert float(log_of(two)[0]["loss"]) == pytest.approx(float(log_of(one)[0]["loss"]), rel=1e-3)
