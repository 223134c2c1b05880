"""Pooling that timm does not have, in the place where its Vision Transformers keep their attention pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassAndMean(nn.Module):
    """The class token beside the mean of the image tokens, as transformers' DINOv2 classifiers see them.

    Holds no parameter. It takes the place of `attn_pool` in timm's `VisionTransformer`, with `pool_include_prefix` on,
    and the classifier behind it is twice as wide.
    """

    def __init__(self, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, features: Tensor, counts: Tensor | None = None) -> Tensor:
        """Pools tokens.

        Args:
            features: `(B, P + N, D)`, the class token first.
            counts: `(B, N)`, how many patches each image token holds; one each where None.

        Returns:
            `(B, 2 D)`.
        """
        patches = features[:, self.num_prefix_tokens :]
        mean = patches.mean(1) if counts is None else weighted_mean(patches, counts)
        return torch.cat((features[:, 0], mean), 1)


def weighted_mean(features: Tensor, counts: Tensor) -> Tensor:
    """The mean of tokens `(B, N, D)`, each counted as `counts`, `(B, N)`, says: `(B, D)`."""
    # While training all tokens of an image may be hidden; nothing is then averaged to 0.
    share = counts / counts.sum(1, keepdim=True).clamp(min=1.0)
    return (features.float() * share.unsqueeze(2)).sum(1).to(features.dtype)  # half precision cannot hold the sum
