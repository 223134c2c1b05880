"""TensorBoard's curves: what its own reader finds in the files, and what is said where they cannot be written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tokencut.errors import ArtifactError, TokencutError
from tokencut.training.tensorboard_log import TensorboardLog


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: for each curve its updates and values."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_values_are_written_by_update(tmp_path: Path) -> None:
    log = TensorboardLog(tmp_path / "runs" / "out")
    log.add("train", {"loss": 0.5, "lr": 0.25}, 1)
    log.add("train", {"loss": 0.25}, 2)
    log.add("epoch", {"top1": 75.0}, 2)
    log.flush()
    assert curves(tmp_path / "runs" / "out") == {
        "train/loss": [(1, 0.5), (2, 0.25)], "train/lr": [(1, 0.25)], "epoch/top1": [(2, 75.0)],
    }  # fmt: skip
    log.close()


def test_a_run_that_goes_on_replaces_what_was_lost(tmp_path: Path) -> None:
    first = TensorboardLog(tmp_path)
    for update in (1, 2, 3, 4):
        first.add("train", {"loss": float(update)}, update)
    first.flush()  # killed here, after a checkpoint at update 2
    second = TensorboardLog(tmp_path)
    for update in (3, 4, 5):
        second.add("train", {"loss": 10.0 * update}, update)
    second.close()
    assert curves(tmp_path) == {"train/loss": [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]}
    first.close()


def test_nothing_is_written_before_the_first_value(tmp_path: Path) -> None:
    log = TensorboardLog(tmp_path)
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_without_tensorboard_one_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(TokencutError) as caught:
        TensorboardLog(tmp_path)
    assert str(caught.value) == (
        "`tensorboard` needs tensorboard, which is not installed; type pip install 'tokencut[tensorboard]'"
    )


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(ArtifactError) as caught:
        TensorboardLog(tmp_path / "runs")
    assert str(caught.value) == f"cannot make the folder {tmp_path / 'runs'}: File exists; give `tensorboard` another"


@pytest.mark.parametrize("what", ["add", "flush", "close"])
def test_a_full_disk(tmp_path: Path, what: str) -> None:
    class Full:
        def __getattr__(self, name: str) -> Any:
            raise OSError(28, "No space left on device")

    log = TensorboardLog(tmp_path)
    log._writer = Full()
    call = {"add": lambda: log.add("train", {"loss": 1.0}, 1), "flush": log.flush, "close": log.close}[what]
    with pytest.raises(ArtifactError) as caught:
        call()
    assert str(caught.value) == f"cannot write to {tmp_path}: No space left on device; free space on its disk"
