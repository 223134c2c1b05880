"""Comparisons of all tokens with all, and gathers of tokens, computed in fp32 by what XNNPACK has.

It has no truths and no gathers, and ExecuTorch's own operators go from number to number: in a stage of 196 tokens casts
of truths to numbers took half the time, and comparisons a quarter; gathering half the tokens took as long as a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The least normal number in fp32, and how many of it make 1.
_LEAST, _MANY = 2.0**-126, 2.0**126


def without_truths(program: Any) -> None:
    """Replaces comparisons that are turned into fp32, and gathers of tokens, by arithmetic with the same results.

    Args:
        program: Of torch's core operators, see `lowered`; changed in place. What it compares has to be finite.
    """
    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        arithmetic = None
        if node.target is aten._to_copy.default and node.meta["val"].dtype == torch.float32:
            if _of_pairs(node.args[0]):
                arithmetic = _Arithmetic(program.graph, node).truths(node.args[0])
        elif node.target is aten.gather.default and node.meta["val"].dim() == 3:
            arithmetic = _Arithmetic(program.graph, node).gathered(*node.args)
        if arithmetic is not None:
            node.replace_all_uses_with(arithmetic)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _of_pairs(node: Any) -> bool:
    """Whether a node gives truths about pairs of tokens: about single ones they are few."""
    made = node.meta["val"]
    pairs = made.dim() == 3 and all(isinstance(size, int) and size > 1 for size in made.shape[1:])
    return bool(made.dtype == torch.bool) and pairs


class _Arithmetic:
    """Writes operators before a node of a graph, in whose place their results shall be."""

    def __init__(self, graph: Any, before: Any) -> None:
        self._graph, self._before = graph, before
        aten = torch.ops.aten
        self._kinds: dict[Any, Callable[..., Any]] = {
            aten.lt.Tensor: lambda a, b: self._above(self._difference(b, a)),
            aten.gt.Tensor: lambda a, b: self._above(self._difference(a, b)),
            aten.le.Tensor: lambda a, b: self._not_below(self._difference(b, a)),
            aten.ge.Tensor: lambda a, b: self._not_below(self._difference(a, b)),
            aten.eq.Tensor: lambda a, b: self._not_below(self._times(self._apart(a, b), -1.0)),
            aten.eq.Scalar: lambda a, b: self._not_below(self._times(self._apart(a, b), -1.0)),
            aten.ne.Scalar: lambda a, b: self._above(self._apart(a, b)),
            aten.ne.Tensor: lambda a, b: self._above(self._apart(a, b)),
            aten.le.Scalar: lambda a, b: self._not_below(self._times(self._difference(a, b), -1.0)),
            aten.logical_and.default: lambda a, b: self._call(aten.mul.Tensor, self.truths(a), self.truths(b)),
            aten.logical_or.default: lambda a, b: self._call(aten.maximum.default, self.truths(a), self.truths(b)),
            aten.logical_not.default: lambda a: self._plus(self._times(self.truths(a), -1.0), 1.0),
        }

    def truths(self, node: Any) -> Any:
        """1 and 0 in fp32 for a node's truths; by a cast where they come from what is not known here."""
        kind = self._kinds.get(node.target) if _of_pairs(node) else None
        return self._float(node) if kind is None else kind(*node.args)

    def gathered(self, values: Any, dim: int, index: Any) -> Any:
        """Rows of `values` `(B, N, F)`, by a product with ones and zeros; None where it gathers otherwise."""
        aten = torch.ops.aten
        rows = index.args[0] if index.target is aten.expand.default else index
        if dim != 1 or rows.target is not aten.unsqueeze.default or rows.args[1] != 2:
            return None
        every = self._call(aten.arange.start_step, 0, values.meta["val"].shape[1], dtype=torch.float32)
        apart = self._apart(rows, self._call(aten.view.default, every, [1, 1, -1]))
        return self._call(aten.bmm.default, self._not_below(self._times(apart, -1.0)), values)

    def _difference(self, a: Any, b: Any) -> Any:
        """In fp32, in which token numbers are exact, and nothing but equals differs by 0."""
        if isinstance(b, torch.fx.Node):
            return self._call(torch.ops.aten.sub.Tensor, self._float(a), self._float(b))
        return self._float(a) if b == 0 else self._plus(self._float(a), -b)

    def _apart(self, a: Any, b: Any) -> Any:
        return self._call(torch.ops.aten.abs.default, self._difference(a, b))

    def _float(self, node: Any) -> Any:
        if node.meta["val"].dtype == torch.float32:
            return node
        return self._call(torch.ops.aten._to_copy.default, node, dtype=torch.float32)

    def _above(self, node: Any) -> Any:
        """1 where a number is above 0, else 0."""
        return self._steep(node, 0.0, _LEAST)

    def _not_below(self, node: Any) -> Any:
        """0 where a number is below 0, else 1."""
        return self._plus(self._steep(node, -_LEAST, 0.0), 1.0)

    def _steep(self, node: Any, low: float, high: float) -> Any:
        # Twice, for a number that is nearer to 0 than a normal one is neither by the first time.
        for _ in range(2):
            node = self._times(self._call(torch.ops.aten.clamp.default, node, low, high), _MANY)
        return node

    def _times(self, node: Any, by: float) -> Any:
        return self._call(torch.ops.aten.mul.Tensor, node, by)

    def _plus(self, node: Any, number: float) -> Any:
        return self._call(torch.ops.aten.add.Tensor, node, number)

    def _call(self, operator: Any, *args: Any, **kwargs: Any) -> Any:
        """A node, with what others read of nodes."""
        with self._graph.inserting_before(self._before):
            made = self._graph.call_function(operator, args, kwargs)
        made.meta = dict(self._before.meta)
        given = [each.meta["val"] if isinstance(each, torch.fx.Node) else each for each in args]
        with self._before.meta["val"].fake_mode:
            made.meta["val"] = operator(*given, **kwargs)
        return made
