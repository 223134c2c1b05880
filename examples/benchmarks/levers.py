"""What else was tried for bat's defaults: a method with the levers that lost, judged as `defaults` judges bat.

    python examples/benchmarks/run.py levers local-dir:FOLDER --data train.tar --keep 0.7 0.5 0.3 --grid spatial=0,0.05

Where all levers are left alone the method decides as `bat` does. Its settings are the levers of the published methods:
densities relative to the image's mean distance, merge costs that count sizes (arXiv 2505.15160), rounds of k-means, a
spatial term (arXiv 2308.01045), scores that class attention raises, and averages by other powers of size.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import defaults
import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.methods import (
    Grouping,
    Method,
    StageInput,
    StageShape,
    group_average,
    membership,
    option,
    ordered_average,
    ranking,
    register,
    squared_distances,
    windows,
)

GRID = ("density=scale_free,relative", "size_aware=0,1", "rounds=0,1", "spatial=0,0.05", "attention=0,0.1")
KINDS = ("unit", "tokens", "normed", "keys", "layer_norm")
DENSITIES = ("scale_free", "relative")


@dataclass(frozen=True)
class Levers(Method):
    """Density peaks with the levers that were tried."""

    name = "levers"
    source = "examples/benchmarks/defaults.md"
    prop_attn = True

    features: str = option("unit", "what is compared", choices=KINDS)
    density: str = option("scale_free", "by a power of the distance, or by a share of the mean", choices=DENSITIES)
    balance: float = option(0.5, "what density counts against separation", low=0.0)
    neighbours: int = option(3, "nearest tokens that count for a density", low=2)
    mass: float = option(0.125, "power of its size by which a token is denser", low=0.0)
    attention: float = option(0.0, "power of class attention by which a token is more of a centre", low=0.0)
    window: int = option(128, "tokens compared with each other", low=4)
    size_aware: int = option(0, "1: sizes count in separation; 2: and in which centre is joined", low=0, high=2)
    rounds: int = option(0, "rounds of k-means behind the clustering", low=0)
    spatial: float = option(0.0, "what places count beside features, both relative to their means", low=0.0)
    weight_power: float = option(1.0, "power of its size that a member is weighed by", low=0.0)
    keep_norm: bool = option(True, "whether merged tokens stay as long as they were")

    def decide(self, stage_input: StageInput, budget: int) -> Grouping:
        sizes, points = stage_input.tokens.known_sizes(), self._points(stage_input).float()
        batch, count = sizes.shape
        parts = windows(count, budget, self.window)
        apart = [values.unflatten(1, (parts, -1)).flatten(0, 1) for values in (points, sizes)]
        distances = squared_distances(apart[0])
        if self.spatial:
            places = _places(stage_input.tokens.source, sizes).unflatten(1, (parts, -1)).flatten(0, 1)
            distances = _relative(distances) + self.spatial * _relative(squared_distances(places))
        centres, joining = self._centres(stage_input, distances, apart[1], budget)
        itself = torch.arange(distances.shape[1], device=distances.device)
        nearest = joining.masked_fill(~centres.view(batch * parts, 1, -1), torch.inf).min(2).indices
        joined = torch.where(centres.view(batch * parts, -1), itself, nearest).view(batch, parts, -1)
        joined = joined + torch.arange(0, count, count // parts, device=joined.device).unsqueeze(1)
        group = (centres.long().cumsum(1) - 1).gather(1, joined.view(batch, count))
        for _ in range(self.rounds):
            group = torch.where(centres, group, _nearest_mean(points, group, sizes, budget, parts))
        found = ordered_average(group, sizes**self.weight_power, sizes, budget)
        return Grouping(found.group, found.weight, budget, found.sizes, ordered=True, keep_norm=self.keep_norm)

    def _points(self, stage_input: StageInput) -> Tensor:
        if self.features == "layer_norm":
            tokens = stage_input.tokens.image.float()
            return F.layer_norm(tokens, tokens.shape[-1:])
        return stage_input.features(self.features)

    def _centres(self, stage_input: StageInput, distances: Tensor, sizes: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Which tokens are centres, bool `(B, N)`, and the cost of joining each, `(B * parts, n, n)`."""
        batch, count = stage_input.tokens.known_sizes().shape
        others = distances + torch.diag(torch.full_like(distances[0, 0], torch.inf))
        near = others.topk(self.neighbours - 1, dim=2, largest=False).values.sum(2) / self.neighbours
        if self.density == "relative":
            density = -self.balance * near / distances.mean((1, 2)).unsqueeze(1)
        else:
            density = -0.5 * self.balance * torch.maximum(near, 1e-5 * near.mean(1, keepdim=True)).log()
        density = density + self.mass * sizes.log()
        order = ranking(density)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.zeros_like(order).scatter(1, order, places)
        cost = distances
        if self.size_aware:
            cost = distances * (sizes.unsqueeze(1) * sizes.unsqueeze(2) / (sizes.unsqueeze(1) + sizes.unsqueeze(2)))
        denser = cost.masked_fill(rank.unsqueeze(1) >= rank.unsqueeze(2), torch.inf).amin(2)
        score = density + 0.5 * denser.log()
        if self.attention:
            row = stage_input.attention.class_attention().view_as(score)
            score = score + self.attention * row.clamp(min=torch.finfo(torch.float32).tiny).log()
        score = score.masked_fill(score.isnan(), -torch.inf).masked_fill(rank == 0, torch.inf)
        chosen = ranking(score.view(batch, count))[:, :budget]
        centres = torch.zeros(batch, count, dtype=torch.bool, device=score.device).scatter(1, chosen, True)
        return centres, cost if self.size_aware == 2 else distances

    def macs(self, shape: StageShape) -> int:
        return shape.tokens**2 * shape.width

    def reads_attention(self) -> bool:
        return self.attention > 0

    def merges(self) -> bool:
        return True


def _relative(distances: Tensor) -> Tensor:
    return distances / distances.mean((1, 2), keepdim=True)


def _places(source: Tensor | None, sizes: Tensor) -> Tensor:
    """Mean row and column of each token's patches, `(B, N, 2)`, on a square grid."""
    assert source is not None, "the source map is followed where a spatial term is asked for"
    side = math.isqrt(source.shape[1])
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float().to(source.device)
    place = source.unsqueeze(2).expand(-1, -1, 2)
    sums = torch.zeros(*sizes.shape, 2, device=source.device)
    return sums.scatter_add(1, place, grid.expand(len(source), -1, -1)) / sizes.unsqueeze(2)


def _nearest_mean(points: Tensor, group: Tensor, sizes: Tensor, count: int, parts: int) -> Tensor:
    """The cluster of the same window whose mean is nearest to each point, `(B, N)`."""
    weight = group_average(group, sizes, sizes, count)
    means = torch.matmul(membership(group, count) * weight.unsqueeze(1), points)
    distances = torch.cdist(points, means)
    window = torch.arange(points.shape[1], device=points.device) // (points.shape[1] // parts)
    theirs = torch.zeros(len(group), count, dtype=torch.long, device=points.device)
    theirs = theirs.scatter(1, group, window.expand_as(group))
    return distances.masked_fill(window.view(1, -1, 1) != theirs.unsqueeze(1), torch.inf).argmin(2)


def parse() -> argparse.Namespace:
    """Reads the command line, which is that of `defaults` with a grid of levers."""
    return defaults.parse(GRID)


def main() -> None:
    """Judges every setting of the levers at every keep rate, and prints the table."""
    register(Levers)
    defaults.judge_grid("levers", parse())
