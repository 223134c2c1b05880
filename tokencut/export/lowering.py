"""A program in the plain operators that small runtimes are good at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lowered(program: Any, *keep: Any) -> Any:
    """A program of torch's core operators, without what changes nothing.

    Attention is written as two products around a softmax: torch's own way down looks through the logits for rows that
    are hidden altogether, which there are none of here, by five operators that no accelerator takes.

    Args:
        program: As torch.export captured it; it stays as it is.
        keep: Operators that are left as they are.
    """
    aten = torch.ops.aten
    table = torch.export.default_decompositions()
    table[aten.scaled_dot_product_attention.default] = _attention
    for operator in keep:
        table.pop(operator)
    core = program.run_decompositions(table)
    for node in list(core.graph.nodes):
        if node.target is aten.mean.dim:  # the dtype that it has anyway, which LiteRT takes for an unknown word
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "dtype"}
        if node.op == "call_function" and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            core.graph.erase_node(node)
    core.graph.eliminate_dead_code()
    core.graph_module.recompile()
    return core


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of `(..., n, d)`, by plain products."""
    if dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool):
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    around = query.shape[:-2]
    # Batched products of three dimensions, which need no copies.
    queries, keys, values = (each.flatten(0, -3) for each in (query * (scale or query.shape[-1] ** -0.5), key, value))
    logits = torch.bmm(queries, keys.transpose(1, 2)).unflatten(0, around)
    if attn_mask is not None:
        logits = logits + attn_mask
    return torch.bmm(logits.softmax(-1).flatten(0, -3), values).unflatten(0, around)


def _changes_nothing(node: Any) -> bool:
    """Whether a node gives what it takes: a whole slice, an expansion to the size that it has."""
    aten = torch.ops.aten
    if node.target is aten.alias.default:
        return True
    given = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], torch.fx.Node) else None
    made = node.meta.get("val")
    if node.target is not aten.expand.default or given is None or given.dim() != made.dim():
        return False
    return all(str(one) == str(other) for one, other in zip(given.shape, made.shape, strict=True))
