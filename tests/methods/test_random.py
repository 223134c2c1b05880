"""random: the same fixed places for every image."""

from __future__ import annotations

import torch
from given_inputs import as_it_is, kept

from tokencut.attention import AttentionInfo
from tokencut.methods import StageInput, StageShape, make_method
from tokencut.tokens import Tokens


def places(tokens: int, budget: int, batch: int = 2, **options: object) -> list[list[int]]:
    stage_input = StageInput(Tokens(torch.zeros(batch, 1 + tokens, 4), 1), AttentionInfo((), 1, (0,)), as_it_is)
    return kept(make_method("random", options), stage_input, budget)


def test_every_image_has_the_same_places_in_order_and_no_place_twice() -> None:
    drawn = places(50, 20, batch=3)
    assert drawn[0] == drawn[1] == drawn[2] == sorted(set(drawn[0]))
    assert len(drawn[0]) == 20
    assert set(drawn[0]) <= set(range(50))


def test_the_seed_decides_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = places(50, 20, seed=3)
    torch.manual_seed(2)
    assert places(50, 20, seed=3) == first
    assert places(50, 20, seed=4) != first


def test_stages_of_different_length_draw_differently() -> None:
    assert places(64, 10)[0] != [place for place in places(65, 10)[0] if place < 64]


def test_places_are_spread_evenly_over_seeds() -> None:
    # 200 draws of 10 in 20: each place expects 100, with a standard deviation of 200 * 0.5 * 0.5 under 7.1.
    hits = torch.zeros(20)
    for seed in range(200):
        hits[places(20, 10, batch=1, seed=seed)[0]] += 1
    assert hits.min() > 70
    assert hits.max() < 130


def test_costs_nothing_and_reads_no_attention() -> None:
    method = make_method("random")
    assert method.macs(StageShape(16, 8, 64, 32)) == 0
    assert not method.reads_attention()
