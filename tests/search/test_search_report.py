"""The front: what is on it, and what to give compress for a point of it."""

from __future__ import annotations

from tokencut.search.report import ParetoPoint


def point(gmacs: float, divergence: float, **values: object) -> ParetoPoint:
    known = {"layers": (2, 5), "keep": (0.9, 0.7), "tokens": (16, 15, 15, 15, 11, 11), "speedup": None, "top1": 50.0,
             "agreement": 98.5, "cosine": None}  # fmt: skip
    return ParetoPoint(gmacs=gmacs, divergence=divergence, **{**known, **values})  # type: ignore[arg-type]


def test_a_point_says_what_to_give_compress() -> None:
    assert point(1, 0.3).arguments == "keep=[0.9, 0.7], layers=[2, 5]"
    assert point(1, 0.3, keep=(0.69, 0.125)).arguments == "keep=[0.69, 0.125], layers=[2, 5]"
    assert point(1, 0.0, layers=(), keep=()).arguments == "keep=1"


def test_what_is_not_known_is_not_there() -> None:
    assert point(1, 0.3).to_dict() == {
        "layers": [2, 5], "keep": [0.9, 0.7], "tokens": [16, 15, 15, 15, 11, 11], "gmacs": 1, "damage": 0.3,
        "top1": 50.0, "agreement": 98.5,
    }  # fmt: skip
