"""What stages are made of where `torch.export` captures them for runtimes of all kinds.

ONNX, OpenVINO, ExecuTorch, LiteRT and Core ML have one small set of operators in common: arithmetic, comparisons, sums
and minima, gathers. A stable sort, a scatter that reduces, booleans in place of numbers, a mixture of int64 and int32
is what one or another of them lacks, and no runtime promises which of equal numbers its sort puts first. So what ranks
by sorting counts instead while it is captured, numbers of tokens are int32, and masks are multiplied, for a mask of
scalars is another operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

# From torch 2.7 on; before, what captures a graph is not told apart from the compiler.
_EXPORTING = getattr(torch.compiler, "is_exporting", None) or torch.compiler.is_compiling


def exporting() -> bool:
    """Whether `torch.export` is looking on."""
    return bool(_EXPORTING())


def whole() -> torch.dtype:
    """The dtype of token numbers: int64, or int32 in an exported graph."""
    return torch.int32 if exporting() else torch.int64


def numbers(like: Tensor, count: int, start: int = 0) -> Tensor:
    """The numbers `start..start + count - 1`, `(count,)`, on the device of another tensor."""
    return torch.arange(start, start + count, device=like.device, dtype=whole())


def pick(values: Tensor, index: Tensor) -> Tensor:
    """The entries of `values` `(B, N)` at `index` `(B, M)`."""
    return values.gather(1, index.to(torch.int64))


def put(values: Tensor, order: Tensor) -> Tensor:
    """The way back from `pick`: each entry of `values` `(B, N)` stands where `order` `(B, N)`, a permutation, says."""
    return torch.zeros_like(values).scatter(1, order.to(torch.int64), values)


def running(mask: Tensor) -> Tensor:
    """How many of a mask `(B, N)` are true up to each place, that place counted; token numbers `(B, N)`."""
    if exporting():  # of whole numbers TensorRT has none
        return mask.to(torch.float32).cumsum(1).to(whole())
    return mask.to(whole()).cumsum(1, dtype=whole())


def beyond(values: Tensor) -> Tensor:
    """For each image a number above all its values, `(B, n, m)` and not negative: `(B, 1, 1)`.

    What must not be the least has this added. It comes from the values: the largest float would do as well, but a
    quantiser that takes its scale from the largest number in a graph would have none left for the others.
    """
    return 2.0 * values.amax((1, 2), keepdim=True) + 1.0


def lifted(values: Tensor, mask: Tensor, by: Tensor | float) -> Tensor:
    """`values + mask * by`.

    Args:
        values: `(B, n, m)`.
        mask: 1 or 0, in the dtype of the values; broadcasts to them.
        by: A number, or one for each image, `(B, 1, 1)`.
    """
    if exporting():  # LiteRT and Core ML add no multiples
        return values + mask * by
    if isinstance(by, Tensor):
        # In place of a masked fill, which took five times as long on a CPU (2.2 ms of 16 x 196 x 196).
        return torch.addcmul(values, mask, by)
    return torch.add(values, mask, alpha=by)


def not_earlier(like: Tensor, count: int) -> Tensor:
    """Bool `(count, count)`: at `[i, j]` whether `j` is `i` or more."""
    every = numbers(like, count)
    return every.unsqueeze(0) >= every.unsqueeze(1)


def itself(like: Tensor, count: int) -> Tensor:
    """fp32 `(count, count)`, 1 on the diagonal."""
    if exporting():  # LiteRT's graphs have no operator for it
        every = numbers(like, count)
        return (every.unsqueeze(0) == every.unsqueeze(1)).to(torch.float32)
    return torch.eye(count, device=like.device)
