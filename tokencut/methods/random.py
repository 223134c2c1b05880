"""Keep tokens at random places: the control that any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from tokencut.methods.base import Method, StageInput, StageShape, option, register
from tokencut.ops.exporting import exporting, whole
from tokencut.ops.grouping import Selection
from tokencut.ops.ranking import highest

Number = TypeVar("Number", int, Tensor)


@register
@dataclass(frozen=True)
class Random(Method):
    """Drops tokens by a fixed draw: the same places for every image, so that no image depends on its batch."""

    name = "random"
    source = "control"
    prop_attn = False

    seed: int = option(0, "which draw", low=0, high=2**63 - 1)

    def decide(self, stage_input: StageInput, budget: int) -> Selection:
        features = stage_input.tokens.features
        count = stage_input.tokens.count
        if exporting():  # a constant of the graph, since runtimes lack the operators of 31 bits
            keys = [_scramble(number, count, self.seed) for number in range(count)]
            drawn = sorted(sorted(range(count), key=keys.__getitem__)[:budget])
            kept = torch.tensor([drawn], dtype=whole(), device=features.device)
        else:
            numbers = torch.arange(count, device=features.device)
            kept = highest(-_scramble(numbers, count, self.seed).unsqueeze(0), budget)
        return Selection(kept.expand(features.shape[0], -1))

    def macs(self, shape: StageShape) -> int:
        return 0

    def reads_attention(self) -> bool:
        return False

    def merges(self) -> bool:
        return False


def _scramble(numbers: Number, count: int, seed: int) -> Number:
    """A pseudo-random number for each number, by integer arithmetic alone: it compiles, exports and repeats anywhere.

    Three rounds of multiply and shift on 31 bits. The start mixes in how many numbers there are, so that stages of one
    model draw differently.
    """
    mask = 0x7FFFFFFF
    # Constants of 31 bits too: the compiler writes them as int32.
    start = ((seed + 1) * 0x85EBCA6B + count * 0xC2B2AE35) & mask
    x = (numbers * 0x1E3779B1 + start) & mask
    for multiplier in (0x2C1B3C6D, 0x297A2D39, 0x45D9F3B):
        x = ((x ^ (x >> 15)) * multiplier) & mask
    return x ^ (x >> 13)
