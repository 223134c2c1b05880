"""What a sweep keeps in its folder, so that an interrupted one goes on where it was: finished rows, and for what."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from tokencut.adapters import adapter_for
from tokencut.data.image_set import ImageSet
from tokencut.errors import ArtifactError
from tokencut.files import atomic_write
from tokencut.runtime.devices import versions
from tokencut.runtime.resume import require_format, require_same, weights_digest
from tokencut.sweep.rows import Keep, Row, keep_text, pair_name

FILE = "state.json"
FORMAT = 1

Key = tuple[str, Keep]


@dataclass(frozen=True)
class Speed:
    """Images per second: the median over rounds, and its quartiles."""

    median: float
    low: float
    high: float


@dataclass
class State:
    """The rows finished so far, and under which conditions.

    Attributes:
        conditions: What must be the same for a row to be of use again, by the words that an error names it with.
        rows: Finished rows, not yet compared or timed.
        recipes: What was done to the model of a row, as JSON has it.
        notes: What the first evaluation had to say of the images.
        timed_on: The conditions under which speeds were measured.
        speeds: Of models timed in one session.
    """

    conditions: dict[str, str]
    rows: dict[Key, Row] = field(default_factory=dict)
    recipes: dict[Key, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    timed_on: dict[str, str] = field(default_factory=dict)
    speeds: dict[Key, Speed] = field(default_factory=dict)

    def add(self, row: Row, recipe: Any) -> None:
        """Notes a finished row."""
        self.rows[row.method, row.keep] = row
        self.recipes[row.method, row.keep] = recipe

    def require(self, conditions: Mapping[str, str], recipes: Mapping[Key, Any], folder: Path) -> None:
        """Refuses rows that were made for something else.

        Args:
            conditions: Those of the sweep that wants to go on.
            recipes: What it would do to the model, by row.
            folder: Where the state was found.

        Raises:
            ArtifactError: Naming what differs.
        """
        what = f"{folder} holds rows"
        otherwise = f"add --force to drop them and start again, or give another folder, such as -o {folder}-2"
        require_same(what, self.conditions, conditions, otherwise)
        for key, recipe in recipes.items():
            before, now = (json.dumps(made, sort_keys=True) for made in (self.recipes.get(key, recipe), recipe))
            name = f"reduction options ({pair_name(*key)})"
            require_same(what, {name: before}, {name: now}, otherwise)

    def save(self, folder: Path) -> None:
        """Writes the state into a folder, which is made if need be.

        Raises:
            ArtifactError: It cannot be written.
        """
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot make the folder {folder}: {error.strerror}; give another -o") from error
        with atomic_write(folder / FILE) as temporary:
            temporary.write_text(json.dumps(self._to_json(), indent=1) + "\n", encoding="utf-8")

    def _to_json(self) -> dict[str, Any]:
        return {
            "tokencut_sweep": FORMAT,
            "conditions": self.conditions,
            "notes": list(self.notes),
            "rows": [_row_to_json(row, self.recipes[key]) for key, row in self.rows.items()],
            "timed_on": self.timed_on,
            "speeds": [[key[0], keep_text(key[1]), *vars(speed).values()] for key, speed in self.speeds.items()],
        }


def load_state(folder: Path) -> State | None:
    """Reads the state in a folder; None where there is none.

    Raises:
        ArtifactError: It is damaged, or of another format.
    """
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path) from error
    otherwise = f"add --force to start again, or give another folder, such as -o {folder}-2"
    try:
        data = json.loads(text)
        require_format(path, data["tokencut_sweep"], FORMAT, otherwise)
        return _from_json(data)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(path) from error


def _unreadable(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} is damaged, or not from this version's sweep; add --force to start again, or give "
                         f"another folder, such as -o {path.parent}-2")  # fmt: skip


def _from_json(data: Any) -> State:
    state = State(_texts(data["conditions"]), notes=tuple(map(str, data["notes"])), timed_on=_texts(data["timed_on"]))
    for entry in data["rows"]:
        row = _row_from_json(entry)
        state.add(row, entry["recipe"])
    for method, keep, *speed in data["speeds"]:
        median, low, high = map(float, speed)
        state.speeds[str(method), _read_keep(keep)] = Speed(median, low, high)
    return state


def _texts(data: dict[str, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in data.items()}


def _row_to_json(row: Row, recipe: Any) -> dict[str, Any]:
    numbers = {name: getattr(row, name) for name in ("gmacs", "top1", "top5", "images", "loss")}
    correct = "".join("01"[right] for right in row.correct)
    return {"method": row.method, "keep": keep_text(row.keep), **numbers, "recipe": recipe, "correct": correct}


def _row_from_json(entry: dict[str, Any]) -> Row:
    correct = tuple({"0": False, "1": True}[sign] for sign in entry["correct"])
    gmacs, top1, top5, loss = (float(entry[name]) for name in ("gmacs", "top1", "top5", "loss"))
    if len(correct) != entry["images"] or not correct:
        raise ValueError
    return Row(str(entry["method"]), _read_keep(entry["keep"]), gmacs, top1, top5, None, len(correct), loss, correct)


def _read_keep(text: str) -> Keep:
    rates = tuple(float(rate) for rate in text.split("/"))
    return rates if len(rates) > 1 else rates[0]


def with_speed(row: Row, speed: Speed) -> Row:
    """A row with its speed."""
    return replace(row, images_per_second=speed.median, images_per_second_quartiles=(speed.low, speed.high))


def conditions_of(model: nn.Module, images: ImageSet, on_image: Callable[[int, int], None]) -> dict[str, str]:
    """What must be the same for a finished row to be of use again, options aside.

    Args:
        model: The dense model.
        images: The images it is judged on; all are read.
        on_image: Told the number of images read, and of all.
    """
    return {
        "weights": weights_digest(model, type(model).__name__, adapter_for(model).cost(model)),
        "preprocessing": str(sorted(images.prepared.config.items())),
        "images": images.digest(lambda read: on_image(read, len(images))),
        "versions": str(versions()),
    }
