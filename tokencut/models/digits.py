"""The bundled `digits`: a small ViT and the images it was trained and is judged on, so that every command runs offline.

The images are scikit-learn's handwritten digits, 1,797 of 8 x 8 pixels: 600 for testing, 1,197 for training.
`examples/train_digits.py` trains the model, on the training images alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencut.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

# The split: TEST_IMAGES of the 1,797, drawn by `stratified` from SEED.
SEED = 0
TEST_IMAGES = 600
LABELS = tuple("0123456789")

WEIGHTS = Path(__file__).parents[1] / "assets" / "digits.safetensors"
CONFIG = WEIGHTS.with_suffix(".json")


def stratified(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Draws `count` images so that every class has its share of them.

    The draw goes by a hash of the seed and the image's number, so no library's random generator can ever change it.

    Args:
        labels: The class of every image.
        count: How many images to draw.
        seed: Another seed, another draw.

    Returns:
        The drawn images' numbers in `labels`, ascending.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    # A class gets the whole part of its share; the rest goes, one each, to the largest fractions, then the lower class.
    shares = {label: divmod(len(members[label]) * count, len(labels)) for label in sorted(members)}
    quota = {label: whole for label, (whole, _) in shares.items()}
    for label in sorted(shares, key=lambda label: -shares[label][1])[: count - sum(quota.values())]:
        quota[label] += 1

    def draw_order(index: int) -> str:
        return hashlib.sha256(f"{seed}:{index}".encode()).hexdigest()

    return sorted(index for label in members for index in sorted(members[label], key=draw_order)[: quota[label]])


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


def config() -> dict[str, Any]:
    """What the bundled model is, in the form of timm's `local-dir:` config: architecture, arguments, preprocessing."""
    described: dict[str, Any] = json.loads(CONFIG.read_text(encoding="utf-8"))
    return described


def create(pretrained: bool = True) -> nn.Module:
    """Builds the bundled ViT: 12 blocks, a class token and 64 image tokens, for 10 classes.

    Args:
        pretrained: Whether to load the bundled weights, strictly, or leave random ones.

    Returns:
        timm's own model in eval mode; its `pretrained_cfg` holds the preprocessing and the label names.
    """
    import timm

    described = config()
    preprocessing = described["pretrained_cfg"]
    model: nn.Module = timm.create_model(
        described["architecture"],
        # As timm reads a `local-dir:` config: the label names move in, and the size, a list in JSON, is a tuple.
        pretrained_cfg={
            **preprocessing,
            "input_size": tuple(preprocessing["input_size"]),
            "label_names": described["label_names"],
        },
        checkpoint_path=WEIGHTS if pretrained else None,
        num_classes=described["num_classes"],
        **described["model_args"],
    )
    return model.eval()
