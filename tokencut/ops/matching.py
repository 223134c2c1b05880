"""Bipartite matching of similar tokens (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.ops.exporting import pick, whole
from tokencut.ops.ranking import are_highest, ranking, take


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
    best, similarity = _most_similar(take(unit, side), take(unit, partner))
    order = ranking(similarity)[:, :pairs]
    return pick(side, order), pick(partner, pick(best, order))


def match_in_turn(points: Tensor, first: int, pairs: int) -> tuple[Tensor, Tensor]:
    """The same for tokens that stand on two sides in turn.

    Args:
        points: As `match_pairs` takes them.
        first: The first token that may be merged away, 0 or 1; from there every other one.
        pairs: `R`, at most as many as those, `a`.

    Returns:
        Of the tokens that may be merged away which are, bool `(B, a)`, and which token of the other side each of them
        is most similar to, int64 `(B, a)`.
    """
    unit = F.normalize(points.float(), dim=2)
    best, similarity = _most_similar(unit[:, first::2], unit[:, 1 - first :: 2])
    return are_highest(similarity, pairs), best


def in_turn(side: Tensor, partner: Tensor, first: int) -> Tensor:
    """What belongs to tokens on two sides, `(B, a)` and `(B, b)`, back in their order, `(B, a + b)`."""
    leading, trailing = (partner, side) if first else (side, partner)
    trailing = F.pad(trailing, (0, leading.shape[1] - trailing.shape[1]))
    return torch.stack((leading, trailing), 2).flatten(1)[:, : side.shape[1] + partner.shape[1]]


def _most_similar(unit: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For each point `(B, a, F)` the most similar of others, by its position, and how similar; both `(B, a)`."""
    similarity = torch.matmul(unit, others.transpose(1, 2))
    # argmax is documented to return the first of equal maxima.
    return similarity.argmax(2).to(whole()), similarity.amax(2)
