"""What a sweep keeps in its folder, so that an interrupted one goes on where it was: finished rows, and for what."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from tokencut.adapters import adapter_for
from tokencut.data.image_set import ImageSet
from tokencut.errors import ArtifactError
from tokencut.files import atomic_write
from tokencut.messages import one_line
from tokencut.observers import Observer
from tokencut.runtime.devices import versions
from tokencut.runtime.resume import require_same, weights_digest
from tokencut.schema import NUMBER, OBJECT, TEXT, Fields, Form, Items, Rule, optional
from tokencut.sweeping.rows import Keep, Row, keep_text, pair_name

FILE = "state.json"
_NAMED = {"method": TEXT, "keep": Rule(lambda value: _rates(value) is not None, "keep rates joined by /")}
FORM = Form(
    type="sweep",
    format=1,
    fields=Fields({
        "conditions": Items(TEXT, named=True),
        "notes": Items(TEXT, most=None),
        "rows": Items(Fields({
            **_NAMED,
            **dict.fromkeys(("gmacs", "top1", "top5", "loss"), NUMBER),
            "recipe": optional(OBJECT),
            "correct": Rule(lambda value: bool(re.fullmatch("[01]+", str(value))), "0 or 1 for each image"),
        }), most=None),
        "timed_on": Items(TEXT, named=True),
        "speeds": Items(Fields({**_NAMED, **dict.fromkeys(("median", "low", "high"), NUMBER)}), most=None),
    }),
    called="state",
    otherwise="add `force=True` to start again",
    newer="add `force=True` to start again",
)  # fmt: skip

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
        what, otherwise = f"{folder} holds rows", _otherwise(folder)
        require_same(what, self.conditions, conditions, otherwise)
        for key, recipe in recipes.items():
            before, now = (json.dumps(made, sort_keys=True) for made in (self.recipes.get(key, recipe), recipe))
            name = f"reduction options ({pair_name(*key)})"
            require_same(what, {name: before}, {name: now}, otherwise)

    def require_named(self, rows: Collection[Key], folder: Path) -> None:
        """Refuses a sweep whose report would have fewer rows than the one that is there.

        Args:
            rows: The rows that it names.
            folder: Where the state was found.

        Raises:
            ArtifactError: Naming those that would be missing.
        """
        missing = [pair_name(*key) for key in self.rows if key not in rows]
        if missing:
            raise ArtifactError(f"{folder} holds rows that a report of this sweep would lack ({'; '.join(missing)}): "
                                f"name those methods and keep rates too, {_otherwise(folder)}")  # fmt: skip

    def save(self, folder: Path) -> None:
        """Writes the state into a folder, which is made if need be.

        Raises:
            ArtifactError: It cannot be written.
        """
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot make the folder {folder}: {error.strerror}; give another `folder`") from error
        with atomic_write(folder / FILE) as temporary:
            temporary.write_text(FORM.write(self._to_json()) + "\n", encoding="utf-8")

    def _to_json(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "notes": list(self.notes),
            "rows": [_row_to_json(row, self.recipes[key]) for key, row in self.rows.items()],
            "timed_on": self.timed_on,
            "speeds": [
                {"method": method, "keep": keep_text(keep), **vars(speed)}
                for (method, keep), speed in self.speeds.items()
            ],
        }


def _otherwise(folder: Path) -> str:
    return f"add `force=True` to drop them and start again, or give another folder, such as `folder={f'{folder}-2'!r}`"


def load_state(folder: Path) -> State | None:
    """Reads the state in a folder; None where there is none.

    Raises:
        ArtifactError: It is damaged, or of another format.
    """
    path = folder / FILE
    try:
        data = FORM.read(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ArtifactError) as error:
        why = error if isinstance(error, ArtifactError) else f"{one_line(error)}; {FORM.otherwise}"
        raise ArtifactError(
            f"cannot go on with {path}: {why}, or give another folder, such as `folder={f'{folder}-2'!r}`"
        ) from error
    state = State(data["conditions"], notes=tuple(data["notes"]), timed_on=data["timed_on"])
    for entry in data["rows"]:
        state.add(_row_from_json(entry), entry["recipe"])
    for entry in data["speeds"]:
        state.speeds[_key(entry)] = Speed(entry["median"], entry["low"], entry["high"])
    return state


def _row_to_json(row: Row, recipe: Any) -> dict[str, Any]:
    numbers = {name: getattr(row, name) for name in ("gmacs", "top1", "top5", "loss")}
    correct = "".join("01"[right] for right in row.correct)
    return {"method": row.method, "keep": keep_text(row.keep), **numbers, "recipe": recipe, "correct": correct}


def _row_from_json(entry: dict[str, Any]) -> Row:
    correct = tuple(sign == "1" for sign in entry["correct"])
    top1, top5 = entry["top1"], entry["top5"]
    return Row(*_key(entry), entry["gmacs"], top1, top5, None, len(correct), entry["loss"], correct)


def _key(entry: dict[str, Any]) -> Key:
    rates = _rates(entry["keep"])
    assert rates is not None
    return entry["method"], rates if len(rates) > 1 else rates[0]


def _rates(text: Any) -> tuple[float, ...] | None:
    """The keep rates that stand in a state; None where they are none."""
    try:
        return tuple(float(rate) for rate in text.split("/"))
    except (AttributeError, ValueError):
        return None


def with_speed(row: Row, speed: Speed) -> Row:
    """A row with its speed."""
    return replace(row, images_per_second=speed.median, images_per_second_quartiles=(speed.low, speed.high))


def conditions_of(model: nn.Module, images: ImageSet, observer: Observer) -> dict[str, str]:
    """What must be the same for a finished row to be of use again, options aside.

    Args:
        model: The dense model.
        images: The images it is judged on; all are read.
        observer: Told how many are read.
    """
    return {
        "weights": weights_digest(model, type(model).__name__, adapter_for(model).cost(model)),
        "preprocessing": str(sorted(images.prepared.config.items())),
        "images": images.digest(observer),
        "versions": str(versions()),
    }
