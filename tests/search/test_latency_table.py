"""What the parts of a model take, block by block; with multiply-adds in place of a clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokencut.model import compress
from tokencut.profiling.latency import Timing
from tokencut.search import timing
from tokencut.search.latency_table import BlockTimes, LatencyTable, latency_table
from tokencut.search.timing import Bench

CPU = torch.device("cpu")


def uneven() -> Any:
    """Four blocks of 16 image tokens, of which the last two have ever wider MLPs, as structured pruning leaves them."""
    model: Any = timm.create_model("test_vit", img_size=64, depth=4).eval()
    for block, hidden in zip(model.blocks[2:], (512, 2048), strict=True):
        block.mlp = Mlp(64, hidden)
    return model


def work(forward: Callable[[Tensor], object], images: Tensor) -> float:
    """Floating-point operations, by torch's counter."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        forward(images)
    return float(counter.get_total_flops())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Times are operations; a list of what was timed."""
    timed: list[str] = []

    def measure(forwards: Mapping[str, Any], images: Tensor, **_: object) -> dict[str, Timing]:
        timed.extend(forwards)
        costs = {name: 1000 * work(forward, images) for name, forward in forwards.items()}
        return {name: Timing(cost, (cost, cost), 1.0) for name, cost in costs.items()}

    monkeypatch.setattr(timing, "measure", measure)
    return timed


def table_of(model: Any) -> LatencyTable:
    compressed = compress(model, keep=1.0, layers="all", method="topk")
    return latency_table(compressed, Bench(compressed, batch_size=2, device=CPU))


def test_every_block_counts_for_itself(clock: list[str]) -> None:
    model, images = uneven(), torch.randn(2, 3, 64, 64)
    table = table_of(model)
    assert {name.split()[1] for name in clock if " " in name} == {"1", "3", "4"}  # the second is as the first
    assert table.dense == work(model, images)
    for layer in (1, 3, 4):
        compressed = compress(model, keep=0.5, layers=[layer], method="topk")
        counts = tuple(16 if number < layer else 8 for number in range(1, 5))
        # Between the table's counts the square that attention grows with is taken to be linear.
        assert table.seconds(counts) == pytest.approx(work(compressed, images), rel=5e-3)


def test_parts_are_timed_on_this_machine() -> None:
    compressed = compress(timm.create_model("test_vit", img_size=64, depth=3), layers="all", keep=1.0).eval()
    table = latency_table(compressed, Bench(compressed, batch_size=2, device=CPU), rounds=3, max_seconds=0.1)
    assert (table.counts[-1], table.step) == (16, 1)
    [block] = set(table.blocks)
    assert min(*block.block, *block.staged, *block.mlp_half, block.fresh, table.ends) > 0
    assert table.dense == pytest.approx(table.scale * (table.ends + 3 * block.fresh))
    assert table.speedup((16,) * 3) == pytest.approx(1)


BLOCK = BlockTimes(block=(0.001, 0.016), staged=(0.001, 0.012), mlp_half=(0.0005, 0.008), fresh=0.016)


def test_a_stage_costs_what_the_halves_take_more_than_the_block() -> None:
    # Of 16 tokens: 12 ms for a half and the stage, 8 for the other, where the block takes 16.
    assert BLOCK.stage == pytest.approx((0.0005, 0.004))
    told = LatencyTable((1, 16), (BLOCK,) * 6, 0.004, step=8).to_dict()
    [kind] = told["kinds"]
    assert (kind["blocks"], kind["stage_ms"], kind["before_stages_ms"]) == ([1, 2, 3, 4, 5, 6], [0.5, 4.0], 16.0)
    assert (told["tokens"], told["step"], told["ends_ms"], told["dense_ms"]) == ([1, 16], 8, 4.0, 100.0)


def test_what_a_forward_takes_beside_its_parts_depends_on_no_tokens() -> None:
    table = LatencyTable((1, 16), (BLOCK,) * 6, 0.004)
    slower = table.matched(0.150)
    assert (slower.dense, slower.ends) == (pytest.approx(0.150), pytest.approx(0.054))
    quicker = table.matched(0.050)  # every part was started by itself
    assert (quicker.dense, quicker.seconds((1,) * 6)) == (
        pytest.approx(0.050),
        pytest.approx(table.seconds((1,) * 6) / 2),
    )
    assert quicker.matched(0.100).dense == pytest.approx(0.100)


def step_of(costs: Callable[[int], float], monkeypatch: pytest.MonkeyPatch, tokens: int) -> LatencyTable:
    """The table of a machine on which a block's time is so much by tokens, class token included."""

    def measure(forwards: Mapping[str, Any], images: Tensor, **_: object) -> dict[str, Timing]:
        counts = {name: int(name.split()[2]) if name.count(" ") == 2 else tokens for name in forwards}
        return {name: Timing(cost, (cost, cost), 1.0) for name, cost in
                ((name, costs(count + 1)) for name, count in counts.items())}  # fmt: skip

    monkeypatch.setattr(timing, "measure", measure)
    return table_of(timm.create_model("test_vit", img_size=16 * math.isqrt(tokens), depth=2).eval())


@pytest.mark.parametrize(
    ("tokens", "whole", "step"),
    [
        (144, 1, 8),  # many to choose from: it costs nothing
        (144, 16, 16),
        (100, 1, 1),
        (100, 8, 8),
        (100, 16, 8),  # with steps of 16 there were 6
        (16, 8, 1),
    ],
)
def test_the_step_is_what_the_machine_works_in(
    monkeypatch: pytest.MonkeyPatch, tokens: int, whole: int, step: int
) -> None:
    table = step_of(lambda count: float(whole * math.ceil(count / whole)), monkeypatch, tokens)
    assert table.step == step
    if tokens >= 128:  # tokens at which nothing is dearer than between two others
        assert all((count + 1) % 16 == 0 for count in table.counts[:-1])
