"""Small models of the hierarchical families, in whose third stages every case of windows occurs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tokencut.adapters import adapter_for

SWIN = {"embed_dim": 16, "depths": (1, 1, 4, 1), "num_heads": (1, 1, 2, 2), "num_classes": 5, "window_size": 4}

PVT = {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 4, 1), "num_heads": (1, 1, 2, 2), "num_classes": 5}


def _taking(height: int, width: int) -> dict[str, Any]:
    """What tells timm of images where no part of the model does."""
    return {"pretrained_cfg_overlay": {"input_size": (3, height, width)}}


# timm's name and arguments: whole windows; windows that the grid doesn't fill; one window; no square of anything.
SMALL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 128}),
    "swin padded": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": (96, 144)}),
    "swin one window": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 64, "window_size": 7}),
    "swin oblong": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": (80, 112), "window_size": (3, 5)}),
    "swin any size": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 96, "dynamic_img_size": True}),
    "swin v2": ("swinv2_tiny_window8_256", {**SWIN, "img_size": 128}),
    "swin v2 padded": ("swinv2_tiny_window8_256", {**SWIN, "img_size": (96, 144), "pretrained_window_sizes": (3,) * 4}),
    "swin v2 cr": ("swinv2_cr_tiny_224", {**SWIN, "img_size": (96, 144)}),
    "pvt": ("pvt_v2_b3", {**PVT, **_taking(96, 96)}),
    "pvt oblong": ("pvt_v2_b5", {**PVT, **_taking(64, 108)}),
    "pvt windows": ("pvt_v2_b2", {**PVT, "sr_ratios": (8, 4, 1, 1), **_taking(64, 352)}),
    "pvt linear": ("pvt_v2_b2_li", {**PVT, **_taking(96, 96)}),
}


def small(case: str, **others: Any) -> Any:
    """A model in eval mode whose every part does something, so that no error hides; with other arguments of timm's."""
    name, args = SMALL[case]
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=0.0, **{**args, **others}).eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if label.endswith("weight") and parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            elif "table" in label:
                nn.init.normal_(parameter)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def images(model: Any, batch: int = 3) -> Tensor:
    size = adapter_for(model).input_size(model)
    assert size is not None
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
