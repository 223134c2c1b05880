"""The schedules a search for seconds moves among: whole steps of tokens, and no stage more than there is need of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tokencut.search.space import Counts, Space, budget_for


@dataclass(frozen=True)
class ClockSpace(Space):
    """Schedules priced in seconds.

    Attributes:
        step: What the tokens that leave a stage divide by, with `prefix`: a machine works on so many at a time.
        prefix: The model's class and register tokens.
    """

    step: int = 1
    prefix: int = 0

    def leaving(self, now: int, exact: float) -> int:
        """How many of `now` tokens leave a stage that is to let about `exact` leave; all of them for no stage."""
        least = math.ceil((1 + self.prefix) / self.step)
        count = self.step * max(least, round((exact + self.prefix) / self.step)) - self.prefix
        while count < now and self.tokens_out(now, budget_for(now, count, self.tokens_out)) != count:
            count += self.step  # so few no budget of the method lets out
        return min(now, count)

    def one_more(self, counts: Counts, block: int) -> Counts | None:
        """The schedule with a step more tokens leaving a block that reduces; blocks behind it that do not reduce take
        those as they come, since a stage for one step of tokens would take more than it gives.
        """
        entering = (self.tokens, *counts)
        if counts[block - 1] == entering[block - 1]:
            return None
        until = next((b for b in range(block + 1, self.depth + 1) if counts[b - 1] < entering[b - 1]), self.depth + 1)
        more = self.leaving(entering[block - 1], counts[block - 1] + self.step)
        if more <= counts[block - 1]:
            return None
        return (*counts[: block - 1], *(more,) * (until - block), *counts[until - 1 :])

    def filled(self, counts: Counts, target: float) -> Counts:
        """The schedule with steps of tokens added, those that cost nothing first, then where they fit best."""
        while True:
            offers = [offer for block in self.blocks if (offer := self.one_more(counts, block)) is not None]
            affordable = [(price, offer) for offer in offers if (price := self.price(offer)) <= target]
            if not affordable:
                return counts
            free = [pair for pair in affordable if pair[0] <= self.price(counts)]  # more tokens, for one stage less
            counts = min(free)[1] if free else max(affordable)[1]

    def only(self, blocks: Iterable[int]) -> ClockSpace:
        """The schedules that reduce in no other blocks than these."""
        return replace(self, blocks=tuple(sorted(blocks)))
