"""How long a schedule takes on this machine, foretold from a table of its parts: half blocks, whole blocks, stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencut.blocks import BlockLoop
from tokencut.model import CompressedModel
from tokencut.observers import Observer
from tokencut.profiling.latency import Forward
from tokencut.search.probe import any_block_reduces
from tokencut.search.space import Counts
from tokencut.search.timing import Bench
from tokencut.tokens import Tokens

# Token counts in the table, as shares of all: between them times are taken to be linear. Of parts that take long to
# prepare, as those that are compiled, fewer.
SHARES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.03)
FEW_SHARES = (1.0, 0.6, 0.3, 0.1)
# A stage's time goes with what enters it; it is timed letting this share out.
STAGE_KEEP = 0.75
# Rows of memory and tiles of products divide by these; the finer is taken at least from so many tokens on, where it
# costs nothing to be chosen from.
STEPS = (8, 16)
MANY_TOKENS = 128
# Where the numbers of tokens that divide by a step are tried, as a share of all.
RAGGED = 0.6
# A number of tokens that does not divide is too dear where it takes so much more than goes with its number.
DEARER = 1.02


@dataclass(frozen=True)
class BlockTimes:
    """Seconds that the parts of a block take for one batch.

    Attributes:
        block: The whole block, after tokens were merged, at each of the table's `counts`.
        staged: Its first half and its stage, letting 3 of 4 tokens out, likewise.
        mlp_half: Its second half.
        fresh: The whole block before anything was merged, at all tokens.
    """

    block: tuple[float, ...]
    staged: tuple[float, ...]
    mlp_half: tuple[float, ...]
    fresh: float

    @property
    def stage(self) -> tuple[float, ...]:
        """What the stage itself adds: to the block, were as many tokens to leave as enter."""
        parts = zip(self.staged, self.mlp_half, self.block, strict=True)
        return tuple(max(0.0, staged + rest - whole) for staged, rest, whole in parts)


@dataclass(frozen=True)
class LatencyTable:
    """Seconds that the parts of a model take for one batch.

    Attributes:
        counts: The image tokens at which parts were timed, ascending.
        blocks: The blocks in order; those that cost the same share their times.
        ends: Embedding, head, and what a forward takes beside its parts.
        scale: What a dense forward takes, over the sum of its parts, where that is less.
        step: Numbers of tokens, class and register tokens among them, that the machine likes divide by this.
    """

    counts: tuple[int, ...]
    blocks: tuple[BlockTimes, ...]
    ends: float
    scale: float = 1.0
    step: int = 1

    @property
    def dense(self) -> float:
        """Seconds of a dense forward."""
        return self.scale * (self.ends + sum(block.fresh for block in self.blocks))

    def seconds(self, counts: Counts) -> float:
        """Seconds of a forward under a schedule."""
        total, now = self.ends, self.counts[-1]
        for block, after in zip(self.blocks, counts, strict=True):
            if after < now:
                total += self._at(block.staged, now) + self._at(block.mlp_half, after)
            else:
                total += block.fresh if now == self.counts[-1] else self._at(block.block, now)
            now = after
        return self.scale * total

    def speedup(self, counts: Counts) -> float:
        """How many times as fast as the dense model a schedule is."""
        return self.dense / self.seconds(counts)

    def matched(self, dense: float) -> LatencyTable:
        """The table for a machine on which a dense forward takes so many seconds as a whole.

        What is missing does not depend on tokens: calls, and weights that were not read a moment ago. What is too much
        was spent on starting each part by itself.
        """
        if dense >= self.dense:
            return replace(self, ends=self.ends + dense / self.scale - self.dense / self.scale)
        return replace(self, scale=self.scale * dense / self.dense)

    def to_dict(self) -> dict[str, Any]:
        """The table for JSON, in milliseconds; blocks that cost the same stand together."""
        kinds: dict[BlockTimes, list[int]] = {}
        for number, block in enumerate(self.blocks, 1):
            kinds.setdefault(block, []).append(number)
        rows = [
            {"blocks": numbers, "before_stages_ms": self._ms(times.fresh), "block_ms": self._all(times.block),
             "stage_ms": self._all(times.stage), "half_with_stage_ms": self._all(times.staged),
             "other_half_ms": self._all(times.mlp_half)}
            for times, numbers in kinds.items()
        ]  # fmt: skip
        return {"tokens": list(self.counts), "step": self.step, "dense_ms": self._ms(self.dense / self.scale),
                "ends_ms": self._ms(self.ends), "kinds": rows}  # fmt: skip

    def _all(self, times: tuple[float, ...]) -> list[float]:
        return [self._ms(seconds) for seconds in times]

    def _ms(self, seconds: float) -> float:
        return float(f"{1000 * self.scale * seconds:.5g}")

    def _at(self, times: tuple[float, ...], tokens: int) -> float:
        return float(np.interp(tokens, self.counts, times))


def latency_table(
    model: CompressedModel,
    bench: Bench,
    *,
    rounds: int = 15,
    max_seconds: float = 20.0,
    observer: Observer | None = None,
) -> LatencyTable:
    """Times the parts of a model in turn, so that all see the same machine; call it in the model's `inference_state`.

    Of blocks that cost the same (`BlockCost`) the first is timed.

    Args:
        model: The model with its method.
        bench: Where, and in which form, it runs.
        rounds: How many samples of each part to take.
        max_seconds: After so much time no new round is begun.
        observer: Told rounds done and rounds in all.

    Raises:
        ModelError: A part cannot be compiled.
    """
    loop, kinds = any_block_reduces(model), model.adapter.cost(model.model).blocks
    numbers = [kinds.index(kind) + 1 for kind in kinds]
    with torch.no_grad():
        entering = [loop.embed(bench.images)]
        for number in range(1, loop.depth + 1):
            entering.append(loop.step(number, entering[-1]))
    whole, last = entering[0], entering[-1]
    counts, ragged = _counts(model, whole, FEW_SHARES if bench.few else SHARES)
    parts: dict[str, Callable[[], object]] = {
        "embed": lambda: _tensors(loop.embed(bench.images)),
        "head": lambda: loop.head(last),
    }
    for number in sorted(set(numbers)):
        parts |= _of_block(model, loop, number, entering[number - 1], counts)
    for count in ragged:
        parts[f"block 1 {count}"] = partial(_whole, loop, 1, _some(loop, whole, count, merged=model.method.merges()))
    timed: dict[str, Forward] = {name: _called(part) for name, part in bench.formed_parts(parts, observer).items()}
    # The lower quartile: other work only ever adds to such short times, to some ten times as much.
    times = {name: timing.spread_ms[0] / 1000 for name, timing in bench.times(
        {"dense": bench.dense, **timed}, rounds=rounds, min_seconds=0.01, max_seconds=max_seconds, observer=observer,
        task="timing the model's parts",
    ).items()}  # fmt: skip
    blocks = tuple(_block_times(times, number, counts) for number in numbers)
    step = _step(whole, ragged, [times[f"block 1 {count}"] for count in ragged]) if ragged else 1
    table = LatencyTable(tuple(counts), blocks, times["embed"] + times["head"], step=step)
    return table.matched(times["dense"])


def _counts(model: CompressedModel, whole: Tokens, shares: Sequence[float]) -> tuple[list[int], list[int]]:
    """The table's numbers of image tokens, and those by which the step is told: none where the model has its own."""
    if model.adapter.hierarchical:
        return sorted({*model.adapter.cost(model.model).leaving, whole.count}), []
    return _grid(whole, shares), _ragged(whole)


def _of_block(
    model: CompressedModel, loop: BlockLoop, number: int, entering: Tokens, counts: Sequence[int]
) -> dict[str, Callable[[], object]]:
    """The parts of a block to be timed: before anything was merged, and with each number of tokens behind that."""
    parts: dict[str, Callable[[], object]] = {f"fresh {number}": partial(_whole, loop, number, entering)}
    for count in counts:
        if model.adapter.hierarchical:
            parts |= _parts_before(loop, number, entering, count)
        else:
            parts |= _parts(loop, number, _some(loop, entering, count, merged=model.method.merges()))
    return parts


def _called(part: Callable[[], object]) -> Forward:
    return lambda _: part()


def _tensors(tokens: Tokens) -> tuple[Tensor | None, ...]:
    """All that a part has computed, so that a compiler leaves nothing of it out."""
    return tokens.features, tokens.sizes, tokens.source, tokens.positions, tokens.bias


def _grid(whole: Tokens, shares: Sequence[float]) -> list[int]:
    """The table's numbers of image tokens: all, and below that, where there are many, such as divide by any step."""
    counts = {max(2, math.ceil(share * whole.count)) for share in shares}
    if whole.count >= MANY_TOKENS:  # nearly all tell no more than all
        fits = (_aligned(whole, count) for count in counts)
        counts = {fit for fit in fits if fit + STEPS[0] <= whole.count}
    return sorted({*counts, whole.count})


def _aligned(whole: Tokens, count: int) -> int:
    """The nearest number of image tokens, 2 at least, that divides, with the prefix tokens, by the largest step."""
    step, prefix = STEPS[-1], whole.num_prefix_tokens
    return step * max(round((count + prefix) / step), math.ceil((2 + prefix) / step)) - prefix


def _ragged(whole: Tokens) -> list[int]:
    """Numbers of image tokens by which the step is told: one that divides by 16, 8 more, 1 more; none of few."""
    count = _aligned(whole, round(RAGGED * whole.count))
    return [count, count + 8, count + 1] if count + 8 <= whole.count else []


def _step(whole: Tokens, ragged: Sequence[int], times: Sequence[float]) -> int:
    """The step, by the times of a block at `_ragged` numbers of tokens; never more than an eighth of all."""
    divides, half, odd = times
    count = ragged[0] + whole.num_prefix_tokens
    fine = odd > DEARER * divides * (1 + 1 / count) or whole.count >= MANY_TOKENS
    coarse = half > DEARER * divides * (1 + 8 / count)
    wanted = STEPS[1] if coarse else STEPS[0] if fine else 1
    return max((step for step in (1, *STEPS) if step <= wanted and step <= whole.count / 8), default=1)


def _some(loop: BlockLoop, whole: Tokens, count: int, merged: bool) -> Tokens:
    """The first `count` image tokens; two patches in each where `merged`."""
    features = whole.features[:, : whole.num_prefix_tokens + count].contiguous()
    sizes = torch.full((len(features), count), 2.0, device=features.device) if merged else None
    positions = None if whole.positions is None else whole.positions[:, :count]
    source = None if whole.source is None else torch.where(whole.source < count, whole.source, -1)
    return loop.weighed(replace(whole, features=features, sizes=sizes, positions=positions, source=source))


def _whole(loop: BlockLoop, number: int, tokens: Tokens) -> object:
    return _tensors(loop.step(number, tokens))


def _parts(loop: BlockLoop, number: int, tokens: Tokens) -> dict[str, Callable[[], object]]:
    """A block's parts to be timed on such tokens."""
    after = min(max(1, math.ceil(STAGE_KEEP * tokens.count)), tokens.count - 1)

    def staged() -> object:
        return _tensors(loop.weighed(loop.stages[number](loop.stage_input(number, tokens), after)))

    return {
        f"block {number} {tokens.count}": partial(_whole, loop, number, tokens),
        f"staged {number} {tokens.count}": staged,
        f"mlp_half {number} {tokens.count}": lambda: _tensors(loop.mlp_half(number, tokens)),
    }


def _parts_before(loop: BlockLoop, number: int, whole: Tokens, count: int) -> dict[str, Callable[[], object]]:
    """The parts of a block before which the stage of a hierarchical model stands, with so many tokens behind that; what
    gives each token back is the stage's too.
    """
    tokens = whole if count == whole.count else loop.smaller(number, whole, count)
    most = max(loop.adapter.cost(loop.model).leaving, default=whole.count)
    block = partial(_whole, loop, number, tokens)
    return {
        f"block {number} {count}": block,
        f"staged {number} {count}": lambda: _tensors(
            loop.adapter.leaving(loop.model, loop.smaller(number, whole, most))
        ),
        f"mlp_half {number} {count}": block,
    }


def _block_times(times: Mapping[str, float], number: int, counts: Sequence[int]) -> BlockTimes:
    """The times of a block that was timed."""
    block, staged, rest = (
        tuple(times[f"{part} {number} {count}"] for count in counts) for part in ("block", "staged", "mlp_half")
    )
    return BlockTimes(block, staged, rest, times[f"fresh {number}"])
