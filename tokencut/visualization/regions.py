"""Pictures of tokens on one image: which patches are one token, which are dropped, and where attention lies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
Tokens = NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)

# Dropped patches: the photo all but gone in a dark grey, hatched, since photos have dark places of their own.
DARK, HATCH = np.array((26, 28, 34), np.float32), np.array((84, 88, 98), np.float32)
DARK_SHARE, HATCH_PERIOD, HATCH_WIDTH = 0.85, 14, 2
# Borders: a light line between dark ones can be seen on any photo, by the colour-blind too. A line is one px for each
# 20 of a patch, on either side.
CORE, EDGE = np.array((255, 255, 255), np.uint8), np.array((20, 20, 20), np.uint8)
PATCH_A_LINE = 20
# Tokens in several parts have borders in colour (light ones of Okabe and Ito's and beside them), the largest first.
PART_COLOURS = np.array(
    [
        (255, 190, 60),
        (110, 200, 255),
        (120, 230, 140),
        (255, 150, 200),
        (245, 235, 90),
        (255, 130, 90),
        (190, 160, 255),
    ],
    np.uint8,
)
# And numbers, in patches that have room for two digits.
SMALLEST_NUMBERED, DIGITS_A_PATCH, LARGEST_DIGITS = 16, 0.5, 24
# Under a heat map the photo is grey and muted, that only the heat has colour.
GREY_RANGE = (40.0, 200.0)
LUMA = np.array((0.299, 0.587, 0.114), np.float32)


@dataclass(frozen=True)
class Grid:
    """How a model cuts an image into patches.

    Attributes:
        rows: Patches from top to bottom.
        columns: Patches from left to right; a patch's number counts along the rows.
        height: A patch's height in px.
        width: A patch's width in px.
        frames: How many images stand side by side in it: the tubelets of a clip along its frames, one behind the other.
    """

    rows: int
    columns: int
    height: int
    width: int
    frames: int = 1

    @property
    def patches(self) -> int:
        """How many there are."""
        return self.rows * self.columns

    def scaled(self, side: int) -> Grid:
        """The same patches, `side` px at their longer side."""
        longer = max(self.height, self.width)
        return replace(self, height=round(self.height * side / longer), width=round(self.width * side / longer))

    def apart(self, source: Tokens) -> Tokens:
        """The same with another token in each frame, `(patches,)`: frames side by side touch in the picture alone."""
        if self.frames == 1:
            return source
        frame = np.arange(self.patches) % self.columns // (self.columns // self.frames)
        return np.where(source >= 0, source * self.frames + frame, source)

    def seen(self, photo: Pixels) -> Pixels:
        """The part of an image `(H, W, 3)` that lies in patches: models do not see a rest that fills none."""
        return photo[: self.rows * self.height, : self.columns * self.width]

    def spread(self, values: NDArray[Scalar], height: int, width: int) -> NDArray[Scalar]:
        """One value a patch, `(patches,)`, at each pixel of a seen image: `(height, width)`."""
        down, across = np.arange(height) // self.height, np.arange(width) // self.width
        return values.reshape(self.rows, self.columns)[down[:, None], across[None, :]]


def patches_held(source: Tokens) -> Tokens:
    """How many patches the token of each patch holds, `(patches,)`; 0 where it is dropped.

    Args:
        source: For each patch the token it went into, `(patches,)`, -1 where it is dropped.
    """
    held = np.bincount(source[source >= 0], minlength=1)
    return np.where(source >= 0, held[source], 0)


def parts_of(source: Tokens, grid: Grid) -> Tokens:
    """The part that each patch is in, by its first patch, `(patches,)`: patches of one token that touch by a side.

    Args:
        source: For each patch the token it went into, `(patches,)`.
        grid: The patches; those of different frames do not touch.
    """
    token = grid.apart(source).reshape(grid.rows, grid.columns)
    part = np.arange(grid.patches).reshape(grid.rows, grid.columns)
    while True:
        before = part.copy()
        for axis in (0, 1):
            one, other = _without_last(axis), _without_first(axis)
            lowest = np.where(token[one] == token[other], np.minimum(part[one], part[other]), grid.patches)
            part[one] = np.minimum(part[one], lowest)
            part[other] = np.minimum(part[other], lowest)
        if np.array_equal(part, before):
            return part.ravel()


def numbered(source: Tokens, part: Tokens) -> Tokens:
    """A number, from 1 on, for the tokens in several parts, the largest first: `(patches,)`, 0 for all others.

    Args:
        source: For each patch the token it went into, `(patches,)`, -1 where it is dropped.
        part: What `parts_of` says of it.
    """
    tokens = source[part == np.arange(len(part))]  # once a part
    several, count = np.unique(tokens[tokens >= 0], return_counts=True)
    several = several[count > 1]
    sizes = np.bincount(source[source >= 0], minlength=1)[several]
    numbers = np.zeros(max(source.max(), 0) + 1, np.int64)
    numbers[several[np.argsort(-sizes, kind="stable")]] = np.arange(1, len(several) + 1)
    return np.where(source >= 0, numbers[source], 0)


def draw_tokens(photo: Pixels, source: Tokens, grid: Grid, heat: Pixels | None = None) -> Pixels:
    """Draws what a stage left of an image.

    Merged patches are an outlined region in their mean colour, tokens of one patch stay as they are, dropped ones are
    dark and hatched. Regions that do not touch and are one token have one number, and one colour of their borders.

    Args:
        photo: `(H, W, 3)`, cut to what is seen.
        source: For each patch the token it went into, `(patches,)`, -1 where it is dropped.
        grid: The patches, in px of the photo.
        heat: Instead of mean colours, a colour for each patch with its opacity in percent, `(patches, 4)`, over the
            photo in grey; borders are white then.

    Returns:
        `(H, W, 3)`.
    """
    height, width = photo.shape[:2]
    token = grid.spread(source, height, width)
    drawn = token if grid.frames == 1 else grid.spread(grid.apart(source), height, width)
    merged = grid.spread(patches_held(source), height, width) > 1
    part = parts_of(source, grid)
    number = numbered(source, part)
    picture = _mean_colours(photo, token, merged) if heat is None else _heated(photo, heat, grid)
    _hatch(picture, token < 0)
    borders = np.broadcast_to(CORE, (grid.patches, 3))
    if heat is None:
        borders = np.where(number[:, None] > 0, PART_COLOURS[(number - 1) % len(PART_COLOURS)], CORE)
    line = max(1, round(min(grid.height, grid.width) / PATCH_A_LINE))
    colours = np.stack([grid.spread(channel, height, width) for channel in borders.T], 2)
    _outline(picture, drawn, merged, colours, line)
    return _with_numbers(picture, number, part, grid, borders)


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


def _outline(picture: Pixels, token: Tokens, merged: NDArray[np.bool_], colours: Pixels, line: int) -> None:
    """Draws the borders of merged tokens, in place: inside each a line of its colour, with dark on either side."""
    border = np.zeros(token.shape, bool)
    for axis in (0, 1):
        before, after = _without_last(axis), _without_first(axis)
        differs = (token[before] != token[after]) & (merged[before] | merged[after])
        border[before] |= differs
        border[after] |= differs
    border = _grown(border, line - 1)
    core = border & merged
    picture[_grown(border, (line + 1) // 2)] = EDGE
    picture[core] = colours[core]


def _grown(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    for _ in range(by):
        for axis in (0, 1):  # one axis after the other, for the corners too
            grown = mask.copy()
            grown[_without_last(axis)] |= mask[_without_first(axis)]
            grown[_without_first(axis)] |= mask[_without_last(axis)]
            mask = grown
    return mask


def _with_numbers(picture: Pixels, number: Tokens, part: Tokens, grid: Grid, colours: Pixels) -> Pixels:
    """The picture with the number of each part that has one, in the patch next to the part's middle."""
    side = min(grid.height, grid.width)
    if side < SMALLEST_NUMBERED or not number.any():
        return picture
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    size = min(DIGITS_A_PATCH * side, LARGEST_DIGITS)
    font = ImageFont.load_default(size)
    for first in np.unique(part[number > 0]):
        rows, columns = np.divmod(np.flatnonzero(part == first), grid.columns)
        nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        middle = ((columns[nearest] + 0.5) * grid.width, (rows[nearest] + 0.5) * grid.height)
        draw.text(
            middle, str(number[first]), fill=tuple(map(int, colours[first])), font=font, anchor="mm",
            stroke_width=max(1, round(size / 8)), stroke_fill=tuple(map(int, EDGE)),
        )  # fmt: skip
    return np.array(canvas)


def _without_last(axis: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(None, -1),)


def _without_first(axis: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(1, None),)
