"""What the parts of a model take, block by block; with multiply-adds in place of a clock."""

from __future__ import annotations

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
from tokencut.search import latency_table as tables
from tokencut.search.latency_table import LatencyTable, latency_table

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

    monkeypatch.setattr(tables, "measure", measure)
    return timed


def table_of(model: Any) -> LatencyTable:
    return latency_table(compress(model, keep=1.0, layers="all", method="topk"), batch_size=2, device=CPU)


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
    table = latency_table(compress(timm.create_model("test_vit", img_size=64, depth=3), layers="all", keep=1.0),
                          batch_size=2, device=CPU, rounds=3, max_seconds=0.1)  # fmt: skip
    assert table.counts[-1] == 16
    [block] = set(table.blocks)
    assert min(*block.block, *block.attention_half, *block.mlp_half, block.fresh, table.ends) > 0
    assert table.dense == pytest.approx(table.ends + 3 * block.fresh)
    assert table.speedup((16,) * 3) == pytest.approx(1)
