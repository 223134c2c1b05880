"""Clusters of each window that keep the grid, for hierarchical models: Expedit, arXiv 2210.01035."""

from __future__ import annotations

from dataclasses import dataclass

from tokencut.methods.base import Method, StageInput, StageShape, option, register
from tokencut.ops.grid_clusters import ClusterRule, GridClusters, grid_clusters, grid_pool


@register
@dataclass(frozen=True)
class Window(Method):
    """The tokens of each window are clustered softly into a smaller window; behind the blocks each gets its share back.

    The clusters stand in a regular grid, on which the model's own windows, shifts and convolutions go on. As in all
    methods the decision (which token goes into which cluster by how much, and what it takes back) is made in fp32 and
    has no gradient; what is averaged by it has one. Distances are compared with each image's own, so that the scale of
    the features changes nothing.
    """

    name = "window"
    source = "arXiv 2210.01035"
    prop_attn = False
    keeps_grid = True

    clustering: str = option(
        "soft",
        "by features; or, for comparison, plain averages of cells (pool) or the token in the middle of each (stride)",
        choices=("soft", "pool", "stride"),
    )
    reconstruct: str = option(
        "change",
        "what a token gets back: the nearest cluster's features (copy), a mixture of the nearest (softmax), or its own "
        "and what the mixture has changed by (change)",
        choices=("softmax", "copy", "change"),
    )
    nearest: int = option(2, "from how many clusters a token takes", low=1, high=1_000)
    rounds: int = option(5, "how often clusters move to the mean of their tokens", low=0, high=100)
    reach: int = option(1, "a token may join clusters so many cells away", low=0, high=1_000)
    sharpness: float = option(8.0, "how much less a cluster that is further away counts", low=1e-3, high=1e6)

    def decide(self, stage_input: StageInput, budget: int) -> GridClusters:
        windows = stage_input.tokens.windows
        assert windows is not None
        smaller = windows.with_count(budget)
        change, nearest = self.reconstruct == "change", 1 if self.reconstruct == "copy" else self.nearest
        features = stage_input.tokens.image.float()
        if self.clustering != "soft":
            return grid_pool(features, windows, smaller, nearest, change, strided=self.clustering == "stride")
        rule = ClusterRule(self.rounds, self.reach, self.sharpness, nearest)
        return grid_clusters(features, windows, smaller, rule, change)

    def macs(self, shape: StageShape) -> int:
        # Merging and giving back; before that the products of all pairs of points, which each round mixes, and the end.
        places, left = shape.places, shape.places_left
        macs = 2 * places * left * shape.width
        if self.clustering == "soft":
            macs += places * places * (shape.width + (self.rounds + 1) * left)
        return shape.windows * macs

    def reads_attention(self) -> bool:
        return False

    def merges(self) -> bool:
        return True
