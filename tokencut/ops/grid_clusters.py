"""Clusters that keep a grid: the tokens of each window become those of a smaller window, and can be had back.

Superpixel clustering as in arXiv 2210.01035: centres begin as averages of cells, move for some rounds to the weighted
mean of the tokens around them, and keep their places, so that they are a grid again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.ops.constants import constant

# What a centre keeps of itself in each round, so that one that no token joins stays where it was.
INERTIA = 1e-6
# The unit of distances is no less than these shares of the mean over an image's tokens of that to the nearest centre,
# and of the mean of all; and more than nothing, for tokens that are all alike.
SHARE_OF_MEAN, SHARE_OF_ALL, SMALLEST = 1e-2, 1e-4, 1e-30
# A centre that is further away by so many units has no share to speak of, e^-30 or 1e-13; and one that may not be
# joined is so much further than that.
FURTHEST, BEYOND = 30.0, 60.0


@dataclass(frozen=True)
class Windows:
    """A grid of tokens cut into windows, from its first row and column on; the last ones are padded.

    Attributes:
        rows: Rows of tokens.
        columns: Columns of tokens.
        height: Rows of a window.
        width: Columns of a window.
        multiple: Of what the rows and columns of smaller windows have to be multiples.
    """

    rows: int
    columns: int
    height: int
    width: int
    multiple: int = 1

    @property
    def count(self) -> int:
        """`N`, the tokens."""
        return self.rows * self.columns

    @property
    def places(self) -> int:
        """The places of a window, `n`."""
        return self.height * self.width

    @property
    def down(self) -> int:
        """Windows in a column of them."""
        return math.ceil(self.rows / self.height)

    @property
    def across(self) -> int:
        """Windows in a row of them."""
        return math.ceil(self.columns / self.width)

    @property
    def padded(self) -> bool:
        """Whether some places hold no token."""
        return self.number * self.places > self.count

    @property
    def number(self) -> int:
        """`W`, the windows."""
        return self.down * self.across

    def shrunk(self, height: int, width: int) -> Windows:
        """The grid in which each window has so many rows and columns, less those that would hold padding alone."""
        rows, columns = _shrunk(self.rows, self.height, height), _shrunk(self.columns, self.width, width)
        return Windows(rows, columns, height, width, self.multiple)

    def smaller(self) -> tuple[Windows, ...]:
        """The grids that smaller windows of about the same form leave, each of another number of tokens, ascending."""
        found: dict[int, Windows] = {}
        sides = self.height, self.width
        for side in range(1, max(sides)):
            height, width = (_nearest_multiple(size * side, max(sides), self.multiple) for size in sides)
            if height <= self.height and width <= self.width:
                shrunk = self.shrunk(height, width)
                found.setdefault(shrunk.count, shrunk)
        return tuple(found[count] for count in sorted(found) if count < self.count)

    def with_count(self, count: int) -> Windows:
        """That of the smaller grids which has so many tokens.

        Raises:
            ValueError: None has.
        """
        found = next((each for each in self.smaller() if each.count == count), None)
        if found is None:
            raise ValueError(f"no smaller windows leave {count} tokens of {self}")
        return found

    def cut(self, x: Tensor) -> Tensor:
        """Tokens `(B, N, D)` in raster order by windows, `(B, W, n, D)`; padding is zeros."""
        x = x.unflatten(1, (self.rows, self.columns))
        below, beside = self.down * self.height - self.rows, self.across * self.width - self.columns
        if below or beside:
            x = F.pad(x, (0, 0, 0, beside, 0, below))
        x = x.unflatten(2, (self.across, self.width)).unflatten(1, (self.down, self.height))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        """What `cut` does, undone: `(B, W, n, D)` to `(B, N, D)`."""
        x = x.unflatten(1, (self.down, self.across)).unflatten(3, (self.height, self.width))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, : self.rows, : self.columns].flatten(1, 2)


def _nearest_multiple(size: int, parts: int, multiple: int) -> int:
    """`size / parts` to the nearest multiple, at least one of it."""
    return multiple * max(1, (2 * size + parts * multiple) // (2 * parts * multiple))


def _shrunk(size: int, window: int, smaller: int) -> int:
    whole, rest = divmod(size, window)
    return whole * smaller + math.ceil(rest * smaller / window)


@dataclass(frozen=True)
class GridClusters:
    """The decision how the tokens of each window become those of a smaller one, and what each takes from them later.

    Attributes:
        windows: The grid entering, with windows of `n` places.
        smaller: The grid leaving, with as many windows of `m` places.
        average: What each place leaving takes of those entering, fp32 `(B, W, m, n)`; adds up to 1 over `n`.
        spread: What each place entering gets back of those leaving, fp32 `(B, W, n, m)`; adds up to 1 over `m`.
        change: Whether a token gets back what the places leaving have changed by, on top of itself.
    """

    windows: Windows
    smaller: Windows
    average: Tensor
    spread: Tensor
    change: bool

    def merged(self, x: Tensor) -> Tensor:
        """Tokens `(B, N, D)` to those of the smaller grid, `(B, M, D)`."""
        return self.smaller.joined(torch.matmul(self.average.to(x.dtype), self.windows.cut(x)))

    def given_back(self, x: Tensor) -> Tensor:
        """Tokens of the smaller grid, `(B, M, D)`, to those of the grid, `(B, N, D)`."""
        return self.windows.joined(torch.matmul(self.spread.to(x.dtype), self.smaller.cut(x)))

    def source(self) -> Tensor:
        """The token of the smaller grid from which each takes most, int64 `(B, N)`."""
        numbers = torch.arange(self.smaller.count, device=self.spread.device, dtype=torch.float32)
        places = self.smaller.cut(numbers.view(1, -1, 1)).long().expand(self.spread.shape[0], -1, -1, -1)
        chosen = places.squeeze(3).gather(2, self.spread.argmax(3))
        return self.windows.joined(chosen.unsqueeze(3)).squeeze(2)


@dataclass(frozen=True)
class ClusterRule:
    """How windows are clustered.

    Attributes:
        rounds: How often the centres move.
        reach: A token may join the centres whose cell is so many cells or fewer away from its own, in each direction.
        sharpness: Inverse temperature of the assignments, for squared distances in units of each image's own: the
            median, over its tokens, of that to the nearest centre. One unit for all, from calibration images, was no
            better, and would depend on the scale of the features.
        nearest: From how many centres a token takes afterwards.
    """

    rounds: int
    reach: int
    sharpness: float
    nearest: int


def grid_clusters(x: Tensor, windows: Windows, smaller: Windows, rule: ClusterRule, change: bool) -> GridClusters:
    """Clusters the tokens of each window softly, around centres in a smaller one.

    All distances are compared with the median of an image's own, so a model with larger features, which computes the
    same, gets the same clusters; and an image gets the same alone and in any batch.

    Args:
        x: Tokens, fp32 `(B, N, D)` in raster order.
        windows: The grid that they stand in.
        smaller: The grid of the centres.
        rule: How.
        change: As in `GridClusters`.
    """
    batch, between = x.shape[0], (windows, smaller)
    points = windows.cut(x)
    taken = constant(_taken, windows, like=x).unsqueeze(2) if windows.padded else None
    # Distances stay the same, and large values that all tokens share cost no digits.
    if taken is None:
        points = points - points.mean(2, keepdim=True)
    else:
        points = (points - points.sum(2, keepdim=True) / taken.sum(1, keepdim=True)) * taken
    points = points.flatten(0, 1)
    # Centres are averages of points, and what is asked of them are products with points: those of each pair of points
    # tell all of these, and stand in for the points in every round.
    products = torch.bmm(points, points.transpose(1, 2))
    average = constant(_pool, *between, like=x).transpose(1, 2).expand(batch, -1, -1, -1).flatten(0, 1)
    beyond = constant(_beyond, *between, rule.reach, like=x)
    unit = None
    for _ in range(rule.rounds):
        distance = _distances(products, average)
        if unit is None:
            unit = _unit(points, distance, windows, beyond, rule)
        joins = _assigned(distance, unit, beyond)
        weight = (joins if taken is None else joins * taken).flatten(0, 1) + INERTIA * average
        # A centre that is not there has nothing.
        average = weight / weight.sum(1, keepdim=True).clamp(min=INERTIA / 2)
    distance = _distances(products, average)
    if unit is None:
        unit = _unit(points, distance, windows, beyond, rule)
    missing = constant(_missing, smaller, like=x).unsqueeze(1)
    if rule.nearest < smaller.places:
        known = distance.unflatten(0, (batch, -1))
        if smaller.padded:  # centres that are missing are as far as the furthest, and no further: no number is made up
            known = known + missing * (known.amax(3, keepdim=True) - known)
        last = known.topk(rule.nearest, dim=3, largest=False).values[..., -1:]
        missing = torch.maximum(missing, (known > last).to(x.dtype))
    spread = _assigned(distance, unit, BEYOND * missing)
    average = average.transpose(1, 2).unflatten(0, (batch, -1))
    return GridClusters(windows, smaller, average, spread, change)


def grid_pool(
    x: Tensor, windows: Windows, smaller: Windows, nearest: int, change: bool, *, strided: bool = False
) -> GridClusters:
    """Averages over cells, or one token of each, whatever the tokens are: what clustering has to be better than.

    Args:
        x: Tokens, `(B, N, D)`.
        windows: The grid that they stand in.
        smaller: The grid of the cells.
        nearest: 1 where each token takes from its own cell; else it takes from those around it by its place (bilinear).
        change: As in `GridClusters`.
        strided: Whether the token in the middle of a cell stands for it, as where a grid is read by strides.
    """
    alike = (x.shape[0], -1, -1, -1)
    average = constant(_strided if strided else _pool, windows, smaller, like=x).expand(alike)
    spread = constant(_own if nearest == 1 else _bilinear, windows, smaller, like=x).expand(alike)
    return GridClusters(windows, smaller, average, spread, change)


def _distances(products: Tensor, average: Tensor) -> Tensor:
    """Squared distances of points and centres, less the squared lengths of the points, which are the same for all
    centres: `(b, n, m)`.

    Args:
        products: Of each pair of points, `(b, n, n)`.
        average: What each point is of each centre, `(b, n, m)`.
    """
    mixed = torch.bmm(products, average)
    return torch.sub((average * mixed).sum(1, keepdim=True), mixed, alpha=2)


def _unit(points: Tensor, distance: Tensor, windows: Windows, beyond: Tensor, rule: ClusterRule) -> Tensor:
    """What squared distances are measured in, fp32 `(B, 1, 1, 1)`."""
    distance = (distance + points.square().sum(2, keepdim=True)).clamp(min=0).unflatten(0, (-1, windows.number))
    blocked = (beyond > 0).to(distance.dtype)
    nearest = (distance + blocked * (distance.amax(3, keepdim=True) - distance)).amin(3, keepdim=True)
    least = windows.joined(nearest).squeeze(2)
    median = least.topk((windows.count + 1) // 2, dim=1, largest=False).values[:, -1:]
    # Where half of the tokens or more are on their centres to a rounding error, others tell.
    floor = torch.maximum(
        SHARE_OF_MEAN * least.mean(1, keepdim=True), SHARE_OF_ALL * distance.mean((1, 2, 3)).unsqueeze(1)
    )
    return torch.maximum(median, floor).clamp(min=SMALLEST).view(-1, 1, 1, 1) / rule.sharpness


def _assigned(distance: Tensor, unit: Tensor, beyond: Tensor) -> Tensor:
    """The share of each centre in each token, by distance: `(B, W, n, m)`.

    Args:
        distance: `(B * W, n, m)`.
        unit: What it is measured in, `(B, 1, 1, 1)`.
        beyond: By how many units more a centre is away for being none to join: then it has no share to speak of.
    """
    distance = distance.unflatten(0, (unit.shape[0], -1))
    nearer = ((distance.amin(3, keepdim=True) - distance) / unit).clamp(min=-FURTHEST)
    return (nearer - beyond).softmax(3)


def _taken(windows: Windows, device: torch.device) -> Tensor:
    """Which places hold a token, `(W, n)`, 1 or 0; of a smaller grid, which centres are there."""
    return windows.cut(torch.ones(1, windows.count, 1, device=device))[0, ..., 0]


def _missing(smaller: Windows, device: torch.device) -> Tensor:
    """Which centres are not there, `(W, m)`, 1 or 0."""
    return 1 - _taken(smaller, device)


def _pool(windows: Windows, smaller: Windows, device: torch.device) -> Tensor:
    """Adaptive average pooling over the tokens that are there, `(W, m, n)`."""
    weight = _crossed(_pooled, windows, smaller, device) * _taken(windows, device).unsqueeze(1)
    return weight / weight.sum(2, keepdim=True).clamp(min=1.0)


def _strided(windows: Windows, smaller: Windows, device: torch.device) -> Tensor:
    """The token in the middle of each cell, `(W, m, n)`; the average of a cell whose middle is padding."""
    weight = _crossed(_middles, windows, smaller, device) * _taken(windows, device).unsqueeze(1)
    return weight + (1 - weight.sum(2, keepdim=True)) * _pool(windows, smaller, device)


def _near(windows: Windows, smaller: Windows, reach: int, device: torch.device) -> Tensor:
    """Which centres each place may join, `(W, n, m)`, 1 or 0."""
    joined = _crossed(partial(_reached, reach), windows, smaller, device) * _taken(smaller, device).unsqueeze(1)
    # Padding joins none, and needs some for its shares to be numbers.
    return torch.maximum(joined, (1 - _taken(windows, device)).unsqueeze(2))


def _beyond(windows: Windows, smaller: Windows, reach: int, device: torch.device) -> Tensor:
    """`beyond` of `_assigned` for centres that a place may not join, `(W, n, m)`."""
    return BEYOND * (1 - _near(windows, smaller, reach, device))


def _own(windows: Windows, smaller: Windows, device: torch.device) -> Tensor:
    """The cell in which the middle of each place lies, `(W, n, m)`, 1 or 0."""
    return _near(windows, smaller, 0, device)


def _bilinear(windows: Windows, smaller: Windows, device: torch.device) -> Tensor:
    """What each place takes of the cells around it by its distance from their middles, `(W, n, m)`."""
    weight = _crossed(_between, windows, smaller, device) * _taken(smaller, device).unsqueeze(1)
    # A token has half or more of its own cell, which is there; padding may have nothing.
    return weight / weight.sum(2, keepdim=True).clamp(min=0.25)


def _crossed(
    along: Callable[[Tensor, Tensor], Tensor], windows: Windows, smaller: Windows, device: torch.device
) -> Tensor:
    """What goes for rows and for columns, for places: of `(a, b)` and `(c, d)` `(1, a * c, b * d)`."""
    rows, columns = (
        along(*(torch.arange(count, device=device, dtype=torch.float32) for count in sides))
        for sides in ((windows.height, smaller.height), (windows.width, smaller.width))
    )
    both = rows.unsqueeze(1).unsqueeze(3) * columns.unsqueeze(1).unsqueeze(0)
    return both.flatten(2, 3).flatten(0, 1).unsqueeze(0)


def _pooled(places: Tensor, cells: Tensor) -> Tensor:
    """Which places adaptive pooling averages for each cell, `(cells, places)`."""
    size, count = places.shape[0], cells.shape[0]
    place, cell = places * count, cells.unsqueeze(1) * size
    return (place > cell - count).float() * (place < cell + size).float()


def _middles(places: Tensor, cells: Tensor) -> Tensor:
    """The place in the middle of each cell, the latter of two, `(cells, places)`."""
    place, middle = 2 * cells.shape[0] * places, ((2 * cells + 1) * places.shape[0]).unsqueeze(1)
    return (place <= middle).float() * (place > middle - 2 * cells.shape[0]).float()


def _reached(reach: int, places: Tensor, cells: Tensor) -> Tensor:
    """Which cells are near enough to that in which the middle of each place lies, `(places, cells)`."""
    middle, cell = ((2 * places + 1) * cells.shape[0]).unsqueeze(1), 2 * places.shape[0]
    return (middle >= (cells - reach) * cell).float() * (middle < (cells + reach + 1) * cell).float()


def _between(places: Tensor, cells: Tensor) -> Tensor:
    """Linear interpolation between the middles of cells, `(places, cells)`."""
    place = ((places + 0.5) * (cells.shape[0] / places.shape[0]) - 0.5).clamp(0, cells.shape[0] - 1)
    return (1 - (place.unsqueeze(1) - cells).abs()).clamp(min=0)
