"""The bundled `digits`: a small ViT that comes with the package, so that every command runs offline.

`data/digits.py` has the images it was trained and is judged on; `examples/train_digits.py` trains it, on the training
images alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = Path(__file__).parents[1] / "assets" / "digits.safetensors"
CONFIG = WEIGHTS.with_suffix(".json")


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
