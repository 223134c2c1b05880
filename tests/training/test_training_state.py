"""The state of a fine-tune: what is written is read back, whole or not at all, and nothing in it is run."""

from __future__ import annotations

import errno
import os
import pickle
import resource
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from model_files import Payload
from torch import nn

from tokencut.errors import ArtifactError
from tokencut.training import state as training_state
from tokencut.training.state import (
    FILE,
    Best,
    TrainingState,
    check_state_folder,
    copy_of,
    folder_for,
    has_state,
    load_state,
    remove_state,
    save_state,
)

CONDITIONS = {"seed": "0", "batch size": "64"}


def state(step: int = 3) -> TrainingState:
    return TrainingState(
        dict(CONDITIONS), 1, step, {"weight": torch.arange(4.0)}, {"state": {0: {"step": torch.tensor(2.0)}}},
        before={0: True, 7: False},
        best=Best(1, {3: True}, {"weight": torch.ones(4)}), history=[{"epoch": 1, "loss": 0.5}], sums={"images": 64.0},
    )  # fmt: skip


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = folder_for(tmp_path / "out.safetensors")
    assert folder.name == "out.safetensors.resume"
    assert not has_state(folder)
    save_state(folder, state())
    assert has_state(folder)
    found, saved = load_state(folder, CONDITIONS), state()
    assert torch.equal(found.model["weight"], saved.model["weight"])
    assert found.best is not None
    assert (found.best.epoch, found.best.right) == (1, {3: True})
    for name in ("epoch", "step", "history", "sums", "conditions", "ema", "before", "optimizer"):
        assert getattr(found, name) == getattr(saved, name)
    remove_state(folder)
    assert not folder.exists()


def test_a_write_that_fails_leaves_the_state_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    save_state(folder, state(step=3))

    def half(value: Any, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training_state.torch, "save", half)
    with pytest.raises(ArtifactError, match="No space left on device; nothing was written"):
        save_state(folder, state(step=4))
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert load_state(folder, CONDITIONS).step == 3


def test_a_writer_of_torch_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(value: Any, file: BinaryIO) -> None:
        raise RuntimeError("[enforce fail]\n unexpected pos 64")

    monkeypatch.setattr(training_state.torch, "save", fail)
    with pytest.raises(ArtifactError, match=r"unexpected pos 64; free space on its disk$"):
        save_state(tmp_path / "run", state())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("begun", [False, True])
def test_a_disk_without_room_is_one_line_and_leaves_no_empty_folder(tmp_path: Path, begun: bool) -> None:
    """No file may be larger than 4 KiB: torch's own writer would say "[enforce fail at inline_container.cc:672]"."""
    folder, large = tmp_path / "run", replace(state(step=4), model={"weight": torch.zeros(100_000)})
    if begun:
        save_state(folder, state(step=3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ArtifactError) as caught:
            save_state(folder, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"cannot write {folder / FILE}: File too large; nothing was written"
    assert [path.name for path in tmp_path.rglob("*")] == (["run", FILE] if begun else [])
    assert not begun or load_state(folder, CONDITIONS).step == 3


def test_only_what_a_run_wrote_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    save_state(folder, state())
    (folder / f".{FILE}.abc.part").write_text("of a killed process")
    check_state_folder(folder)
    for precious in (folder / "precious.txt", folder / "more" / FILE):
        precious.parent.mkdir(exist_ok=True)
        precious.write_text("mine")
    with pytest.raises(ArtifactError) as caught:
        check_state_folder(folder)
    assert str(caught.value) == (
        f"{folder}, where the state of the run is to be kept, holds what tokencut did not write: 'more', "
        "'precious.txt'; move that, or give the output another name"
    )
    remove_state(folder)
    assert sorted(path.name for path in folder.rglob("*")) == ["more", "precious.txt", FILE]
    remove_state(tmp_path / "none")


def test_a_folder_that_has_the_name_of_the_state_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "run" / FILE).mkdir(parents=True)
    with pytest.raises(ArtifactError, match=f"did not write: '{FILE}'; move that"):
        check_state_folder(tmp_path / "run")


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ArtifactError, match="cannot make the folder .*run: File exists; free its name"):
        save_state(tmp_path / "run", state())


def damage(folder: Path) -> str:
    """What is told of a state that cannot be read."""
    with pytest.raises(ArtifactError) as caught:
        load_state(folder, CONDITIONS)
    line = str(caught.value)
    assert line.startswith(f"{folder / FILE} is damaged (")
    assert line.endswith("); type `force=True` to start again")
    assert "weights_only" not in line
    return line.removeprefix(f"{folder / FILE} is damaged (").removesuffix("); type `force=True` to start again")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_state(tmp_path, state())
    whole = (tmp_path / FILE).read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(torch.arange(4.0).numpy().tobytes()) + 5] ^= 1  # in a weight: torch would read it
    for content in (whole[: len(whole) // 2], b"", b"no zip at all", bytes(flipped)):
        (tmp_path / FILE).write_bytes(content)
        assert damage(tmp_path) == "it is not a whole file of torch's"


@pytest.mark.parametrize("position", [{"epoch": -1}, {"step": -3}, {"epoch": 0.5}, {"step": None}, {"epochs": True}])
def test_a_position_that_is_none_is_damage(tmp_path: Path, position: dict[str, Any]) -> None:
    save_state(tmp_path, replace(state(), **position))
    [(name, value)] = position.items()
    assert damage(tmp_path) == f"its {name} is {value}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conditions", {"seed": 0}), ("conditions", None), ("model", {"weight": 1}), ("model", []), ("optimizer", 3),
        ("ema", {"weight": None}), ("before", {0: "yes"}), ("history", [1]), ("history", {}), ("sums", {"loss": "x"}),
        ("best", Best(0, {}, {})), ("best", Best(1, {0: 1.5}, {})), ("best", Best(1, {}, {"weight": 2})),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_damage(tmp_path: Path, name: str, value: Any) -> None:
    save_state(tmp_path, replace(state(), **{name: value}))
    assert damage(tmp_path) == f"its {name} is not what a run writes"


def test_nothing_in_the_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"format": 1, "payload": Payload(mark)}, tmp_path / FILE, pickle_module=pickle)
    assert damage(tmp_path) == "it is not a whole file of torch's"
    assert not mark.exists()


def test_another_format(tmp_path: Path) -> None:
    torch.save({"format": 2}, tmp_path / FILE)
    with pytest.raises(ArtifactError, match="has format 2, and this tokencut reads up to 1; type `force=True`"):
        load_state(tmp_path, CONDITIONS)
    torch.save({"format": 1, **{entry.name: None for entry in fields(TrainingState)}, "more": 1}, tmp_path / FILE)
    assert damage(tmp_path) == "its fields are not those of a state"
    torch.save([1], tmp_path / FILE)
    assert damage(tmp_path) == "its fields are not those of a state"


def test_a_run_with_other_options_cannot_go_on(tmp_path: Path) -> None:
    save_state(tmp_path, state())
    with pytest.raises(ArtifactError) as caught:
        load_state(tmp_path, {"seed": "1", "batch size": "32"})
    assert str(caught.value) == (
        f"{tmp_path} holds a run made with other seed (0, not 1) and other batch size (64, not 32); type the "
        "options it was started with, or `force=True` to start again"
    )


def test_a_copy_does_not_follow_its_model() -> None:
    layer = nn.Linear(2, 2)
    kept = copy_of(layer.state_dict())
    with torch.no_grad():
        layer.weight.zero_()
    assert kept["weight"].any()
