"""The images that the bundled `digits` model was trained and is judged on: scikit-learn's handwritten digits.

They are 1,797 of 8 x 8 pixels: 600 for testing, 1,197 for training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokencut.data.sampling import stratified
from tokencut.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image

# The split: TEST_IMAGES of the 1,797, drawn by `stratified` from SEED.
SEED = 0
TEST_IMAGES = 600
LABELS = tuple("0123456789")


def images(split: str) -> tuple[list[Image.Image], list[int]]:
    """The handwritten digits as pictures.

    Args:
        split: `"train"` (1,197 images) or `"test"` (600).

    Returns:
        The images, RGB of 8 x 8 pixels, and the class of each (0 to 9), in scikit-learn's order.

    Raises:
        UsageError: There is no such split.
        DataError: scikit-learn, which holds the images, is not installed.
    """
    if split not in ("train", "test"):
        raise UsageError(
            f"unknown split {split!r} of the digits, expected 'train' or 'test'; type digits.images('test')"
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits images come with scikit-learn, which is not installed; type pip install 'tokencut[digits]'"
        ) from error
    from PIL import Image

    bunch = load_digits()
    labels = [int(label) for label in bunch.target]
    test = set(stratified(labels, TEST_IMAGES, SEED))
    chosen = [index for index in range(len(labels)) if (index in test) == (split == "test")]
    # Ink is counted from 0 to 16 in the source; 16 becomes 255.
    grey = (bunch.images * (255 / 16)).round().astype("uint8")
    return [Image.fromarray(grey[index]).convert("RGB") for index in chosen], [labels[index] for index in chosen]
