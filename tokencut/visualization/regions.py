"""Pictures of tokens on one image: which patches are one token, which are dropped, and where attention lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Tokens = NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)

# Dropped patches: the photo all but gone in a dark grey, hatched, since photos have dark places of their own.
DARK, HATCH = np.array((26, 28, 34), np.float32), np.array((84, 88, 98), np.float32)
DARK_SHARE, HATCH_PERIOD, HATCH_WIDTH = 0.85, 14, 2
# Borders: a light line between dark ones can be seen on any photo, by the colour-blind too.
CORE, EDGE = np.array((255, 255, 255), np.uint8), np.array((20, 20, 20), np.uint8)
# Under a heat map the photo is grey and muted, that only the heat has colour.
GREY_RANGE = (40.0, 200.0)
LUMA = np.array((0.299, 0.587, 0.114), np.float32)


@dataclass(frozen=True)
class Grid:
    """How a model cuts an image into patches.

    Attributes:
        rows: Patches from top to bottom.
        columns: Patches from left to right; a patch's number counts along the rows.
        height: A patch's height in px of the image.
        width: A patch's width in px.
    """

    rows: int
    columns: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """How many there are."""
        return self.rows * self.columns

    def seen(self, photo: Pixels) -> Pixels:
        """The part of an image `(H, W, 3)` that lies in patches: models do not see a rest that fills none."""
        return photo[: self.rows * self.height, : self.columns * self.width]

    def spread(self, values: NDArray[Scalar], height: int, width: int) -> NDArray[Scalar]:
        """One value a patch, `(patches,)`, at each pixel of a seen image: `(height, width)`."""
        down, across = np.arange(height) // self.height, np.arange(width) // self.width
        return values.reshape(self.rows, self.columns)[down[:, None], across[None, :]]


def enlarge(pixels: NDArray[Scalar], scale: int) -> NDArray[Scalar]:
    """Each pixel as `scale` x `scale` px, so that patches keep sharp edges."""
    return pixels.repeat(scale, 0).repeat(scale, 1)


def patches_held(source: Tokens) -> Tokens:
    """How many patches the token of each patch holds, `(patches,)`; 0 where it is dropped.

    Args:
        source: For each patch the token it went into, `(patches,)`, -1 where it is dropped.
    """
    held = np.bincount(source[source >= 0], minlength=1)
    return np.where(source >= 0, held[source], 0)


def draw_tokens(photo: Pixels, source: Tokens, grid: Grid, scale: int, heat: Pixels | None = None) -> Pixels:
    """Draws what a stage left of an image.

    Merged patches are an outlined region in their mean colour, tokens of one patch stay as they are, dropped ones are
    dark and hatched.

    Args:
        photo: `(H, W, 3)`, cut to what is seen.
        source: For each patch the token it went into, `(patches,)`, -1 where it is dropped.
        grid: The patches.
        scale: Pixels of the picture a pixel of the photo.
        heat: Instead of mean colours, a colour for each patch with its opacity in percent, `(patches, 4)`, over the
            photo in grey.

    Returns:
        `(scale * H, scale * W, 3)`.
    """
    height, width = photo.shape[:2]
    token = grid.spread(source, height, width)
    merged = grid.spread(patches_held(source), height, width) > 1
    filled = _mean_colours(photo, token, merged) if heat is None else _heated(photo, heat, grid)
    picture, token = enlarge(filled, scale), enlarge(token, scale)
    _hatch(picture, token < 0)
    _outline(picture, token, enlarge(merged, scale))
    return picture


def _mean_colours(photo: Pixels, token: Tokens, merged: NDArray[np.bool_]) -> Pixels:
    """The photo with the pixels of each merged token in their mean colour."""
    filled = photo.copy()
    inside = token[merged]
    if not inside.size:
        return filled
    pixels = photo[merged]
    count = np.maximum(np.bincount(inside), 1)
    sums = np.stack([np.bincount(inside, pixels[:, channel]) for channel in range(3)], 1)
    filled[merged] = (sums / count[:, None]).round().astype(np.uint8)[inside]
    return filled


def _heated(photo: Pixels, heat: Pixels, grid: Grid) -> Pixels:
    low, high = GREY_RANGE
    grey = (photo @ LUMA) * ((high - low) / 255) + low
    colours = np.stack([grid.spread(channel, *grey.shape) for channel in heat.T], 2).astype(np.float32)
    opacity = colours[..., 3:] / 100
    return (colours[..., :3] * opacity + grey[..., None] * (1 - opacity)).round().astype(np.uint8)


def _hatch(picture: Pixels, dropped: NDArray[np.bool_]) -> None:
    """Darkens what was dropped, in place."""
    if not dropped.any():
        return
    down, across = np.nonzero(dropped)
    pixels = picture[down, across] * (1 - DARK_SHARE) + DARK * DARK_SHARE
    pixels[(down + across) % HATCH_PERIOD < HATCH_WIDTH] = HATCH
    picture[down, across] = pixels.round().astype(np.uint8)


def _outline(picture: Pixels, token: Tokens, merged: NDArray[np.bool_]) -> None:
    """Draws the borders of merged tokens, in place: two pixels of light between two of dark."""
    core = np.zeros(token.shape, bool)
    for axis in (0, 1):
        before, after = _without_last(axis), _without_first(axis)
        differs = (token[before] != token[after]) & (merged[before] | merged[after])
        core[before] |= differs
        core[after] |= differs
    edge = core.copy()
    for axis in (0, 1):  # one axis after the other, for the corners too
        grown = edge.copy()
        grown[_without_last(axis)] |= edge[_without_first(axis)]
        grown[_without_first(axis)] |= edge[_without_last(axis)]
        edge = grown
    picture[edge] = EDGE
    picture[core] = CORE


def _without_last(axis: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(None, -1),)


def _without_first(axis: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(1, None),)
