"""Models for tests of evaluation: a small ViT, and one whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn


def small_model(classes: int = 3, labels: list[str] | None = None) -> Any:
    """A ViT of 4 image tokens, random but always the same."""
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit", img_size=32, num_classes=classes)
    if classes:  # a random head gives logits too alike to tell a wrong image by
        model.head.weight.data.mul_(20)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": labels}
    return model


class Answers(nn.Module):
    """Answers each image, from its mean brightness, by given logits."""

    def __init__(self, answer: Callable[[Tensor], Tensor], classes: int) -> None:
        super().__init__()
        self.answer = answer
        self.num_classes = classes
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(images.mean(dim=(1, 2, 3)))


def black_or_not() -> Answers:
    """Answers black with class 0 and any other grey with class 1, by logits of 1 and 0."""
    return Answers(lambda level: torch.stack([level == 0, level > 0], dim=1).float(), 2)
