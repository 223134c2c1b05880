"""The scripts on levers and placements run, and where no lever is moved a stage decides as bat's does."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from tokencut.methods import base, methods

Benchmark = Callable[..., tuple[str, str]]


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's method is registered for these tests alone."""
    monkeypatch.setattr(base, "_METHODS", dict(methods()))


def test_without_levers_it_is_bat(benchmark: Benchmark) -> None:
    pytest.importorskip("sklearn")
    words = "digits --data digits --limit 20 --grid spatial=0,0.2 rounds=0,1 --methods --keep 0.3 --device cpu"
    printed, _ = benchmark("levers", *words.split())
    row = re.compile(r"^\| (\S[^|]*) \| ([\d.]+ \([\d.]+\))", re.MULTILINE)
    rows = dict(row.findall(printed))
    assert len(rows) == 2 + 2 * 4
    assert rows["levers spatial=0 rounds=0 --prop-attn"] == rows["bat"]
    assert len(set(rows.values())) > 3  # the levers do something


def test_every_lever_gives_as_many_groups_as_there_is_room_for() -> None:
    import levers  # examples/benchmarks, tests/benchmarks/conftest.py

    from tokencut.methods import StageInput, make_method
    from tokencut.tokens import Tokens

    features = torch.randn(2, 17, 8, generator=torch.Generator().manual_seed(0))
    source = torch.arange(16).expand(2, -1)
    stage_input = StageInput(Tokens(features, 1, source=source), None, lambda tokens: tokens)  # type: ignore[arg-type]
    base.register(levers.Levers)
    for options in ({"density": "relative"}, {"size_aware": 2}, {"rounds": 2}, {"spatial": 0.5}, {"weight_power": 0.5},
                    {"features": "layer_norm"}, {"window": 8}):  # fmt: skip
        found = make_method("levers", options).decide(stage_input, 7)
        assert [group.unique().tolist() for group in found.group] == [list(range(7))] * 2, options


def test_placements_cost_no_more_than_the_default_blocks(benchmark: Benchmark) -> None:
    pytest.importorskip("sklearn")
    words = "digits --data digits --limit 20 --layers 3,6,9 late --keep 0.6 --device cpu"
    printed, _ = benchmark("placements", *words.split())
    rows = re.findall(r"^\| ([\w,]+) \| ([\d.]+) \| ([\d.]+) \| 0.6 \|", printed, re.MULTILINE)
    assert [layers for layers, _, _ in rows] == ["4,7,10", "3,6,9", "late"]
    usual = float(rows[0][2])
    assert all(0.9 * usual <= float(gmacs) <= usual for _, _, gmacs in rows)
    early, late = float(rows[1][1]), float(rows[2][1])
    assert late < 0.6 < early  # the later, the less is kept for the same price
