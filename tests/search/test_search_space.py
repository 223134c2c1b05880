"""The schedules a search moves among: all of them are schedules, and none costs more than it may."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencut.schedule import make_schedule
from tokencut.search.clock_space import ClockSpace
from tokencut.search.space import GridSpace, Space, budget_for, keep_for, keeps

# A price that can be added up by hand: a token costs 1 in each block, a stage 2.
DEPTH, TOKENS = 6, 16


def price(counts: tuple[int, ...]) -> float:
    stages = sum(after < before for before, after in zip((TOKENS, *counts), counts, strict=False))
    return float(sum(counts) + 2 * stages)


SPACE = Space(TOKENS, DEPTH, tuple(range(1, DEPTH + 1)), price)


def is_schedule(counts: tuple[int, ...]) -> bool:
    return all(1 <= after <= before for before, after in zip((TOKENS, *counts), counts, strict=False))


def test_the_ends_of_the_space() -> None:
    assert SPACE.dense == (16,) * 6
    assert SPACE.price(SPACE.dense) == 96
    assert SPACE.cheapest == (1,) * 6


def test_removals_multiply() -> None:
    half = math.log(2)
    assert SPACE.from_log_ratios({2: half, 4: half}) == (16, 8, 8, 4, 4, 4)
    assert SPACE.removals((16, 8, 8, 4, 4, 4)) == {1: 0, 2: half, 3: 0, 4: half, 5: 0, 6: 0}


def test_filled_spends_what_rounding_left() -> None:
    # 16+8+8+4+4+4 and two stages are 48: three tokens more fit.
    counts = SPACE.filled((16, 8, 8, 4, 4, 4), 51)
    assert SPACE.price(counts) == 51
    assert is_schedule(counts)


@given(st.floats(20, 95), st.integers(0, 3))
def test_seeds_and_exchanges_hold_the_price(target: float, number: int) -> None:
    seeds = SPACE.seeds(target)
    assert seeds
    assert len(set(seeds)) == len(seeds)
    for counts in seeds:
        assert is_schedule(counts)
        assert SPACE.price(counts) <= target
    start = seeds[number % len(seeds)]
    for block, other in ((1, 5), (5, 1), (2, 3), (6, 2)):
        for by in (-0.3, 0.3):
            found = SPACE.exchanged(start, block, by, other, target)
            if found is not None:
                assert is_schedule(found)
                assert 0.97 * target <= SPACE.price(found) <= target


def test_only_the_blocks_named_reduce() -> None:
    space = Space(TOKENS, DEPTH, (2, 5), price)
    for counts in (*space.seeds(60), space.cheapest):
        entering = (TOKENS, *counts)
        assert {b for b in range(1, DEPTH + 1) if counts[b - 1] < entering[b - 1]} <= {2, 5}


def test_the_fixed_stages_are_among_the_seeds() -> None:
    space = Space(64, 12, tuple(range(1, 13)), lambda counts: float(sum(counts)))
    fixed = (64, 64, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8)
    assert fixed in space.seeds(sum(fixed))


def test_a_target_below_everything_has_no_schedule() -> None:
    assert SPACE.seeds(7) == ()  # one token in six blocks and a stage are 8
    assert SPACE.seeds(8)[0] == (1,) * 6
    assert SPACE.scaled((16, 8, 8, 8, 8, 8), 20) is None  # the first block keeps its 16, the rest 1 each, and the stage


@given(st.integers(2, 400), st.data())
def test_the_keep_rate_gives_exactly_the_count(tokens: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, tokens - 1))
    keep = keep_for(tokens, count)
    plan = make_schedule(1, keep, [1], None).resolve(tokens)
    assert [stage.tokens_out for stage in plan] == [count]


@pytest.mark.parametrize(("tokens", "count", "keep"), [(64, 45, 0.7), (196, 138, 0.7), (10, 1, 0.1), (64, 63, 0.98)])
def test_the_keep_rate_is_short(tokens: int, count: int, keep: float) -> None:
    assert keep_for(tokens, count) == keep


def test_a_schedule_as_options() -> None:
    assert keeps(64, (64, 64, 45, 45, 9, 9), lambda tokens, budget: budget) == ((3, 5), (0.7, 0.2))


def test_a_method_that_lets_one_more_out() -> None:
    def one_more(tokens: int, budget: int) -> int:
        return budget + 1

    assert budget_for(64, 45, one_more) == 44
    assert keeps(64, (45,), one_more)[1] == (0.68,)  # ceil(0.68 * 64) is 44
    space = Space(TOKENS, DEPTH, (1, 2, 3), price, one_more)
    for counts in space.seeds(60):
        assert is_schedule(counts)


# One stage, before any block from the second on, that leaves 4 or 9 of 16: (block - 1) * 16 + (7 - block) * left + 2.
GRID = GridSpace(TOKENS, DEPTH, (2, 3, 4, 5, 6), price, choices=(4, 9))


def test_a_grid_gets_smaller_once_and_by_what_there_is() -> None:
    assert GRID.dense == (16,) * 6
    assert GRID.cheapest == (16, 4, 4, 4, 4, 4) and len(GRID.every) == 10
    # At most 63: before block 2 nine stay (16 + 45 + 2), before the others four while that is little enough.
    assert GRID.seeds(63) == ((16, 9, 9, 9, 9, 9), (16, 16, 4, 4, 4, 4), (16, 16, 16, 4, 4, 4))
    assert GRID.scaled((16, 16, 9, 9, 9, 9), 63) == (16, 16, 4, 4, 4, 4)
    assert GRID.scaled((16, 16, 16, 16, 4, 4), 63) == (16, 9, 9, 9, 9, 9), "no such block is cheap enough"
    assert GRID.exchanged((16, 9, 9, 9, 9, 9), 4, 0.1, 2, 63) == (16, 16, 16, 4, 4, 4)
    assert GRID.seeds(37) == () and GRID.scaled(GRID.dense, 37) is None
    assert GridSpace(TOKENS, DEPTH, (1, 2), price).cheapest == (16,) * 6, "where no smaller grid is"


# With one class token 3, 7, 11 and 15 of 16 image tokens are whole steps of 4.
CLOCK = ClockSpace(TOKENS, DEPTH, tuple(range(1, DEPTH + 1)), price, step=4, prefix=1)


def test_by_the_clock_tokens_leave_in_whole_steps() -> None:
    half = math.log(2)
    assert CLOCK.from_log_ratios({2: half, 4: half}) == (16, 7, 7, 3, 3, 3)
    assert CLOCK.from_log_ratios({2: 0.01}) == (16, 15, 15, 15, 15, 15)
    assert CLOCK.from_log_ratios({1: half, 3: 0.0, 5: 0.05}) == (7,) * 6  # no stage for less than half a step
    assert CLOCK.cheapest == (3,) * 6


@given(st.floats(30, 95), st.integers(0, 2), st.integers(0, 7))
def test_by_the_clock_every_schedule_is_of_whole_steps(target: float, fused: int, prefix: int) -> None:
    space = ClockSpace(
        TOKENS, DEPTH, CLOCK.blocks, price, lambda tokens, budget: min(tokens, budget + fused), 4, prefix
    )
    for counts in space.seeds(target):
        for made in (counts, space.scaled(counts, target), space.exchanged(counts, 2, 0.3, 4, target)):
            if made is not None:
                assert is_schedule(made)
                assert space.price(made) <= target
                entering = (TOKENS, *made)
                assert all(
                    (after + prefix) % 4 == 0 for before, after in zip(entering, made, strict=False) if after < before
                )


def test_by_the_clock_what_is_left_is_spent_on_tokens_not_on_stages() -> None:
    # 16 + 5 x 7 and one stage are 53. Four more tokens behind block 2 cost 20; a stage for them alone would cost 6.
    assert CLOCK.filled((16, 7, 7, 7, 7, 7), 60) == (16, 7, 7, 7, 7, 7)
    assert CLOCK.filled((16, 7, 7, 7, 7, 7), 73) == (16, 11, 11, 11, 11, 11)


def test_by_the_clock_a_stage_that_costs_more_than_it_saves_gives_its_tokens_back() -> None:
    # The last stage takes one token of 16 for one block: 1 saved, 2 spent.
    assert CLOCK.filled((16, 16, 16, 16, 16, 15), 97) == (16,) * 6


def test_by_the_clock_blocks_can_be_left_out() -> None:
    assert CLOCK.only({4, 2}).cheapest == (16, 3, 3, 3, 3, 3)
    assert CLOCK.only({4, 2}).step == 4
