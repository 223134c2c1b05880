"""Inputs of a stage built directly, without a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencut.attention import AttentionInfo, QueryKey
from tokencut.methods import Method, StageInput
from tokencut.ops.grouping import Grouping, Selection
from tokencut.tokens import Tokens

Rows = list[list[float]]


@dataclass(frozen=True)
class GivenAttention(AttentionInfo):
    """Attention as a test writes it down: class attention `(B, N)` and keys `(B, N, d)`."""

    attention: Tensor | None = None
    points: Tensor | None = None

    def class_attention(self) -> Tensor:
        assert self.attention is not None, "this test gives no class attention"
        return self.attention

    def keys(self) -> Tensor:
        assert self.points is not None, "this test gives no keys"
        return self.points


def as_it_is(points: Tensor) -> Tensor:
    """The norm behind the stage, where a test has none."""
    return points


def given_input(
    image: Rows,
    attention: list[float] | None = None,
    keys: Rows | None = None,
    sizes: list[float] | None = None,
) -> StageInput:
    """One image as a test writes it down, with one prefix token full of nines."""
    features = torch.tensor([[[9.0] * len(image[0]), *image]])
    given = GivenAttention(
        (),
        1,
        (),
        attention=None if attention is None else torch.tensor([attention]),
        points=None if keys is None else torch.tensor([keys]),
    )
    return StageInput(Tokens(features, 1, None if sizes is None else torch.tensor([sizes])), given, as_it_is)


def input_of(
    features: Tensor, query: Tensor, key: Tensor, prefix: int, sizes: Tensor | None = None, source: Tensor | None = None
) -> StageInput:
    """An input with real attention.

    Args:
        features: `(B, P + N, D)`.
        query: `(B, H, P + N, d)`.
        key: Likewise.
        prefix: `P`; its first token is the class token, if there is any.
        sizes: `(B, N)` or None.
        source: `(B, patches)` or None.
    """
    attention = AttentionInfo(((QueryKey(query, key),),), prefix, (0,) if prefix else ())
    return StageInput(Tokens(features, prefix, sizes, source), attention, as_it_is)


def random_input(
    seed: int, batch: int, tokens: int, prefix: int = 1, width: int = 8, merged: bool = False
) -> StageInput:
    """Normal features, queries and keys of two heads.

    Where `merged`, tokens hold several patches and some patches were dropped, of twice as many as there are tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    count = prefix + tokens
    source, sizes = torch.arange(tokens).expand(batch, -1), None
    if merged:
        more = torch.randint(-1, tokens, (batch, tokens), generator=generator)
        source = torch.cat((source, more), 1)
        sizes = patches_in(source, tokens)
    return input_of(
        normal(batch, count, width), normal(batch, 2, count, 4), normal(batch, 2, count, 4), prefix, sizes, source
    )


def kept(method: Method, stage_input: StageInput, budget: int) -> list[list[int]]:
    """The tokens that a dropping method keeps."""
    decision = method.decide(stage_input, budget)
    assert isinstance(decision, Selection)
    index: list[list[int]] = decision.index.tolist()
    return index


def grouping(method: Method, stage_input: StageInput, budget: int) -> Grouping:
    """The decision of a merging method."""
    decision = method.decide(stage_input, budget)
    assert isinstance(decision, Grouping)
    return decision


def patches_in(source: Tensor, tokens: int) -> Tensor:
    """How many patches a source map `(B, patches)` puts into each token, fp32 `(B, N)`."""
    return (source.unsqueeze(1) == torch.arange(tokens).view(1, tokens, 1)).sum(2).float()


def centres_of(source: Tensor, tokens: int, places: Tensor) -> Tensor:
    """Mean place of the patches that a source map `(B, patches)` puts into each token, `(B, N, 2)`."""
    inside = (source.unsqueeze(1) == torch.arange(tokens).view(1, tokens, 1)).float()
    return inside @ places / inside.sum(2, keepdim=True)
