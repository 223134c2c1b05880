"""Groups of tokens that are alike in a grid, each around one of a cell, as in arXiv 2303.17604.

One token of each square cell stays, another one in each turn; of the others those go that are most like one of these,
into that one's group. Tokens are compared inside tiles of the grid, so that the work grows with the grid and not with
its square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.ops.constants import is_traced
from tokencut.ops.exporting import numbers, pick, running, whole
from tokencut.ops.grouping import GridGroups
from tokencut.ops.ranking import highest, marked, take_rows

# Tokens are compared with those of their own tile, of so many rows and columns or fewer.
TILE = 16
# More than two cosines are apart; and the square of a length that tokens of zeros have.
APART, SMALLEST = 3.0, 1e-24


@dataclass(frozen=True)
class _Layout:
    """Which tokens of a grid are compared with which.

    Attributes:
        staying: The tokens of each tile that stay whatever they are like, `(tiles, T)`; the last stands again where a
            tile has fewer.
        members: All tokens of each tile likewise, `(tiles, S)`.
        place: Where in these each token is, `(N,)`.
        stays: Which tokens are in `staying`, fp32 `(N,)`, 1 or 0.
    """

    staying: Tensor
    members: Tensor
    place: Tensor
    stays: Tensor


def grid_groups(x: Tensor, rows: int, columns: int, count: int, turn: int) -> GridGroups:
    """Groups tokens around one of each cell.

    Args:
        x: Tokens in raster order, `(B, N, D)`; compared by cosine, in fp32.
        rows: Rows of their grid.
        columns: Columns.
        count: `M`, how many groups.
        turn: Which token of each cell stays: the cells of successive turns have another each.
    """
    x, side, tiled = x.float(), spacing(rows, columns, count), _tiled(rows, columns, count)
    make = _made if is_traced() else _kept
    layout = make(rows, columns, side, tiled, turn % side**2, whole(), x.device)
    partners = F.normalize(_rows(x, layout.staying), dim=3)
    candidates = _rows(x, layout.members) if len(layout.members) > 1 else x.unsqueeze(1)
    similarity = torch.matmul(candidates, partners.transpose(2, 3))
    # argmax is documented to return the first of equal maxima.
    nearest = similarity.argmax(3).to(whole())
    nearest = nearest + layout.staying.shape[1] * numbers(nearest, nearest.shape[1]).view(1, -1, 1)
    joined, alike = pick(_of_each(layout.staying, x), nearest.flatten(1)), similarity.amax(3).flatten(1)
    if len(layout.members) > 1:
        place = _of_each(layout.place, x)
        joined, alike = pick(joined, place), pick(alike, place)
    alike = alike * x.square().sum(2).clamp(min=SMALLEST).rsqrt()
    stays = highest(APART * layout.stays - alike, count)
    kept = marked(stays, rows * columns)
    left = torch.where(kept, numbers(x, rows * columns), joined)
    # Those kept before it: of an image of no numbers too a group that there is.
    return GridGroups(pick(running(kept) - kept.to(whole()), left), stays)


def grid_groups_macs(rows: int, columns: int, count: int, width: int) -> int:
    """Multiply-adds of `grid_groups` per image, for features of `width` numbers."""
    side, tiled = spacing(rows, columns, count), _tiled(rows, columns, count)
    layout = _kept(rows, columns, side, tiled, 0, torch.int64, torch.device("cpu"))
    return layout.members.numel() * layout.staying.shape[1] * width


def spacing(rows: int, columns: int, count: int) -> int:
    """The side of a cell: about half of the groups are around a token that stays for its place alone."""
    side, tiled = max(2, math.isqrt(2 * rows * columns // count)), _tiled(rows, columns, count)
    while len(_lines(rows, side, tiled, 0)) * len(_lines(columns, side, tiled, 0)) > count:
        side += 1
    return side


def _tiled(rows: int, columns: int, count: int) -> bool:
    """Whether the grid is cut into tiles: not where there are fewer groups than those."""
    return math.ceil(rows / TILE) * math.ceil(columns / TILE) <= count


def _parts(size: int, number: int) -> list[tuple[int, int]]:
    """The beginnings and ends of so many parts of about the same length."""
    return list(pairwise(part * size // number for part in range(number + 1)))


def _cut(size: int, tiled: bool) -> list[tuple[int, int]]:
    """The rows, or columns, of the tiles."""
    return _parts(size, math.ceil(size / TILE) if tiled else 1)


def _lines(size: int, side: int, tiled: bool, step: int) -> list[int]:
    """The rows, or columns, in which tokens stay: one in each cell, `step` behind its first or its last."""
    return [
        min(begin + first + step, begin + last - 1)
        for begin, end in _cut(size, tiled)
        for first, last in _parts(end - begin, math.ceil((end - begin) / side))
    ]


def _kept_places(rows: int, columns: int, side: int, tiled: bool, turn: int) -> set[int]:
    """The tokens that stay: along the diagonal of cells from turn to turn, then along the next."""
    down, across = turn % side, (turn + turn // side) % side
    lines = _lines(rows, side, tiled, down), _lines(columns, side, tiled, across)
    return {row * columns + column for row in lines[0] for column in lines[1]}


def _made(
    rows: int, columns: int, side: int, tiled: bool, turn: int, dtype: torch.dtype, device: torch.device
) -> _Layout:
    kept = _kept_places(rows, columns, side, tiled, turn)
    staying, members = [], []
    for top, bottom in _cut(rows, tiled):
        for left, right in _cut(columns, tiled):
            places: list[int] = []
            for row in range(top, bottom):
                places.extend(range(row * columns + left, row * columns + right))
            members.append(places)
            staying.append([place for place in places if place in kept])
    most = max(len(places) for places in members)
    found = {place: tile * most + at for tile, places in enumerate(members) for at, place in enumerate(places)}
    return _Layout(
        _padded(staying).to(device, dtype),
        _padded(members).to(device, dtype),
        torch.tensor([float(found[place]) for place in range(rows * columns)]).to(device, dtype),
        torch.tensor([float(place in kept) for place in range(rows * columns)]).to(device),
    )


@cache  # a dozen of small tensors for each grid; CUDA graphs go on reading them
def _kept(
    rows: int, columns: int, side: int, tiled: bool, turn: int, dtype: torch.dtype, device: torch.device
) -> _Layout:
    # Made in a forward without gradients it would be no good for training.
    with torch.inference_mode(mode=False), torch.no_grad():
        return _made(rows, columns, side, tiled, turn, dtype, device)


def _padded(listed: list[list[int]]) -> Tensor:
    """Lists of numbers as rows; the last number of each stands again where it is shorter than another."""
    most = max(len(places) for places in listed)
    rows = [[float(place) for place in (places + most * places[-1:])[:most]] for places in listed]
    return torch.tensor(rows)  # graphs that are exported hold no whole numbers of 64 bits


def _of_each(places: Tensor, like: Tensor) -> Tensor:
    """The same tokens of each image, `(B, n)`."""
    return places.flatten().expand(like.shape[0], -1)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """The tokens `(B, N, D)` at `(tiles, n)`, `(B, tiles, n, D)`."""
    return take_rows(x, _of_each(places, x)).unflatten(1, tuple(places.shape))
