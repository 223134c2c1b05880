"""An evaluation that cannot be had, or is interrupted, ends at once and says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import write_folder
from judged_models import Answers, small_model

from tokencut.errors import DataError, ModelError, UsageError
from tokencut.evaluation.accuracy import evaluate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of eight images."""
    return write_folder(tmp_path / "set", ["ant", "bee", "cow"], 8)


@pytest.mark.parametrize(
    ("precision", "advice"), [("fp32", "give it other weights"), ("fp16", "type `precision='fp32'`")]
)
def test_logits_that_are_not_finite_are_an_error(folder: Path, precision: str, advice: str) -> None:
    model = Answers(lambda level: level[:, None] * torch.tensor([1.0, float("inf"), 0.0]), 3)
    with pytest.raises(ModelError) as caught:
        evaluate(model, folder, workers=0, precision=precision)
    assert str(caught.value) == f"the model gives logits that are not finite numbers in {precision}; {advice}"


def test_a_model_without_a_head_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="test_vit has no classification head"):
        evaluate(small_model(0), folder)


@pytest.mark.parametrize(
    "options", [{"device": "gpu"}, {"precision": "fp8"}, {"limit": 0}, {"batch_size": 0}, {"workers": -1}]
)
def test_options_out_of_range(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        evaluate(small_model(), folder, **options)


def test_folders_that_match_no_class_are_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match="'ant', 'bee', 'cow' match none of its label names"):
        evaluate(small_model(4, ["a", "b", "c", "d"]), folder)


INTERRUPTED = """
import sys, time, torch, timm
from tokencut.evaluation.accuracy import evaluate
from tokencut.observers import Observer
class Slow(Observer):
    def progress(self, *now):
        print("started", flush=True)
        time.sleep(1)
model = timm.create_model("test_vit", img_size=32, num_classes=3)
try:
    evaluate(model, sys.argv[1], batch_size=1, workers=2, observer=Slow())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals a process group")
def test_an_interrupt_ends_the_workers_too(folder: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "started\n"
        os.killpg(process.pid, signal.SIGINT)
        try:
            errors = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert (process.returncode, errors) == (130, "")  # the workers have nothing to say
    deadline = time.monotonic() + 10
    while _group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_lives(process.pid)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
