"""How long a schedule takes on this machine, foretold from a table of its parts: half blocks, whole blocks, stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tokencut.blocks import BlockLoop
from tokencut.data.preprocessing import preprocessing_of
from tokencut.model import CompressedModel
from tokencut.observers import Observer
from tokencut.profiling.latency import Forward, measure
from tokencut.profiling.measuring import random_images
from tokencut.search.probe import any_block_reduces
from tokencut.search.space import Counts
from tokencut.tokens import Tokens

# Token counts in the table, as shares of all: between them times are taken to be linear.
SHARES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.03)
# A stage's time goes with what enters it; it is timed letting this share out.
STAGE_KEEP = 0.75


@dataclass(frozen=True)
class BlockTimes:
    """Seconds that the parts of a block take for one batch.

    Attributes:
        block: The whole block, after tokens were merged, at each of the table's `counts`.
        attention_half: Its first half where it reduces, likewise.
        stage: Its stage, letting 3 of 4 tokens out.
        mlp_half: Its second half.
        fresh: The whole block before anything was merged, at all tokens.
    """

    block: tuple[float, ...]
    attention_half: tuple[float, ...]
    stage: tuple[float, ...]
    mlp_half: tuple[float, ...]
    fresh: float


@dataclass(frozen=True)
class LatencyTable:
    """Seconds that the parts of a model take for one batch.

    Attributes:
        counts: The image tokens at which parts were timed, ascending.
        blocks: The blocks in order; those that cost the same share their times.
        ends: Embedding and head.
    """

    counts: tuple[int, ...]
    blocks: tuple[BlockTimes, ...]
    ends: float

    @property
    def dense(self) -> float:
        """Seconds of a dense forward."""
        return self.ends + sum(block.fresh for block in self.blocks)

    def seconds(self, counts: Counts) -> float:
        """Seconds of a forward under a schedule."""
        total, now = self.ends, self.counts[-1]
        for block, after in zip(self.blocks, counts, strict=True):
            if after < now:
                halves = self._at(block.attention_half, now) + self._at(block.mlp_half, after)
                total += halves + self._at(block.stage, now)
            else:
                total += block.fresh if now == self.counts[-1] else self._at(block.block, now)
            now = after
        return total

    def speedup(self, counts: Counts) -> float:
        """How many times as fast as the dense model a schedule is."""
        return self.dense / self.seconds(counts)

    def _at(self, times: tuple[float, ...], tokens: int) -> float:
        return float(np.interp(tokens, self.counts, times))


def latency_table(
    model: CompressedModel,
    *,
    batch_size: int,
    device: torch.device,
    rounds: int = 15,
    max_seconds: float = 20.0,
    observer: Observer | None = None,
) -> LatencyTable:
    """Times the parts of a model in turn, so that all see the same machine; call it in the model's `inference_state`.

    Of blocks that cost the same (`BlockCost`) the first is timed.

    Args:
        model: The model with its method.
        batch_size: Images a forward.
        device: Where it runs.
        rounds: How many samples of each part to take.
        max_seconds: After so much time no new round is begun.
        observer: Told rounds done and rounds in all.
    """
    loop = any_block_reduces(model)
    images = random_images(model, (batch_size, *preprocessing_of(model).input_shape), device)
    kinds = model.adapter.cost(model.model).blocks
    with torch.no_grad():
        entering = [loop.embed(images)]
        for number in range(1, loop.depth + 1):
            entering.append(loop.step(number, entering[-1]))
    whole, last = entering[0], entering[-1]
    hierarchical = model.adapter.hierarchical
    possible = {max(2, math.ceil(share * whole.count)) for share in SHARES}
    counts = sorted({*model.adapter.cost(model.model).leaving, whole.count} if hierarchical else possible)
    timed: dict[str, Forward] = {"embed": loop.embed, "head": lambda _: loop.head(last)}
    for number in sorted({kinds.index(kind) + 1 for kind in kinds}):
        timed |= _fresh(loop, number, entering[number - 1])
        for count in counts:
            if hierarchical:
                timed |= _parts_before(loop, number, entering[number - 1], count)
                continue
            timed |= _parts(loop, number, _some(loop, entering[number - 1], count, merged=model.method.merges()))
    times = {name: t.median_ms / 1000 for name, t in measure(
        timed, images, rounds=rounds, min_seconds=0.01, max_seconds=max_seconds, observer=observer,
        task="timing the model's parts",
    ).items()}  # fmt: skip
    blocks = tuple(_block_times(times, kinds.index(kind) + 1, counts) for kind in kinds)
    return LatencyTable(tuple(counts), blocks, times["embed"] + times["head"])


def _some(loop: BlockLoop, whole: Tokens, count: int, merged: bool) -> Tokens:
    """The first `count` image tokens; two patches in each where `merged`."""
    features = whole.features[:, : whole.num_prefix_tokens + count].contiguous()
    sizes = torch.full((len(features), count), 2.0, device=features.device) if merged else None
    positions = None if whole.positions is None else whole.positions[:, :count]
    source = None if whole.source is None else torch.where(whole.source < count, whole.source, -1)
    return loop.weighed(replace(whole, features=features, sizes=sizes, positions=positions, source=source))


def _parts(loop: BlockLoop, number: int, tokens: Tokens) -> dict[str, Forward]:
    """A block's parts to be timed on such tokens; the stage is timed together with the half block that feeds it."""
    count = tokens.count
    after = min(max(1, math.ceil(STAGE_KEEP * count)), count - 1)
    return {
        f"block {number} {count}": lambda _: loop.step(number, tokens),
        f"attention_half {number} {count}": lambda _: loop.stage_input(number, tokens),
        f"stage {number} {count}": lambda _: loop.stages[number](loop.stage_input(number, tokens), after),
        f"mlp_half {number} {count}": lambda _: loop.mlp_half(number, tokens),
    }


def _parts_before(loop: BlockLoop, number: int, whole: Tokens, count: int) -> dict[str, Forward]:
    """The parts of a block before which the stage of a hierarchical model stands, with so many tokens behind that; what
    gives each token back is the stage's too.
    """
    tokens = whole if count == whole.count else loop.smaller(number, whole, count)
    most = max(loop.adapter.cost(loop.model).leaving, default=whole.count)
    return {
        f"block {number} {count}": lambda _: loop.step(number, tokens),
        f"attention_half {number} {count}": lambda _: whole,
        f"stage {number} {count}": lambda _: loop.adapter.leaving(loop.model, loop.smaller(number, whole, most)),
        f"mlp_half {number} {count}": lambda _: loop.step(number, tokens),
    }


def _fresh(loop: BlockLoop, number: int, tokens: Tokens) -> dict[str, Forward]:
    """The whole block before anything was merged."""
    return {f"fresh {number}": lambda _: loop.step(number, tokens)}


def _block_times(times: Mapping[str, float], number: int, counts: Sequence[int]) -> BlockTimes:
    """The times of a block that was timed."""
    block, half, both, rest = (
        tuple(times[f"{part} {number} {count}"] for count in counts)
        for part in ("block", "attention_half", "stage", "mlp_half")
    )
    stage = tuple(max(0.0, with_stage - alone) for with_stage, alone in zip(both, half, strict=True))
    return BlockTimes(block, half, stage, rest, times[f"fresh {number}"])
