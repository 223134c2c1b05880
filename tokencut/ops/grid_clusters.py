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

# What a centre keeps of itself in each round, so that one that no token joins stays where it was.
INERTIA = 1e-6
# The unit of distances is no less than these shares of the mean over an image's tokens of that to the nearest centre,
# and of the mean of all; and more than nothing, for tokens that are all alike.
SHARE_OF_MEAN, SHARE_OF_ALL, SMALLEST = 1e-2, 1e-4, 1e-30
# A centre that is further away by so many units has no share to speak of: e^-30 is 1e-13.
FURTHEST = 30.0


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

    def taken(self, device: torch.device) -> Tensor:
        """Which places hold a token, fp32 `(W, n)`, 1 or 0."""
        return self.cut(torch.ones(1, self.count, 1, device=device))[0, ..., 0]


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
        sharpness: Inverse temperature of the assignments, in units of `least`.
        least: The squared distance by which all are measured: the median, over an image's tokens, of that to the
            nearest centre. Each image's own where 0.
        nearest: From how many centres a token takes afterwards.
    """

    rounds: int
    reach: int
    sharpness: float
    least: float
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
    cells = _cells(windows, smaller, x.device)
    taken = cells.taken
    points = windows.cut(x)
    # Distances stay the same, and large values that all tokens share cost no digits.
    points = (points - points.sum(2, keepdim=True) / taken.sum(1).view(1, -1, 1, 1)) * taken.unsqueeze(2)
    near = cells.near(rule.reach)
    average, unit = cells.pool().expand(x.shape[0], -1, -1, -1), None
    for _ in range(rule.rounds):
        distance = _distances(points, torch.matmul(average, points))
        if unit is None:
            unit = _unit(distance, near, windows, rule)
        weight = (_assigned(distance, near, unit) * taken.unsqueeze(2)).transpose(2, 3) + INERTIA * average
        # A centre that is not there has nothing.
        average = weight / weight.sum(3, keepdim=True).clamp(min=INERTIA / 2)
    distance = _distances(points, torch.matmul(average, points))
    if unit is None:
        unit = _unit(distance, near, windows, rule)
    there = cells.held.unsqueeze(1).expand_as(distance)
    if rule.nearest < smaller.places:
        last = _blocked(distance, there).topk(rule.nearest, dim=3, largest=False).values[..., -1:]
        there = there * (distance <= last).to(distance.dtype)
    return GridClusters(windows, smaller, average, _assigned(distance, there, unit), change)


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
    cells = _cells(windows, smaller, x.device)
    average = cells.strided() if strided else cells.pool()
    spread = cells.near(0) if nearest == 1 else cells.bilinear()
    alike = (x.shape[0], -1, -1, -1)
    return GridClusters(windows, smaller, average.expand(alike), spread.expand(alike), change)


@dataclass(frozen=True)
class _Cells:
    """Where the cells of the smaller windows lie in the larger ones; masks are fp32, 1 or 0, and are multiplied.

    Attributes:
        windows: The grid entering.
        smaller: The grid leaving.
        taken: Which places hold a token, `(W, n)`.
        held: Which centres are there, `(W, m)`.
    """

    windows: Windows
    smaller: Windows
    taken: Tensor
    held: Tensor

    def pool(self) -> Tensor:
        """Adaptive average pooling over the tokens that are there, `(W, m, n)`."""
        weight = self._crossed(_pooled) * self.taken.unsqueeze(1)
        return weight / weight.sum(2, keepdim=True).clamp(min=1.0)

    def strided(self) -> Tensor:
        """The token in the middle of each cell, `(W, m, n)`; the average of a cell whose middle is padding."""
        weight = self._crossed(_middles) * self.taken.unsqueeze(1)
        return weight + (1 - weight.sum(2, keepdim=True)) * self.pool()

    def near(self, reach: int) -> Tensor:
        """Which centres each place may join, `(W, n, m)`."""
        joined = self._crossed(partial(_reached, reach)) * self.held.unsqueeze(1)
        # Padding joins none, and needs some for its shares to be numbers.
        return torch.maximum(joined, (1 - self.taken).unsqueeze(2))

    def bilinear(self) -> Tensor:
        """What each place takes of the cells around it by its distance from their middles, `(W, n, m)`."""
        weight = self._crossed(_between) * self.held.unsqueeze(1)
        # A token has half or more of its own cell, which is there; padding may have nothing.
        return weight / weight.sum(2, keepdim=True).clamp(min=0.25)

    def _crossed(self, along: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What goes for rows and for columns, for places: of `(a, b)` and `(c, d)` `(1, a * c, b * d)`."""
        windows, smaller = self.windows, self.smaller
        rows, columns = (
            along(_numbers(large, self.taken.device), _numbers(small, self.taken.device))
            for large, small in ((windows.height, smaller.height), (windows.width, smaller.width))
        )
        both = rows.unsqueeze(1).unsqueeze(3) * columns.unsqueeze(1).unsqueeze(0)
        return both.flatten(2, 3).flatten(0, 1).unsqueeze(0)


def _cells(windows: Windows, smaller: Windows, device: torch.device) -> _Cells:
    return _Cells(windows, smaller, windows.taken(device), smaller.taken(device))


def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device, dtype=torch.float32)


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


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances of `(B, W, n, D)` and `(B, W, m, D)`, `(B, W, n, m)`."""
    lengths = points.square().sum(3, keepdim=True) + centres.square().sum(3).unsqueeze(2)
    return (lengths - 2 * torch.matmul(points, centres.transpose(2, 3))).clamp(min=0)


def _blocked(distance: Tensor, allowed: Tensor) -> Tensor:
    """Distances, where they are not allowed as large as the largest."""
    return distance * allowed + distance.amax(3, keepdim=True) * (1 - allowed)


def _unit(distance: Tensor, near: Tensor, windows: Windows, rule: ClusterRule) -> Tensor:
    """What squared distances are measured in, fp32 `(B, 1, 1, 1)`."""
    if rule.least > 0:
        return distance.new_full((distance.shape[0], 1, 1, 1), rule.least / rule.sharpness)
    least = windows.joined(_blocked(distance, near).amin(3, keepdim=True)).squeeze(2)
    median = least.topk((windows.count + 1) // 2, dim=1, largest=False).values[:, -1:]
    # Where half of the tokens or more are on their centres to a rounding error, others tell.
    floor = torch.maximum(
        SHARE_OF_MEAN * least.mean(1, keepdim=True), SHARE_OF_ALL * distance.mean((1, 2, 3)).unsqueeze(1)
    )
    return torch.maximum(median, floor).clamp(min=SMALLEST).view(-1, 1, 1, 1) / rule.sharpness


def _assigned(distance: Tensor, allowed: Tensor, unit: Tensor) -> Tensor:
    """The share of each centre in each token, by distance: `(B, W, n, m)`, 0 where it is not allowed."""
    distance = _blocked(distance, allowed)
    further = ((distance - distance.amin(3, keepdim=True)) / unit).clamp(max=FURTHEST)
    shares = (-further).softmax(3) * allowed
    return shares / shares.sum(3, keepdim=True)
