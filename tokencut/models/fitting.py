"""Weights from elsewhere into a timm model that differs from the one they were made for: channels and classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from timm.models import adapt_input_conv
from torch import Tensor, nn

from tokencut.models.checkpoints import load_strictly
from tokencut.models.pretrained_cfg import class_count, description_of


def load_adapted(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Loads weights strictly, save that the first convolution is adapted to the model's channels, as timm does it, and
    that a head of another number of classes stays as it is.

    Args:
        model: A timm model whose description says how many classes the weights are for.
        tensors: By timm's names.
        path: Where they were read from, for messages.

    Raises:
        ModelError: They are not the model's.
    """
    own, ready = model.state_dict(), dict(tensors)
    for name in _listed(description_of(model).get("first_conv")):
        key = f"{name}.weight"
        if key in ready and key in own and ready[key].shape[1] != own[key].shape[1] and ready[key].ndim == 4:
            ready[key] = adapt_input_conv(own[key].shape[1], ready[key], base_chans=ready[key].shape[1])
    if class_count(model) != description_of(model).get("num_classes"):
        for name in _listed(description_of(model).get("classifier")):
            for key in (f"{name}.weight", f"{name}.bias"):
                ready.pop(key, None)
                if key in own:
                    ready[key] = own[key]
    load_strictly(model, ready, path)


def _listed(names: object) -> tuple[str, ...]:
    """timm's description has one name, or several."""
    if isinstance(names, str):
        return (names,)
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()
