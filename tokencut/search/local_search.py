"""Looking for the schedule that does the least damage at a price: seeds, then exchanges between blocks."""

from __future__ import annotations

import random
from collections.abc import Callable

from tokencut.search.probe import Outcome, Probe
from tokencut.search.space import Counts, Space

# Seeds are tried on this share of the images; the best few of them on all.
SCREENING, FINALISTS = 0.25, 4
# An exchange changes a block's removal by about so much, in log(before / after): at first, and at last.
FIRST_STEP, LAST_STEP = 0.25, 0.02
# After so many exchanges in a row that gained nothing the step shrinks by SHRINK.
PATIENCE, SHRINK = 25, 1.6

OnBest = Callable[[Counts, Outcome], None]


class LocalSearch:
    """A search at one price after the other, on the same images.

    Attributes:
        tried: The outcome of every schedule that was run over all images.
    """

    def __init__(self, probe: Probe, space: Space, seed: int, on_best: OnBest = lambda counts, outcome: None) -> None:
        """Prepares a search.

        Args:
            probe: Runs schedules.
            space: What they are taken from.
            seed: Decides the exchanges.
            on_best: Told each new best, while a price is worked on.
        """
        self.probe = probe
        self.space = space
        self.tried: dict[Counts, Outcome] = {}
        self._random = random.Random(seed)
        self._on_best = on_best

    def measured(self, counts: Counts) -> Outcome:
        """The outcome of a schedule on all images, run if it was not yet."""
        if counts not in self.tried:
            outcome = self.probe.measure(counts)
            assert outcome is not None  # nothing to fall behind
            self.tried[counts] = outcome
        return self.tried[counts]

    def begin(self, target: float) -> Counts | None:
        """The best seed at a price; None where no schedule costs so little."""
        quick: dict[Counts, float] = {}
        for counts in self.space.seeds(target):
            outcome = self.probe.measure(counts, share=SCREENING)
            assert outcome is not None
            quick[counts] = outcome.mean
        finalists = sorted(quick, key=lambda counts: quick[counts])[:FINALISTS]
        return min(finalists, key=lambda counts: self.measured(counts).mean, default=None)

    def climb(self, start: Counts, target: float, until: float) -> Counts:
        """Exchanges removals between blocks for as long as that lowers the damage.

        Args:
            start: A schedule of about that price.
            target: The price.
            until: The multiply-adds of the probe, in units of 1e9, at which it ends.

        Returns:
            The best schedule.
        """
        best, step, failures, gained = start, FIRST_STEP, 0.0, False
        self._take(best)
        blocks = self.space.blocks
        while len(blocks) > 1 and self.probe.spent < until:
            block, other = self._random.sample(blocks, 2)
            by = step * self._random.choice((-1, 1)) * self._random.uniform(0.5, 1.5)
            counts = self.space.exchanged(best, block, by, other, target)
            if counts is None or counts in self.tried:
                failures += 0.05  # it cost nothing
            elif self._beats(counts, best):
                best, failures, gained = counts, 0.0, True
                self._take(best)
            else:
                failures += 1
            if failures > PATIENCE:
                step, failures = step / SHRINK, 0.0
            if step < LAST_STEP:
                if not gained:
                    break
                step, gained = FIRST_STEP, False  # once more from here, for as long as there is effort left
        return best

    def _beats(self, counts: Counts, best: Counts) -> bool:
        rival = self.tried[best]
        outcome = self.probe.measure(counts, rival)
        if outcome is None:
            return False
        self.tried[counts] = outcome
        return outcome.mean < rival.mean

    def _take(self, counts: Counts) -> None:
        outcome = self.measured(counts)
        self.probe.set_reference(counts)
        self._on_best(counts, outcome)
