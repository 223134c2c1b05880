"""What can be told of an image before its first stage: signals of how many tokens it needs, none of which has a scale.

Distances are cosine distances between an image's tokens, behind the patch embedding (`patches`) or entering the block
of the first stage (`tokens`); `pixels: spread` is what the package takes (tokencut/ops/spread.py), before the model:

    nearest  mean distance to the nearest token, over the mean of all distances
    upper    the three quarters quantile of the same
    copies   share of tokens with another nearer than a tenth of the mean distance
    near     mean distance to the nearest token, not over anything
    spread   in how many directions tokens lie, `tr(G)^2 / |G|^2`, by the centred matrix of their products

    entropy  of the class attention in that block, over its greatest
    top      share of that attention on the quarter of the tokens that has most
    merging  mean distance from a token to what a first stage that keeps half merges it into, over the mean distance
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.attention import AttentionInfo
from tokencut.blocks import BlockLoop
from tokencut.ops.spread import spread
from tokencut.schedule import StagePlan
from tokencut.tokens import Tokens


def between(features: Tensor) -> Tensor:
    """Cosine distances between tokens, fp32 `(B, N, N)`."""
    points = F.normalize(features.float(), dim=2)
    return 1 - points @ points.transpose(1, 2)


def of_distances(distances: Tensor) -> dict[str, Tensor]:
    """The signals of an image's distances, each `(B,)`."""
    count = distances.shape[1]
    mean = distances.sum((1, 2)) / (count * (count - 1))
    nearest = (distances + 4 * torch.eye(count, device=distances.device)).amin(2)
    relative = nearest / mean.unsqueeze(1)
    rows = distances.mean(2)
    products = 0.5 * (rows.unsqueeze(2) + rows.unsqueeze(1) - distances - rows.mean(1)[:, None, None])
    trace = products.diagonal(dim1=1, dim2=2).sum(1)
    return {
        "nearest": relative.mean(1),
        "upper": relative.quantile(0.75, 1),
        "copies": (relative < 0.1).float().mean(1),
        "near": nearest.mean(1),
        "spread": trace.square() / products.square().sum((1, 2)),
    }


def of_attention(attention: Tensor) -> dict[str, Tensor]:
    """The signals of the class attention of image tokens, `(B, N)`, each `(B,)`."""
    share = attention / attention.sum(1, keepdim=True)
    count = share.shape[1]
    entropy = -(share * share.clamp(min=1e-12).log()).sum(1) / math.log(count)
    return {"entropy": entropy, "top": share.topk(max(1, count // 4), dim=1).values.sum(1)}


class _Merged:
    """Keeps what a stage did."""

    def stage(self, plan: StagePlan, entering: Tokens, leaving: Tokens, attention: AttentionInfo) -> None:
        assert leaving.source is not None
        width = leaving.features.shape[2]
        into = leaving.image.gather(1, leaving.source.clamp(min=0).unsqueeze(2).expand(-1, -1, width))
        self.apart = 1 - torch.cosine_similarity(entering.image.float(), into.float(), dim=2)

    def block(self, number: int, tokens: Tokens) -> None:
        """Takes no note."""


def of_image(loop: BlockLoop, pixels: Tensor, embedded: Tokens, entering: Tokens, first: int) -> dict[str, Tensor]:
    """All signals of a batch, each `(B,)`.

    Args:
        loop: The model.
        pixels: The images as it takes them.
        embedded: The tokens behind its patch embedding, with their source map.
        entering: Those that enter the block of the first stage.
        first: That block's 1-based number.
    """
    found = {f"patches: {name}": value for name, value in of_distances(between(embedded.image)).items()}
    distances, seen = between(entering.image), loop.stage_input(first, entering)
    found |= {f"tokens: {name}": value for name, value in of_distances(distances).items()}
    found |= {f"attention: {name}": value for name, value in of_attention(seen.attention.class_attention()).items()}
    merged = _Merged()
    loop.step(first, entering, -(-entering.count // 2), merged)
    found["pixels: spread"] = spread(pixels)
    return found | {"stage: merging": merged.apart.mean(1) / distances.mean((1, 2))}
