"""How varied an image is, whatever its contrast and its size: images are sorted into levels of keep rates by it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# The image is looked at in so many pieces a side, of so many pixels a side.
PIECES, PIXELS = 16, 14
# Every so many of them counts.
EVERY = 4
# What their products take, of a colour image.
SPREAD_MACS = (PIECES * PIECES // EVERY) ** 2 * 3 * PIXELS**2


def spread(images: Tensor) -> Tensor:
    """In how many directions the pieces of an image lie: how many numbers it takes to tell them apart.

    Each piece counts by its direction, of length 1. With `l` the eigenvalues of their covariance this is
    `(sum l)^2 / sum l^2`: 1 where there are two kinds of pieces, as many as there are pieces less one where each is
    like no other. Why this and no other: examples/benchmarks/budgets.md.

    Args:
        images: `(B, C, H, W)`, as the model takes them.

    Returns:
        fp32 `(B,)`; next to 0 for an image of one colour.
    """
    side = PIECES * PIXELS
    pixels = images.float()
    if pixels.shape[2:] != (side, side):
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
    pieces = F.unfold(pixels, PIXELS, stride=PIXELS)[:, :, ::EVERY].transpose(1, 2)
    directions = F.normalize(pieces, dim=2)
    apart = directions - directions.mean(1, keepdim=True)
    total = apart.square().sum((1, 2))
    products = apart @ apart.transpose(1, 2)
    return total.square() / products.square().sum((1, 2)).clamp(min=1e-12)
