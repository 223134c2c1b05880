"""How varied an image is: by hand, and whatever its contrast and size."""

from __future__ import annotations

import pytest
import torch

from tokencut.ops.spread import EVERY, PIECES, PIXELS, spread

SIDE = PIECES * PIXELS


def of_pieces(pieces: torch.Tensor) -> torch.Tensor:
    """An image whose counted pieces are these, `(pieces, values)`; the others are not looked at."""
    whole = torch.zeros(PIECES * PIECES, PIXELS * PIXELS)
    whole[::EVERY, : pieces.shape[1]] = pieces
    rows = whole.unflatten(0, (PIECES, PIECES)).unflatten(2, (PIXELS, PIXELS)).transpose(1, 2)
    return rows.reshape(1, 1, SIDE, SIDE)


def test_the_spread_by_hand() -> None:
    count = PIECES * PIECES // EVERY
    # Pieces of two kinds lie in one direction from their mean, of however different length.
    two = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).repeat(count // 2, 1)
    assert spread(of_pieces(two)).item() == pytest.approx(1)
    # Opposite pairs along two axes: as much in each of two directions.
    four = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]).repeat(count // 4, 1)
    assert spread(of_pieces(four)).item() == pytest.approx(2)
    assert spread(of_pieces(torch.eye(count))).item() == pytest.approx(count - 1)
    assert spread(torch.full((1, 3, 32, 32), 0.7)).item() == pytest.approx(0, abs=1e-5)


def test_it_depends_on_no_contrast_or_batch() -> None:
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    found = spread(images)
    torch.testing.assert_close(spread(0.1 * images), found, rtol=1e-3, atol=0)
    torch.testing.assert_close(spread(images[1:2]), found[1:2], rtol=1e-5, atol=0)


def test_an_image_of_another_size_is_as_varied() -> None:
    small = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sizes = [spread(torch.nn.functional.interpolate(small, side, mode="bilinear")).item() for side in (SIDE, 2 * SIDE)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
