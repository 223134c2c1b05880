"""What levels for each image are held against: one rate for all, and what knows more than a signal can.

Levels are ordered by cost. `loss` holds what each image loses at each level, `(levels, images)`.
"""

from __future__ import annotations

import numpy as np

from tokencut.search.sorting import Floats, Whole


def knowing(loss: Floats, costs: Floats, budget: float) -> Whole:
    """The level of each image that loses least in all at a mean cost, by its own losses: what no signal can beat."""
    low, high = 0.0, 1e6
    for _ in range(100):
        price = (low + high) / 2
        levels = np.argmin(loss + price * costs[:, None], 0)
        low, high = (price, high) if costs[levels].mean() > budget else (low, price)
    return np.argmin(loss + high * costs[:, None], 0)


def at_cost(values: Floats, costs: Floats, cost: float) -> Floats:
    """What images have at one level for all of a cost between two that were measured, `(images,)`: the line between."""
    above = int(np.clip(np.searchsorted(costs, cost), 1, len(costs) - 1))
    share = (cost - costs[above - 1]) / (costs[above] - costs[above - 1])
    return (1 - share) * values[above - 1] + share * values[above]
