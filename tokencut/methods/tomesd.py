"""Tokens that are alike share a run of each block's MLP, and all of them stay: after ToMe for Stable Diffusion."""

from __future__ import annotations

from dataclasses import dataclass

from tokencut.methods.base import Method, StageInput, StageShape, register
from tokencut.ops.grid_groups import grid_groups, grid_groups_macs
from tokencut.ops.grouping import GridGroups


@register
@dataclass(frozen=True)
class ToMeSD(Method):
    """Before each block tokens that are alike are grouped; the MLP runs once for each group, on the token that stays
    for it, and all its tokens get what comes of that. None goes away, so windows, shifts and convolutions stay as they
    are.

    One token of each square of a few stays, another in each block, and others go into the group of the most similar of
    these, the most similar first. As published, but that the square's token is not drawn at random; and that attention,
    whose neighbours differ by their places too, looks at all tokens.
    """

    name = "tomesd"
    source = "arXiv 2303.17604"
    prop_attn = False
    keeps_grid = True
    each_block = True

    def decide(self, stage_input: StageInput, budget: int) -> GridGroups:
        tokens = stage_input.tokens
        assert tokens.windows is not None
        turn = 0 if tokens.grouped is None or tokens.grouped.groups is None else tokens.grouped.turn + 1
        return grid_groups(tokens.image, tokens.windows.rows, tokens.windows.columns, budget, turn)

    def macs(self, shape: StageShape) -> int:
        return grid_groups_macs(*shape.grid, shape.budget, shape.width)

    def reads_attention(self) -> bool:
        return False

    def merges(self) -> bool:
        return True
