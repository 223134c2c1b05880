"""Bipartite matching of similar tokens (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.ops.ranking import ranking, take


def match_pairs(points: Tensor, side: Tensor, partner: Tensor, pairs: Tensor | int) -> tuple[Tensor, Tensor]:
    """The most similar pairs between two sides.

    Each token of `side` looks for its most similar token of `partner` (cosine); the most similar `pairs` of these win.
    Several may choose the same partner.

    Args:
        points: `(B, N, F)` in any floating dtype; compared in fp32.
        side: Numbers of the tokens that may be merged away, int64 `(B, a)`.
        partner: Numbers of the tokens they may join, int64 `(B, b)`.
        pairs: `R`, at most `a`.

    Returns:
        The tokens merged away and the tokens they join, both int64 `(B, R)`.
    """
    unit = F.normalize(points.float(), dim=2)
    similarity = torch.matmul(take(unit, side), take(unit, partner).transpose(1, 2))
    # argmax is documented to return the first of equal maxima.
    best = similarity.argmax(2)
    order = ranking(similarity.amax(2))[:, :pairs]
    return side.gather(1, order), partner.gather(1, best.gather(1, order))
