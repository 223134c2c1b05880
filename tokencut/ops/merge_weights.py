"""What a token counts for when it is merged with others."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT_KINDS = ("equal", "size", "attention", "product")


def raw_weights(kind: str, sizes: Tensor, attention: Tensor | None) -> Tensor:
    """Merge weights of the image tokens, before they are divided by their sum in a group.

    Args:
        kind: `equal` (every token alike), `size` (every patch alike), `attention` (class attention), or `product` of
            size and attention.
        sizes: Patches held by each token, fp32 `(B, N)`.
        attention: Class attention, fp32 `(B, N)`; None will do for `equal` and `size`.

    Returns:
        fp32 `(B, N)`, not negative.
    """
    if kind == "equal":
        return torch.ones_like(sizes)
    if kind == "size":
        return sizes
    assert attention is not None, f"merge weights {kind!r} need class attention"
    return attention if kind == "attention" else attention * sizes
