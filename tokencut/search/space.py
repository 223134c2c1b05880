"""The schedules a search moves among: image tokens leaving each block, all at one price. No torch.

A schedule is `n_1 >= n_2 >= ... >= n_L`; a block where nothing leaves has no stage. It is changed through its
*removals*, `log(n_before / n)` of each block, since what a removal does to a model goes with the share of the tokens
that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from tokencut.schedule import PLACEMENTS, TokensOut, default_layers, kept_tokens, named_layers

Counts = tuple[int, ...]
Price = Callable[[Counts], float]

# Halvings when a price is to be hit: 2^-24 of a removal is less than a token of any image.
HALVINGS = 24
# No block takes more than e^-6 of its tokens (one of 403): beyond, only one is left anyway.
MOST = 6.0


@dataclass(frozen=True)
class Space:
    """What may be reduced, and what it costs.

    Attributes:
        tokens: Image tokens entering the first block.
        depth: The number of blocks.
        blocks: The 1-based blocks that may reduce, ascending.
        price: The cost of a schedule, in any unit: a search holds it at or below a target.
        tokens_out: How many tokens leave a stage with a budget (`Method.tokens_out`).
    """

    tokens: int
    depth: int
    blocks: Counts
    price: Price
    tokens_out: TokensOut = lambda tokens, budget: budget

    @property
    def dense(self) -> Counts:
        """Nothing is reduced."""
        return (self.tokens,) * self.depth

    @property
    def cheapest(self) -> Counts:
        """As much as can be is reduced, as early as can be."""
        return self.from_log_ratios(dict.fromkeys(self.blocks, MOST))

    def from_log_ratios(self, removals: dict[int, float]) -> Counts:
        """The schedule with these removals, by 1-based block; those of blocks that are not there are 0."""
        counts, exact, now = [], float(self.tokens), self.tokens
        for block in range(1, self.depth + 1):
            exact *= math.exp(-removals.get(block, 0.0))
            if block in removals:
                now = self.leaving(now, exact)
            counts.append(now)
        return tuple(counts)

    def leaving(self, now: int, exact: float) -> int:
        """How many of `now` tokens leave a stage that is to let about `exact` leave; all of them for no stage."""
        budget = max(1, round(exact))
        return min(now, self.tokens_out(now, budget)) if budget < now else now

    def removals(self, counts: Counts) -> dict[int, float]:
        """What each block that may reduce removes, as `log(before / after)`."""
        entering = (self.tokens, *counts)
        return {block: math.log(entering[block - 1] / entering[block]) for block in self.blocks}

    def within(self, target: float, make: Callable[[float], Counts], most: float) -> Counts | None:
        """The dearest of a family of schedules that costs no more than `target`.

        Args:
            target: The highest price.
            make: A schedule for a number from 0 to `most`, cheaper the larger it is.
            most: The largest number.

        Returns:
            A schedule, or None where the cheapest is too dear.
        """
        if self.price(make(most)) > target:
            return None
        low, high = 0.0, most
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.price(make(middle)) > target else (low, middle)
        return make(high)

    def scaled(self, counts: Counts, target: float) -> Counts | None:
        """The schedule with all removals multiplied so that it costs `target`, and filled up."""
        removals = self.removals(counts)
        found = self.within(
            target, lambda by: self.from_log_ratios({b: min(MOST, by * r) for b, r in removals.items()}), 64.0
        )
        return None if found is None else self.filled(found, target)

    def exchanged(self, counts: Counts, block: int, by: float, other: int, target: float) -> Counts | None:
        """The schedule with one block's removal changed, and another's set so that the price is `target` again.

        Args:
            counts: A schedule of about that price.
            block: The block whose removal changes.
            by: By how much, in `log(before / after)`; it falls to 0 at the lowest.
            other: The block that makes up for it.
            target: The highest price.

        Returns:
            A schedule, or None where the other block cannot make up for it.
        """
        removals = self.removals(counts)
        removals[block] = min(MOST, max(0.0, removals[block] + by))
        found = self.within(target, lambda now: self.from_log_ratios({**removals, other: now}), MOST)
        if found is None or self.price(found) < 0.97 * target:  # the other block would have to add tokens
            return None
        return self.filled(found, target)

    def filled(self, counts: Counts, target: float) -> Counts:
        """The schedule with single tokens added where they fit best under `target`, which rounding left unspent."""
        while True:
            offers = [offer for block in self.blocks if (offer := self.one_more(counts, block)) is not None]
            affordable = [(price, offer) for offer in offers if (price := self.price(offer)) <= target]
            # A token kept may save a stage: only what is spent on tokens counts as an offer.
            dearer = [pair for pair in affordable if pair[0] > self.price(counts)]
            if not dearer:
                return counts
            counts = max(dearer)[1]

    def one_more(self, counts: Counts, block: int) -> Counts | None:
        """The schedule with the least that can be added to what leaves a block that reduces; None where nothing can."""
        entering = self.tokens if block == 1 else counts[block - 2]
        if counts[block - 1] >= entering or self.tokens_out(entering, entering - 1) != entering - 1:
            return None
        # Blocks that may not reduce take what enters, so the run of them behind this block changes along.
        until = next((b for b in range(block + 1, self.depth + 1) if b in self.blocks), self.depth + 1)
        more = counts[block - 1] + 1
        return (*counts[: block - 1], *(more,) * (until - block), *counts[until - 1 :])

    def seeds(self, target: float) -> tuple[Counts, ...]:
        """Schedules to begin with, each as dear as `target` allows.

        A small family: the first block that reduces, how many blocks lie between stages, and whether tokens go early
        or late; and one rate at the default blocks and at each placement that has a name, where those may reduce.
        """
        unit, shapes = max(1, round(len(self.blocks) / 12)), [self.blocks]
        for first in range(3):
            for stride in (1, 2):
                shapes.append(self.blocks[first * unit :: stride * unit])
        profiles = [
            {block: ((place + 1) / len(shape)) ** power - (place / len(shape)) ** power
             for place, block in enumerate(shape)}
            for shape in dict.fromkeys(shapes) if shape for power in (0.6, 1.0, 1.6)
        ]  # fmt: skip
        for placement in (default_layers(self.depth), *(named_layers(name, self.depth) for name in PLACEMENTS)):
            usual = [block for block in placement if block in self.blocks]
            profiles += [dict.fromkeys(usual, 1.0)] if usual else []
        made = (self.within(target, lambda by, p=p: self.from_log_ratios(_times(p, by)), 99.0) for p in profiles)  # type: ignore[misc]
        return tuple(dict.fromkeys(self.filled(counts, target) for counts in made if counts is not None))


@dataclass(frozen=True)
class GridSpace(Space):
    """The schedules of a hierarchical model: tokens become fewer once, before one block, by one of a few numbers.

    Attributes:
        choices: The tokens that can be left, ascending.
    """

    choices: Counts = ()

    @property
    def every(self) -> tuple[Counts, ...]:
        """All schedules that reduce."""
        return tuple(self._beginning(block, count) for block in self.blocks for count in self.choices)

    @property
    def cheapest(self) -> Counts:
        return min(self.every, key=self.price, default=self.dense)

    def seeds(self, target: float) -> tuple[Counts, ...]:
        """For each block the schedule that begins there and leaves the most tokens that `target` allows."""
        found = (self._dearest(target, block) for block in self.blocks)
        return tuple(counts for counts in found if counts is not None)

    def scaled(self, counts: Counts, target: float) -> Counts | None:
        """The dearest schedule within `target` that begins where this one does; else the dearest of all."""
        begins = next((block for block, left in enumerate(counts, start=1) if left < self.tokens), self.blocks[0])
        return self._dearest(target, begins) or max(self.seeds(target), key=self.price, default=None)

    def exchanged(self, counts: Counts, block: int, by: float, other: int, target: float) -> Counts | None:
        """The dearest schedule within `target` that begins before another block."""
        return self._dearest(target, block)

    def _dearest(self, target: float, block: int) -> Counts | None:
        affordable = [
            counts for left in self.choices if self.price(counts := self._beginning(block, left)) <= target
        ]  # fmt: skip
        return max(affordable, key=self.price, default=None)

    def _beginning(self, block: int, count: int) -> Counts:
        return (self.tokens,) * (block - 1) + (count,) * (self.depth - block + 1)


def _times(removals: dict[int, float], factor: float) -> dict[int, float]:
    return {block: min(MOST, factor * removal) for block, removal in removals.items()}


def budget_for(tokens: int, count: int, tokens_out: TokensOut) -> int:
    """The budget of a stage that lets `count` of `tokens` image tokens leave; `count` where no budget does."""
    tried = (*range(count, 0, -1), *range(count + 1, tokens))
    return next((budget for budget in tried if tokens_out(tokens, budget) == count), count)


def keep_for(tokens: int, budget: int) -> float:
    """The shortest decimal with `ceil(keep * tokens) == budget`: 45 of 64 is 0.7."""
    for digits in range(1, 17):
        power = 10**digits
        keep = float(Fraction(math.floor(Fraction(budget * power, tokens)), power))
        if 0 < keep <= 1 and kept_tokens(keep, tokens) == budget:
            return keep
    return budget / tokens


def keeps(tokens: int, counts: Counts, tokens_out: TokensOut) -> tuple[Counts, tuple[float, ...]]:
    """A schedule as layers and keep rates.

    Args:
        tokens: Image tokens entering the first block.
        counts: Image tokens leaving each block.
        tokens_out: How many tokens leave a stage with a budget.

    Returns:
        The 1-based blocks that reduce, and the keep rate of each.
    """
    layers, rates = [], []
    for block, (before, after) in enumerate(zip((tokens, *counts), counts, strict=False), start=1):
        if after < before:
            layers.append(block)
            rates.append(keep_for(before, budget_for(before, after, tokens_out)))
    return tuple(layers), tuple(rates)
