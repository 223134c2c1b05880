"""Traces of a compressed model: what its loop over blocks tells who looks on, and one that keeps what stages did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tokencut.attention import AttentionInfo
from tokencut.methods import Method
from tokencut.schedule import StagePlan
from tokencut.tokens import Tokens


@dataclass(frozen=True)
class Trace:
    """What one stage did, for pictures, dense outputs and training.

    Attributes:
        block: The stage's 1-based block; 0 for static tubelets that were removed before the first.
        tokens: What left the stage.
        attention: Class attention of the `N` image tokens that entered it, fp32 `(B, N)` with a gradient; None where
            nobody asked for it.
        attentive: How many of those count as attentive; 0 where there was no stage.
    """

    block: int
    tokens: Tokens
    attention: Tensor | None = None
    attentive: int = 0


class BlockObserver(Protocol):
    """Is told of every stage and every block of a run, in order, and changes nothing."""

    def stage(self, plan: StagePlan, entering: Tokens, leaving: Tokens, attention: AttentionInfo | None) -> None:
        """A stage has run: the tokens before and behind it, and the attention that it saw, if it is in a block."""

    def block(self, number: int, tokens: Tokens) -> None:
        """The block of this 1-based number has run; these are its output."""


class Tracer:
    """Keeps a trace for each stage."""

    def __init__(self, method: Method, attention: bool) -> None:
        """Starts with none.

        Args:
            method: What the stages reduce by.
            attention: Whether to compute the class attention at each stage.
        """
        self.traces: list[Trace] = []
        self._method = method
        self._attention = attention

    def stage(self, plan: StagePlan, entering: Tokens, leaving: Tokens, attention: AttentionInfo | None) -> None:
        """Notes what left the stage."""
        row = attention.class_attention() if self._attention and attention is not None else None
        attentive = self._method.attentive(plan.tokens_in, plan.tokens_out) if attention is not None else 0
        self.traces.append(Trace(plan.block, leaving, row, attentive))

    def block(self, number: int, tokens: Tokens) -> None:
        """Takes no note."""
