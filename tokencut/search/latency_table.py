"""How long a schedule takes on this machine, foretold from a table of its parts: half blocks, whole blocks, stages."""

from __future__ import annotations

import math
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
class LatencyTable:
    """Seconds that the parts of a model take for one batch.

    Attributes:
        counts: The image tokens at which parts were timed, ascending.
        block: A whole block, after tokens were merged, at each of `counts`.
        attention_half: The first half of a reducing block, likewise.
        stage: Its stage, letting 3 of 4 tokens out.
        mlp_half: Its second half.
        fresh: A whole block before anything was merged, at all tokens.
        ends: Embedding and head.
        depth: The number of blocks.
    """

    counts: tuple[int, ...]
    block: tuple[float, ...]
    attention_half: tuple[float, ...]
    stage: tuple[float, ...]
    mlp_half: tuple[float, ...]
    fresh: float
    ends: float
    depth: int

    @property
    def dense(self) -> float:
        """Seconds of a dense forward."""
        return self.ends + self.depth * self.fresh

    def seconds(self, counts: Counts) -> float:
        """Seconds of a forward under a schedule."""
        total, now = self.ends, self.counts[-1]
        for after in counts:
            if after < now:
                total += self._at(self.attention_half, now) + self._at(self.stage, now) + self._at(self.mlp_half, after)
            else:
                total += self.fresh if now == self.counts[-1] else self._at(self.block, now)
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

    The first block stands for all: those of a Vision Transformer are alike.

    Args:
        model: The model with its method.
        batch_size: Images a forward.
        device: Where it runs.
        rounds: How many samples of each part to take.
        max_seconds: After so much time no new round is begun.
        observer: Told rounds done and rounds in all.
    """
    loop = any_block_reduces(model)
    images = random_images(model, (batch_size, *preprocessing_of(model).config["input_size"]), device)
    with torch.no_grad():
        whole = loop.embed(images)
    counts = sorted({max(2, math.ceil(share * whole.count)) for share in SHARES})
    timed: dict[str, Forward] = {
        "fresh": lambda _: loop.step(1, whole),
        "embed": lambda batch: loop.embed(batch),
        "head": lambda _: loop.head(whole),
    }
    for count in counts:
        timed |= _parts(loop, _some(loop, whole, count, merged=model.method.merges()))
    times = {name: t.median_ms / 1000 for name, t in measure(
        timed, images, rounds=rounds, min_seconds=0.01, max_seconds=max_seconds, observer=observer,
        task="timing the model's parts"
    ).items()}  # fmt: skip
    columns = {
        part: tuple(times[f"{part} {count}"] for count in counts) for part in ("block", "attention_half", "mlp_half")
    }
    stage = tuple(max(0.0, times[f"stage {count}"] - times[f"attention_half {count}"]) for count in counts)
    ends = times["embed"] + times["head"]
    return LatencyTable(tuple(counts), columns["block"], columns["attention_half"], stage, columns["mlp_half"],
                        times["fresh"], ends, loop.depth)  # fmt: skip


def _some(loop: BlockLoop, whole: Tokens, count: int, merged: bool) -> Tokens:
    """The first `count` image tokens; two patches in each where `merged`."""
    features = whole.features[:, : whole.num_prefix_tokens + count].contiguous()
    sizes = torch.full((len(features), count), 2.0, device=features.device) if merged else None
    positions = None if whole.positions is None else whole.positions[:, :count]
    return loop.weighed(replace(whole, features=features, sizes=sizes, positions=positions))


def _parts(loop: BlockLoop, tokens: Tokens) -> dict[str, Forward]:
    """The parts to be timed on such tokens; the stage is timed together with the half block that feeds it."""
    count = tokens.count
    after = min(max(1, math.ceil(STAGE_KEEP * count)), count - 1)
    return {
        f"block {count}": lambda _: loop.step(1, tokens),
        f"attention_half {count}": lambda _: loop.stage_input(1, tokens),
        f"stage {count}": lambda _: loop.stages[1](loop.stage_input(1, tokens), after),
        f"mlp_half {count}": lambda _: loop.mlp_half(1, tokens),
    }
