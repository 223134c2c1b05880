"""The same image in several surroundings, some of which ask for fewer tokens than others: each keeps its label.

    whole    the image as it is
    blurred  every detail of less than a thirtieth of its side gone
    blank    half as wide and high, somewhere on a grey ground: three quarters of the tokens show nothing
    crowded  the same, on a ground of 8 x 8 pieces of other images, turned at random

Where it stands and what lies around it follow from its own pixels, so that every run makes the same images.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

KINDS = ("whole", "blurred", "blank", "crowded")
GREY = (124, 116, 104)
# A standard deviation, as a share of the image's side.
BLUR = 1 / 30
# Pieces of a crowded ground, in a row.
PIECES = 8


@dataclass(frozen=True)
class InSurroundings:
    """A transform of images, and what is done to each before.

    Attributes:
        kind: One of `KINDS`.
        transform: The model's own, from an image to a tensor of bytes.
        others: Images whose pieces make a crowded ground.
    """

    kind: str
    transform: Callable[[Image.Image], Tensor]
    others: Sequence[Image.Image]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(self.placed(image))

    def placed(self, image: Image.Image) -> Image.Image:
        """The image in its surroundings."""
        if self.kind == "whole":
            return image
        if self.kind == "blurred":
            return image.filter(ImageFilter.GaussianBlur(BLUR * max(image.size)))
        chance = np.random.default_rng(zlib.crc32(image.tobytes()))
        width, height = image.size
        place = tuple(int(chance.integers(side + 1)) for side in image.size)
        ground = Image.new("RGB", (2 * width, 2 * height), GREY).convert(image.mode)
        if self.kind == "crowded":
            self._strew(ground, chance)
        ground.paste(image, place)
        return ground

    def _strew(self, ground: Image.Image, chance: np.random.Generator) -> None:
        """Covers a ground with pieces of other images."""
        width, height = (-(-side // PIECES) for side in ground.size)
        for row in range(PIECES):
            for column in range(PIECES):
                other = self.others[int(chance.integers(len(self.others)))]
                left = int(chance.integers(max(1, other.width - width)))
                top = int(chance.integers(max(1, other.height - height)))
                piece = other.crop((left, top, left + width, top + height))
                turned = piece.rotate(90 * int(chance.integers(4))) if width == height else piece
                ground.paste(turned, (column * width, row * height))
