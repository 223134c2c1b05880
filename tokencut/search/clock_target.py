"""What a target of seconds asks of a search: a speed-up on this machine, or milliseconds for a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tokencut.errors import TokencutError
from tokencut.evaluation.statistics import mean_and_error
from tokencut.search.clock_space import ClockSpace
from tokencut.search.latency_table import LatencyTable
from tokencut.search.local_search import LocalSearch
from tokencut.search.space import Counts
from tokencut.search.targets import CLIMBING, Target, measure_around, rounded_up
from tokencut.search.timing import Measured

# A measurement this near to the target meets it; a busy machine differs by as much from run to run.
NEAR = 0.02
CORRECTIONS = 4
# By how much a table may be wrong; where it seems to be further off, other work came between the measurements.
TRUSTED = 1.5
# One further away is said to miss it.
MISSED = 0.05
# A speed-up that is worth asking for.
WORTHWHILE = 1.1
# The share of the effort after which stages are dropped that don't pay; what is left goes to the others.
PRUNING = 0.6


@dataclass(frozen=True)
class ClockTarget:
    """A target of seconds, on the machine that a table was measured on.

    Attributes:
        target: What is asked for.
        table: Foretells times.
        easier: What to change, beside the target, where stages cost more than they save.
    """

    target: Target
    table: LatencyTable
    easier: str

    @property
    def seconds(self) -> float:
        """What a forward may take, by the table."""
        if self.target.latency_ms is not None:
            return self.target.latency_ms / 1000
        assert self.target.speedup is not None
        return self.table.dense / self.target.speedup

    def reached(self, measured: Measured) -> float:
        """How much of the target a schedule reaches: 1 meets it, more is faster."""
        if self.target.latency_ms is not None:
            return self.target.latency_ms / measured.found_ms
        assert self.target.speedup is not None
        return measured.speedup / self.target.speedup

    def miss(self, measured: Measured) -> str | None:
        """In a sentence, that a measured schedule is not what was asked for; None where it is."""
        reached = self.reached(measured)
        if abs(reached - 1) <= MISSED:
            return None
        if self.target.speedup is not None:
            told = f"measured {measured.speedup:.2f} times as fast instead of {self.target.speedup:g}"
        else:
            told = f"measured {measured.found_ms:.4g} ms a batch instead of {self.target.latency_ms:g}"
        if reached < 1:
            return (f"{told}: either this machine has other work, or stages take what they save; run it again when "
                    f"quiet, or type {self.easier}")  # fmt: skip
        return (f"{told}, which loses more than there was need of: either this machine has other work, or there is no "
                "schedule nearer; run it again when quiet")  # fmt: skip

    def refuse_dense(self) -> None:
        """Refuses what needs no schedule.

        Raises:
            TokencutError: The dense model meets the target.
        """
        dense = 1000 * self.table.dense
        if self.target.latency_ms is not None and self.target.latency_ms >= dense:
            raise TokencutError(f"`{self.target}` is met by the dense model, which takes {dense:.4g} ms a batch here; "
                                f"type less, such as `latency_ms={0.65 * dense:.3g}`")  # fmt: skip

    def out_of_reach(self, cheapest: Counts) -> TokencutError:
        """What is raised where no schedule is so fast.

        Args:
            cheapest: The fastest.
        """
        table, most = self.table, self.table.speedup(cheapest)
        if self.target.speedup is not None:
            what, easier = f"{most:.2f} times as fast is the most", f"`speedup={0.95 * most:.2f}`"
        else:
            least = 1000 * table.seconds(cheapest)
            what = f"{least:.4g} ms a batch is the least (dense {1000 * table.dense:.4g} ms)"
            easier = f"`latency_ms={rounded_up(1.05 * least)}`"
        return TokencutError(f"`{self.target}` cannot be met: {what} that these blocks can reach here; type "
                             f"{easier if most > WORTHWHILE else self.easier}")  # fmt: skip


def search_clock(
    searcher: LocalSearch, target: ClockTarget, effort: float, timed: Callable[[Counts], Measured]
) -> tuple[Counts, Measured]:
    """The schedule of least damage that takes so long as asked for, by measurement, with no stage that doesn't pay.

    Args:
        searcher: Whose space is priced in seconds, by the table.
        target: The target.
        effort: The multiply-adds that the search may take, in units of 1e9.
        timed: Measures a schedule.

    Returns:
        The schedule, and its times.

    Raises:
        TokencutError: No schedule is so fast, or the dense model is.
    """
    target.refuse_dense()
    limit, space = target.seconds, searcher.space
    start = searcher.begin(limit)
    if start is None:
        raise target.out_of_reach(searcher.space.cheapest)
    best = searcher.climb(start, limit, PRUNING * effort)
    best = paying(searcher, best, limit)
    best = counts = searcher.climb(best, limit, CLIMBING * effort)
    measure_around(searcher, best, limit)
    found: list[tuple[float, Counts, Measured]] = []
    for _ in range(CORRECTIONS):
        measured = timed(counts)
        reached = target.reached(measured)
        found.append((abs(reached - 1), counts, measured))
        limit = min(max(limit * reached, target.seconds / TRUSTED), target.seconds * TRUSTED)
        if found[-1][0] <= NEAR:
            break
        scaled = searcher.space.scaled(best, limit)
        if scaled is None:  # the blocks that are left cannot save so much
            searcher.space = space
            scaled = searcher.begin(limit)
        if scaled is None or any(scaled == before for _, before, _ in found):
            break
        counts = scaled
        searcher.measured(counts)
    _, counts, measured = min(found, key=lambda one: one[0])
    return counts, measured


def paying(searcher: LocalSearch, best: Counts, limit: float) -> Counts:
    """A schedule without the stages that don't pay, and a search that leaves their blocks alone from here on.

    A stage is dropped where the others, reducing more for that, do as little damage in the same time, within a standard
    error over the images.

    Args:
        searcher: Whose space is priced in seconds.
        best: A schedule.
        limit: The seconds.
    """
    space = searcher.space
    if not isinstance(space, ClockSpace):
        return best
    chosen, rival = best, searcher.measured(best)
    removals = {block: removal for block, removal in space.removals(best).items() if removal > 0}
    for block in sorted(removals, key=lambda block: removals[block]):
        if sum(removal > 0 for removal in space.removals(chosen).values()) == 1:
            break
        space = space.only(set(space.blocks) - {block})
        counts = space.scaled(chosen, limit)
        outcome = None if counts is None else searcher.tried.get(counts) or searcher.probe.measure(counts, rival)
        lost, error = (1.0, 0.0) if outcome is None else mean_and_error(outcome.divergence - rival.divergence)
        if counts is None or outcome is None or lost > (error if math.isfinite(error) else 0):
            space = space.only({*space.blocks, block})
            continue
        searcher.tried[counts] = outcome
        chosen = counts
    kept = [block for block, removal in space.removals(chosen).items() if removal > 0]
    searcher.space = space.only(set(kept))
    return chosen
