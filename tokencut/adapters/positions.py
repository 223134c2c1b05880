"""Where tokens are: positions that travel with them, and what counts as the position of several patches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokencut.adapters.columnar import ColumnarAdapter
from tokencut.attention import TimmModule
from tokencut.errors import ModelError
from tokencut.ops.ranking import take
from tokencut.tokens import Tokens

# Where a token is that holds several patches: at their mean position, at the patch nearest to it, or at its first
# patch; or it has the average of what its patches would have.
POSITION_RULES = ("centroid", "nearest", "first", "average")
_BY_PATCHES = ("first", "average")


class PositionedAdapter(ColumnarAdapter):
    """A columnar model whose attention asks where tokens are.

    Attributes:
        position_rule: One of `POSITION_RULES`.
    """

    position_rule: str = "centroid"

    def follows_patches(self, model: TimmModule) -> bool:
        return self.position_rule in _BY_PATCHES

    def located(self, model: TimmModule, features: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Tokens:
        """The tokens entering the first block, where they are.

        Args:
            model: The model.
            features: `(B, P + N, D)`.
            grid: Rows and columns of patches.
            kept: Which patches patch dropout has left, `(B, N)`; None for all.
        """
        positions = grid_positions(grid, features.device).expand(features.shape[0], -1, -1)
        if kept is not None:
            positions = take(positions, kept)
        return replace(Tokens(features, self.num_prefix_tokens(model)), positions=positions, grid=grid)

    def places(self, tokens: Tokens) -> Tensor:
        """Where tokens are by `position_rule`, unless that is `average`: fp32 `(B, N, 2)`."""
        assert tokens.positions is not None and tokens.grid is not None
        if self.position_rule == "first":
            patches = grid_positions(tokens.grid, tokens.positions.device)
            return patches[first_patches(self._source(tokens), tokens.count)]
        return tokens.positions.round() if self.position_rule == "nearest" else tokens.positions

    def shares(self, tokens: Tokens) -> Tensor | None:
        """What each patch counts for in a token, fp32 `(B, N, patches)`, where `position_rule` is `average`."""
        return patch_shares(self._source(tokens), tokens.count) if self.position_rule == "average" else None

    def _source(self, tokens: Tokens) -> Tensor:
        source, grid = tokens.source, tokens.grid
        assert grid is not None
        if source is None or source.shape[1] != grid[0] * grid[1]:
            raise ModelError(f"position_rule {self.position_rule!r} follows all patches of an image, and some were "
                             "left out before the first block; give 'centroid'")  # fmt: skip
        return source


def grid_positions(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Rows and columns of a grid's patches, fp32 `(patches, 2)`, row by row."""
    lines = [torch.arange(count, dtype=torch.float32, device=device) for count in grid]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, 1)


def first_patches(source: Tensor, count: int) -> Tensor:
    """The first patch of each token, int64 `(B, M)`.

    Args:
        source: `Tokens.source`, `(B, patches)`.
        count: `M`.
    """
    patches = source.shape[1]
    slot = torch.where(source < 0, count, source)
    numbers = torch.arange(patches, device=source.device).expand_as(source)
    firsts = torch.full((source.shape[0], count + 1), patches - 1, device=source.device)
    return firsts.scatter_reduce(1, slot, numbers, "amin")[:, :count]


def patch_shares(source: Tensor, count: int) -> Tensor:
    """What each patch counts for in a token's average over its patches, fp32 `(B, M, patches)`.

    Args:
        source: `Tokens.source`, `(B, patches)`.
        count: `M`.
    """
    inside = (source.unsqueeze(1) == torch.arange(count, device=source.device).view(1, -1, 1)).float()
    return inside / inside.sum(2, keepdim=True).clamp(min=1.0)
