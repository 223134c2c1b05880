"""A linear layer whose weight is kept in eight bits, by plain torch operations that `torch.compile` fuses with others.

In `int8` each row of the weight has a scale of its own, and each token that comes in. Numbers of fp8 (e4m3) have an
exponent, so that one scale does for all of a weight, and one for all tokens wherever they cannot be larger than a bound
(`token_bounds`): a power of two, by which no digit is lost, and for which no token has to be looked through before it
is multiplied. Elsewhere fp8 has a scale for each row and each token too.

torchao's tensors compute the same by rows. They are taken apart again in each call of a compiled model, which takes
longer than eight bits save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The least number that the largest of a row or of a token counts for, so that zeros stay zeros.
LEAST_WEIGHT, LEAST_TOKEN = 1e-12, 1e-6
FP8 = torch.float8_e4m3fn
MOST = {torch.int8: 127.0, FP8: torch.finfo(FP8).max}
# torch's product of int8 on a GPU takes no fewer tokens than that.
FEWEST = 17


class QuantizedLinear(nn.Linear):
    """A linear layer with `numbers` and scales in place of a weight. It cannot be trained.

    Attributes:
        numbers: `(N, K)`, int8 or fp8.
        scale: `(N, 1)`, or `(1, 1)` beside a token scale, fp32: what a row's numbers are multiplied with.
        token_scale: `()`, fp32: what the numbers of all tokens are divided by before they are multiplied. None where
            each token has a scale of its own.
        computes: No numbers, of the type that the layer is cast to.
    """

    numbers: nn.Parameter
    scale: Tensor
    token_scale: Tensor | None
    computes: Tensor

    @classmethod
    def take(cls, layer: nn.Linear, numbers: Tensor, scale: Tensor, token_scale: Tensor | None) -> None:
        """Makes a linear layer one with such a weight, in place: it keeps its bias, its mode and its hooks."""
        dtype = layer.weight.dtype
        del layer.weight
        made: Any = layer
        made.__class__ = cls
        made.numbers = nn.Parameter(numbers, requires_grad=False)
        made.register_buffer("scale", scale)
        made.register_buffer("token_scale", token_scale)
        made.register_buffer("computes", torch.empty(0, dtype=dtype, device=scale.device), persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the numbers stand for, `(N, K)`, of the type that the layer computes in."""
        return (self.numbers.to(torch.float32) * self.scale).to(self.computes.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name for it
        """Quantises tokens `(..., K)` and multiplies them: `(..., N)`."""
        tokens = input.flatten(0, -2)
        product = self._in_int8(tokens) if self.numbers.dtype == torch.int8 else self._in_fp8(tokens)
        return product.unflatten(0, input.shape[:-1])

    def _in_int8(self, tokens: Tensor) -> Tensor:
        scale = _scale_of(tokens, torch.int8)
        rounded = (tokens.float() / scale).round().to(torch.int8)
        few = max(0, FEWEST - tokens.shape[0]) if tokens.is_cuda else 0
        product = torch._int_mm(F.pad(rounded, (0, 0, 0, few)), self.numbers.t())[: tokens.shape[0]]
        found = product.float() * scale * self.scale.t()
        return (found if self.bias is None else found + self.bias).to(tokens.dtype)

    def _in_fp8(self, tokens: Tensor) -> Tensor:
        fixed = self.token_scale
        scale = _scale_of(tokens, FP8) if fixed is None else fixed
        # One power of two for all: to multiply by one over it is exact, and quicker than to divide.
        rounded = ((tokens.float() / scale) if fixed is None else tokens * fixed.reciprocal()).to(FP8)
        if not _multiplies_fp8(tokens):
            return F.linear((rounded.float() * scale).to(tokens.dtype), self.weight.to(tokens.dtype), self.bias)
        return torch._scaled_mm(
            rounded, self.numbers.t(), scale_a=scale, scale_b=self.scale.t() if fixed is None else self.scale.view(()),
            bias=self.bias, out_dtype=tokens.dtype, use_fast_accum=True,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves all of it; casts bias and `computes` alone."""
        parts = {name: getattr(self, name) for name in ("numbers", "scale", "token_scale")}
        exact = {name: part.data for name, part in parts.items() if part is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            now = getattr(self, name)
            if now.dtype != before.dtype:
                now.data = before.to(now.device)
        return self


def rounded_weight(kind: torch.dtype, weight: Tensor, *, by_rows: bool) -> tuple[Tensor, Tensor]:
    """A weight in eight bits, with its scales.

    Args:
        kind: int8 or fp8.
        weight: `(N, K)`.
        by_rows: Whether each row has a scale of its own, or all have one.

    Returns:
        Numbers `(N, K)` and scales, fp32 `(N, 1)` or `(1, 1)`.
    """
    exact = weight.detach().float()
    largest = exact.abs().amax(1, keepdim=True)
    scale = (largest if by_rows else largest.amax(0, keepdim=True)).clamp(min=LEAST_WEIGHT) / MOST[kind]
    numbers = exact / scale
    return (numbers.round() if kind == torch.int8 else numbers).to(kind), scale


def _scale_of(tokens: Tensor, kind: torch.dtype) -> Tensor:
    """A scale for each token `(M, K)`, by its largest number: fp32 `(M, 1)`."""
    return tokens.abs().amax(-1, keepdim=True).float().clamp(min=LEAST_TOKEN) / MOST[kind]


def _multiplies_fp8(tokens: Tensor) -> bool:
    """Whether torch multiplies fp8 where these are, to what they are: else the same is computed of what was rounded."""
    return (
        tokens.is_cuda and tokens.dtype == torch.bfloat16 and torch.cuda.get_device_capability(tokens.device) >= (8, 9)
    )
