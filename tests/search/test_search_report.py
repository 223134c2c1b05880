"""The front: what is on it, and that any point of it can be typed."""

from __future__ import annotations

import json
from pathlib import Path

from tokencut.search.report import FrontPoint, write_front


def point(gmacs: float, damage: float, **values: object) -> FrontPoint:
    known = {"layers": (2, 5), "keep": (0.9, 0.7), "tokens": (16, 15, 15, 15, 11, 11), "speedup": None, "top1": 50.0,
             "agreement": 98.5, "cosine": None}  # fmt: skip
    return FrontPoint(gmacs=gmacs, damage=damage, **{**known, **values})  # type: ignore[arg-type]


def test_a_point_is_ready_to_be_typed() -> None:
    assert point(1, 0.3).options == "--keep 0.9/0.7 --layers 2,5"
    assert point(1, 0.3, keep=(0.69, 0.125)).options == "--keep 0.69/0.125 --layers 2,5"
    assert point(1, 0.0, layers=(), keep=()).options == "--keep 1"


def test_the_file_holds_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "out.front.json"
    write_front(path, [point(1, 0.3)], {"model": "tiny"})
    assert json.loads(path.read_text()) == {
        "model": "tiny",
        "front": [{
            "layers": [2, 5], "keep": [0.9, 0.7], "tokens": [16, 15, 15, 15, 11, 11], "gmacs": 1, "damage": 0.3,
            "top1": 50.0, "agreement": 98.5, "options": "--keep 0.9/0.7 --layers 2,5",
        }],
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]
