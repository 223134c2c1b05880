"""What a fine-tune needs to go on where it was cut off: one file beside the output, whole at any moment."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencut.errors import ArtifactError
from tokencut.files import PART, atomic_write, check_writable_folder, part_prefix
from tokencut.messages import one_line, quoted, shorten
from tokencut.runtime.resume import require_same
from tokencut.schema import is_whole, require_format
from tokencut.training.held_out import Right

FILE = "state.pt"
FORMAT = 1

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Best:
    """The best epoch so far by the held-out images: its number from 1 on, which of them are right, its weights."""

    epoch: int
    right: Right
    weights: Weights


@dataclass
class TrainingState:
    """A fine-tune between two steps. Everything random follows from the position.

    Attributes:
        conditions: What the run was started with, by the option's name; another run cannot go on with this state.
        epoch: The epoch of the next step, from 0 on.
        step: The next step in it, from 0 on.
        epochs: How many epochs the run was to have.
        model: The model's weights.
        optimizer: The optimizer's state.
        ema: The weights' running average, where there is one.
        before: Which of the held-out images were right before the first step, where harm is to be known. (The weights
            from before are those of the model that the run is started with, again where it goes on.)
        best: The best epoch, where one is to be chosen.
        history: What the log says of the epochs that are done.
        sums: The current epoch's losses so far, each times its images, and its `images` and `seconds`.
    """

    conditions: dict[str, str]
    epoch: int
    step: int
    model: Weights
    optimizer: dict[str, Any]
    ema: Weights | None = None
    before: Right | None = None
    best: Best | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    epochs: int = 0


def folder_for(output: Path) -> Path:
    """Where the state of the run that makes `output` lies: `out.safetensors.resume`."""
    return output.with_name(output.name + ".resume")


def has_state(folder: Path) -> bool:
    """Whether there is a run to go on with."""
    return (folder / FILE).exists()


def check_state_folder(folder: Path) -> None:
    """Refuses a folder in which no state could be kept, or that holds what no fine-tune wrote.

    Raises:
        ArtifactError: With what is in the way.
    """
    check_writable_folder(folder)
    strangers = sorted(path.name for path in folder.iterdir() if not _is_ours(path)) if folder.is_dir() else []
    if strangers:
        raise ArtifactError(f"{folder}, where the state of the run is to be kept, holds what tokencut did not write: "
                            f"{quoted(strangers)}; move that, or give the output another name")  # fmt: skip


def _is_ours(path: Path) -> bool:
    """Whether it is a state, or what a killed process left of one."""
    part = path.name.startswith(f"{part_prefix(Path(FILE))}.") and path.name.endswith(PART)
    return (path.name == FILE or part) and path.is_file()


def save_state(folder: Path, state: TrainingState) -> None:
    """Writes a state in the place of the one before it: all of it, or nothing.

    Raises:
        ArtifactError: It cannot be written; the state before it is still there.
    """
    values = {entry.name: getattr(state, entry.name) for entry in fields(state)}
    if state.best is not None:
        values["best"] = {entry.name: getattr(state.best, entry.name) for entry in fields(state.best)}
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make the folder {folder}: {error.strerror or error}; free its name") from error
    try:
        with atomic_write(folder / FILE) as temporary, temporary.open("wb") as file:
            try:
                torch.save({"format": FORMAT, **values}, file)
            except RuntimeError as error:  # torch's writer closes its archive and fails again, of which it tells
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
    except RuntimeError as error:
        raise ArtifactError(f"cannot write {folder / FILE}: {one_line(error)}; free space on its disk") from error
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # which does nothing where it holds a state


def load_state(folder: Path, conditions: Mapping[str, str]) -> TrainingState:
    """Reads a state back; nothing in the file is run.

    Args:
        folder: Where `save_state` wrote it.
        conditions: What the run that is to go on was started with.

    Raises:
        ArtifactError: The file is damaged or of a newer format, or belongs to a run that was started otherwise.
    """
    path = folder / FILE
    try:
        values = _read(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}; mend that, or type `force=True` to start "
                            "again") from error  # fmt: skip
    except Exception as error:  # whatever a damaged file leads torch to, which tells of its own innards
        raise damaged(folder, "it is not a whole file of torch's") from error
    version = values.pop("format", None) if isinstance(values, dict) else None
    if isinstance(version, int):
        require_format(path, version, FORMAT, "type `force=True` to start again")
    problem = _problem(values)
    if version != FORMAT or problem:
        raise damaged(folder, problem or "it has no format")
    values["best"] = None if values["best"] is None else Best(**values["best"])
    state = TrainingState(**values)
    require_same(f"{folder} holds a run", state.conditions, conditions,
                 "type the options it was started with, or `force=True` to start again")  # fmt: skip
    return state


def damaged(folder: Path, what: str) -> ArtifactError:
    """The error for a state that is not what it should be."""
    return ArtifactError(f"{folder / FILE} is damaged ({what}); type `force=True` to start again")


def _read(path: Path) -> Any:
    """What is in a file, checked for damage by the sums that zip archives keep; nothing in it is run."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError("a part of the archive has another sum")
    return torch.load(path, map_location="cpu", weights_only=True)


def _problem(values: Any) -> str | None:
    """What is wrong with the fields of a state, in a few words; None where they are what they should be."""
    names = {entry.name for entry in fields(TrainingState)}
    if not isinstance(values, dict) or set(values) != names:
        return "its fields are not those of a state"
    for name in ("epoch", "step", "epochs"):
        if not is_whole(values[name], 0):
            return f"its {name} is {shorten(values[name])}"
    best = values["best"]
    whole = isinstance(best, dict) and set(best) == {entry.name for entry in fields(Best)}
    kinds = {
        "conditions": _is_of(values["conditions"], str),
        "model": _is_of(values["model"], Tensor),
        "optimizer": isinstance(values["optimizer"], dict),
        "ema": values["ema"] is None or _is_of(values["ema"], Tensor),
        "before": values["before"] is None or _is_of(values["before"], bool),
        "best": best is None or whole and is_whole(best["epoch"], 1) and _is_of(best["right"], bool)
                and _is_of(best["weights"], Tensor),
        "history": isinstance(values["history"], list) and all(_is_of(row, (int, float)) for row in values["history"]),
        "sums": _is_of(values["sums"], (int, float)),
    }  # fmt: skip
    return next((f"its {name} is not what a run writes" for name, right in kinds.items() if not right), None)


def _is_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(entry, kind) for entry in value.values())


def remove_state(folder: Path) -> None:
    """Removes the state of a run that is done, and its folder where nothing else is in it."""
    with contextlib.suppress(OSError):
        for path in [path for path in folder.iterdir() if _is_ours(path)]:
            path.unlink()
        folder.rmdir()


def copy_of(weights: Weights) -> Weights:
    """Weights that stay as they are while training goes on, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
