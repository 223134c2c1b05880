"""The script that holds schedules found by the clock against fixed ones of their speed, on a machine of known times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor

from tokencut.profiling.latency import Timing
from tokencut.search import timing


def seconds(name: str, forward: Any) -> float:
    """A token takes 1 ms in each of the 12 blocks, by halves; a stage nothing."""
    kind, *numbers = name.split()
    if hasattr(forward, "recipe"):
        now, spent = 64, 0.0
        left = {stage.block: stage.tokens_out for stage in forward.recipe.stages}
        for block in range(1, 13):
            after = left.get(block, now)
            now, spent = after, spent + (now + after) / 2
        return spent
    share = {"embed": 0, "head": 0, "dense": 12, "fresh": 1, "block": 1}.get(kind, 0.5)
    return share * float(numbers[1] if len(numbers) > 1 else 64)


@pytest.mark.slow
def test_the_fixed_stages_are_as_fast(
    benchmark: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")

    def measure(forwards: Mapping[str, Any], images: Tensor, **_: object) -> dict[str, Timing]:
        assert images.shape[0] == 3
        times = {name: seconds(name, forward) for name, forward in forwards.items()}
        return {name: Timing(ms, (ms, ms), 1.0) for name, ms in times.items()}

    monkeypatch.setattr(timing, "measure", measure)
    words = "digits --images 16 --effort 3 --limit 30 -b 3 --speedup 1.5 --device cpu"
    printed, _ = benchmark("by_clock", *words.split())
    head, _, *rows = (line.strip("| ").split(" | ") for line in printed.splitlines()[:4])
    found, fixed = (dict(zip(head, row, strict=False)) for row in rows)
    assert (found["form"], found["asked"], fixed["stages"]) == ("eager", "1.5", "3")
    assert float(found["speed-up"]) == pytest.approx(1.5, rel=0.05)
    assert float(fixed["speed-up"]) == pytest.approx(float(found["speed-up"]), rel=0.03)
    assert found["schedule"].startswith("found: `--keep ") and fixed["schedule"].startswith("fixed: `--keep 0.")
