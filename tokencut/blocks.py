"""A block of a model with a stage in its middle."""

from __future__ import annotations

from torch import Tensor

from tokencut.adapters import Adapter
from tokencut.attention import TimmModule
from tokencut.methods import Scene
from tokencut.tokens import Tokens


def before_stage(adapter: Adapter, model: TimmModule, block: TimmModule, tokens: Tokens, bias: Tensor | None) -> Scene:
    """Runs the first half of a reducing block: what the stage in its middle sees."""
    features, evidence = adapter.attend(model, block, tokens.features, bias)
    return Scene(tokens.with_features(features), evidence, lambda image: adapter.normed(block, image))
