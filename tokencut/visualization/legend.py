"""The legend of a picture of tokens: a sample of whatever is in it, drawn as the panels are."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tokencut.visualization.grid import Panel
from tokencut.visualization.regions import (
    SMALLEST_NUMBERED,
    Grid,
    Pixels,
    draw_tokens,
    numbered,
    parts_of,
    patches_held,
)
from tokencut.visualization.saving import heat_colours
from tokencut.visualization.stage_views import DrawnModel

MERGED, MERGED_COLOUR = "outlined: merged, one token", "outlined: merged, one token, in its mean colour"
PARTS, PARTS_COLOUR = "same number: parts of one token", "same colour: parts of one token"
ALONE, DROPPED = "plain: a token of one patch", "dark: dropped"
HEAT = "class attention on tokens that entered, least to most"
# A photo of nothing, from warm to cool.
WARM, COOL = np.array((214, 128, 66)), np.array((72, 132, 190))


def legend_of(models: Iterable[DrawnModel], grid: Grid, side: int) -> list[Panel]:
    """A sample of everything that panels of these models show, with what it means; nothing where nothing is reduced.

    Args:
        models: What was done to all images.
        grid: The patches, as large as they are drawn.
        side: The samples' height in px.
    """
    stages = [stage for model in models for stage in model.stages]
    if not stages:
        return []
    hot = stages[0].heat is not None
    sources = [source for stage in stages for source in stage.source]
    held = np.unique(np.concatenate([np.unique(patches_held(source)) for source in sources]))
    found = []
    if held.max() > 1:
        found.append(Panel(_sample(side, (2, 2), [0, 0, 1, 2], hot=hot), MERGED if hot else MERGED_COLOUR))
    if any(numbered(source, parts_of(source, grid)).any() for source in sources):
        with_numbers = min(grid.height, grid.width) >= SMALLEST_NUMBERED
        meaning = PARTS if with_numbers else "" if hot else PARTS_COLOUR
        if meaning:
            found.append(Panel(_sample(side, (1, 3), [0, 1, 0], hot=hot), meaning))
    if 1 in held and not hot:
        found.append(Panel(_sample(side, (1, 1), [0], hot=hot), ALONE))
    if 0 in held:
        found.append(Panel(_sample(side, (1, 1), [-1], hot=hot), DROPPED))
    if hot:
        scale = heat_colours(np.linspace(0, 1, 4 * side))
        found.append(Panel(np.broadcast_to(scale, (side, *scale.shape)).copy(), HEAT))
    return found


def _sample(side: int, shape: tuple[int, int], source: list[int], *, hot: bool) -> Pixels:
    """A row of patches as high as they are wide, or a square of them."""
    rows, columns = shape
    patch = side // rows
    width = patch if rows > 1 else round(0.8 * patch)
    share = np.linspace(0, 1, columns * width)[None, :, None] * np.linspace(0.7, 1, rows * patch)[:, None, None]
    photo = (WARM * (1 - share) + COOL * share).round().astype(np.uint8)
    heat = None
    if hot:
        heat = np.concatenate([np.full((rows * columns, 3), 128), np.zeros((rows * columns, 1))], 1).astype(np.uint8)
    return draw_tokens(photo, np.array(source), Grid(rows, columns, patch, width), heat)
