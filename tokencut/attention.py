"""Fused attention, and what a stage needs to know of it.

The block keeps its fused attention and never materialises the `N x N` matrix; only the class row is computed beside it,
in `O(N D)`. The functions call the sub-modules of timm's attention layers, so that q/k norm, gates and scale norms of
whatever timm version is installed take part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.calling import has_hooks, parts_of, through
from tokencut.ops import kernels
from tokencut.ops.grouping import Selection
from tokencut.ops.ranking import highest
from tokencut.tokens import Tokens, full_precision

HALF = (torch.float16, torch.bfloat16)
# A module of timm's, whose parts nn.Module's own annotations cannot know.
TimmModule: TypeAlias = Any


@dataclass(frozen=True)
class QueryKey:
    """Queries and keys of one attention layer.

    Attributes:
        query: `(B, H, P + N, d)`, after q norm.
        key: `(B, H, P + N, d)`, after k norm.
        sign_weight: What this map counts for in the layer's attention: 1, or `-lambda` for the second map of
            differential attention.
    """

    query: Tensor
    key: Tensor
    sign_weight: Tensor | float = 1.0


@dataclass(frozen=True)
class AttentionInfo:
    """What a block's attention says about its tokens, computed when a method asks for it.

    Attributes:
        layers: One entry for each attention layer that runs in the block (parallel blocks have several); each entry
            holds the layer's maps (differential attention has two).
        num_prefix_tokens: `P`, the number of prefix tokens.
        class_rows: Positions of the class token, or of class and distillation token; empty where there is none.
        bias: What is added to the attention logits, as `fused_attention` takes it; None for nothing.
        compared: Maps whose keys stand for the tokens where a method compares them, if not those of `layers`.
    """

    layers: tuple[tuple[QueryKey, ...], ...]
    num_prefix_tokens: int
    class_rows: tuple[int, ...]
    bias: Tensor | None = None
    compared: tuple[tuple[QueryKey, ...], ...] | None = None

    def class_attention(self) -> Tensor:
        """Class attention of the image tokens, averaged over heads (method of arXiv 2211.11315, eq. 3).

        Without a class token the mean query of the image tokens takes its place; with a distillation token both rows
        are averaged; parallel attentions are averaged; differential attention gives the difference of its two rows,
        clamped at 0.

        Returns:
            fp32 `(B, N)`, not negative; a softmax over all `P + N` keys, restricted to the image tokens.
        """
        rows = [sum((_class_row(heads, self) for heads in maps[1:]), _class_row(maps[0], self)) for maps in self.layers]
        mean = torch.stack(rows).mean(0) if len(rows) > 1 else rows[0]
        return mean.clamp(min=0) if any(len(maps) > 1 for maps in self.layers) else mean

    def most_attended(self, tokens: Tokens, count: int) -> Selection:
        """The decision to keep the image tokens of highest class attention, of equal ones those of lower number.

        Args:
            tokens: The tokens that it is about.
            count: `M`, how many stay.
        """
        heads, features = self._single(), tokens.features
        if heads is not None and tokens.count <= kernels.CHOSEN_AT_ONCE and not features.requires_grad:
            looking, rows = _looking(heads, self)
            kept, index = kernels.attention.keep_attended(
                looking, heads.key, self.bias, rows, features, self.num_prefix_tokens, count
            )
            return Selection(index, kept)
        return Selection(highest(self.class_attention(), count))

    def _single(self) -> QueryKey | None:
        """The one map there is, if a kernel knows its class attention and no family has made that its own."""
        if type(self) is not AttentionInfo or len(self.layers) != 1 or len(self.layers[0]) != 1:
            return None
        heads = self.layers[0][0]
        return heads if _has_row_kernel(heads, self.bias) else None

    def keys(self) -> Tensor:
        """Keys of the image tokens averaged over heads, maps and parallel layers, fp32 `(B, N, d)`."""
        layers = self.layers if self.compared is None else self.compared
        every = [
            heads.key[:, :, self.num_prefix_tokens :].mean(1, dtype=torch.float32) for maps in layers for heads in maps
        ]
        return torch.stack(every).mean(0) if len(every) > 1 else every[0]


def _class_row(heads: QueryKey, attention: AttentionInfo) -> Tensor:
    """Class attention of one map, fp32 `(B, N)`."""
    (looking, rows), bias = _looking(heads, attention), attention.bias
    if _has_row_kernel(heads, bias):
        return kernels.attention.class_attention(looking, heads.key, bias, rows, attention.num_prefix_tokens)
    if bias is not None and not _same_for_all(bias):
        bias = _of_class(bias.expand(-1, -1, heads.query.shape[2], -1), attention)
    query = looking[:, :, :rows].float()
    with full_precision(query.device):
        logits = torch.matmul(query * heads.query.shape[-1] ** -0.5, heads.key.float().transpose(-2, -1))
    if bias is not None:
        logits = logits + bias.float()
    row = logits.softmax(-1)[..., attention.num_prefix_tokens :].mean((1, 2))
    return row * heads.sign_weight


def _has_row_kernel(heads: QueryKey, bias: Tensor | None) -> bool:
    """Whether a kernel computes the class attention of one map."""
    one = (bias is None or _same_for_all(bias)) and not isinstance(heads.sign_weight, Tensor)
    return one and kernels.usable(heads.query, heads.key)


def _looking(heads: QueryKey, attention: AttentionInfo) -> tuple[Tensor, int]:
    """The queries of the class tokens, `(B, H, R or more, d)`, and `R`, how many of them that are."""
    if attention.class_rows:
        return heads.query, len(attention.class_rows)
    return _of_class(heads.query, attention), 1


def _of_class(rows: Tensor, attention: AttentionInfo) -> Tensor:
    """The rows of the class tokens, of `(B, H, P + N, ...)`; the mean row of the image tokens where there are none."""
    if attention.class_rows:
        return rows[:, :, : len(attention.class_rows)]
    return rows[:, :, attention.num_prefix_tokens :].float().mean(2, keepdim=True)


def _same_for_all(bias: Tensor) -> bool:
    """Whether a bias is the same for all queries and heads, `(B, 1, 1, P + N)`."""
    _, heads, queries, _ = bias.shape
    return bool(heads == 1) and bool(queries == 1)


def log_size_bias(tokens: Tokens) -> Tensor | None:
    """The bias of proportional attention (ToMe, arXiv 2210.09461): log of the size, 0 for prefix tokens.

    Args:
        tokens: The tokens that attend to each other.

    Returns:
        `(B, 1, 1, P + N)` in the features' dtype, for timm's `attn_mask`; None while no token was merged, since a mask
        rules out the fastest kernels.
    """
    if tokens.sizes is None:
        return None
    if tokens.log_sizes is not None:
        return tokens.log_sizes
    if kernels.usable(tokens.sizes):
        return kernels.attention.log_sizes(tokens.sizes, tokens.num_prefix_tokens, tokens.features.dtype)
    bias = F.pad(tokens.sizes.log(), (tokens.num_prefix_tokens, 0))
    return bias.to(tokens.features.dtype)[:, None, None, :]


# A hidden token keeps this share of its weight in attention, so that `log` has a gradient there (as arXiv 2106.02034).
HIDDEN = 1e-6


def attention_bias(tokens: Tokens, proportional: bool) -> Tensor | None:
    """Everything that is added to the attention logits of a block.

    Args:
        tokens: The tokens that attend to each other.
        proportional: Whether tokens weigh by their size.

    Returns:
        As `log_size_bias`; `log(policy)` is added where tokens are hidden while training.
    """
    bias = log_size_bias(tokens) if proportional else None
    if tokens.policy is None:
        return bias
    hidden = F.pad((tokens.policy + HIDDEN).log(), (tokens.num_prefix_tokens, 0))
    hidden = hidden.to(tokens.features.dtype)[:, None, None, :]
    return hidden if bias is None else bias + hidden


def fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Fused attention, by the fastest kernel that takes the bias.

    Args:
        query: `(B, H, P + N, d)`.
        key: `(B, H, P + N, d)`.
        value: `(B, H, P + N, d)`.
        bias: Added to the logits, or None: `(B, 1, 1, P + N)` where it is the same for all queries and heads, else what
            broadcasts to `(B, H, P + N, P + N)`.
        dropout: Probability that a weight is dropped.

    Returns:
        `(B, H, P + N, d)`.
    """
    if bias is not None and not dropout and has_biased_kernel(bias, query, key, value):
        return kernels.attention.biased_attention(query, key, value, bias)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


def mixed_values(layer: TimmModule, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """The attention inside one of timm's layers: fused, but where somebody looks at its weights.

    Args:
        layer: The timm module with `attn_drop`, and most with `fused_attn`. With that off, as timm's
            `AttentionExtract` leaves it, hooks on `attn_drop` see the weights, `(B, H, P + N, P + N)`.
        query: As `fused_attention` takes it; so are `key`, `value` and `bias`.
        key: Likewise.
        value: Likewise.
        bias: Likewise.

    Returns:
        `(B, H, P + N, d)`.
    """
    if getattr(layer, "fused_attn", False) or not has_hooks(layer.attn_drop):
        return fused_attention(query, key, value, bias, layer.attn_drop.p if layer.training else 0.0)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    weights: Tensor = layer.attn_drop((logits if bias is None else logits + bias).softmax(dim=-1))
    return weights @ value


def has_biased_kernel(bias: Tensor, *tensors: Tensor) -> bool:
    """Whether attention with such a bias has a kernel of its own: half precision on a GPU, one bias for all queries."""
    for tensor in tensors:
        if tensor.dtype not in HALF:
            return False
    return _same_for_all(bias) and kernels.usable(bias, *tensors)


def self_attention(layer: TimmModule, x: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[QueryKey, ...]]:
    """Runs timm's `Attention` by its own sub-modules, fused, and keeps queries and keys.

    Args:
        layer: A `timm.layers.Attention`.
        x: Normed features, `(B, P + N, D)`.
        bias: Added to the attention logits, as `fused_attention` takes it, or None.

    Returns:
        The attention's output `(B, P + N, D)`, and its one map.
    """
    batch, count, _ = x.shape
    parts = parts_of(layer)
    qkv = through(parts["qkv"], x).reshape(batch, count, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    query, key = through(parts["q_norm"], query), through(parts["k_norm"], key)
    y = mixed_values(layer, query, key, value, bias)
    y = through(parts["norm"], y.transpose(1, 2).reshape(batch, count, -1))
    if parts.get("gate") is not None:
        y = y * through(parts["gate"], x).sigmoid()
    return through(parts["proj_drop"], through(parts["proj"], y)), (QueryKey(query, key),)


def differential_attention(layer: TimmModule, x: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[QueryKey, ...]]:
    """Runs timm's `DiffAttention` (arXiv 2410.05258) by its own sub-modules; arguments as in `self_attention`.

    Returns:
        The attention's output `(B, P + N, D)`, and its two maps.
    """
    y, maps = differential_core(layer, layer.qkv(x).chunk(3, dim=2), bias)
    return layer.proj_drop(layer.proj(layer.norm(y))), maps


def differential_core(
    layer: TimmModule, qkv: tuple[Tensor, ...], bias: Tensor | None
) -> tuple[Tensor, tuple[QueryKey, ...]]:
    """The difference of two fused attentions, for every timm layer that holds lambda, sub norm and q/k norm.

    Args:
        layer: The timm module with `_compute_lambda`, `sub_norm`, `q_norm`, `k_norm`, `num_heads`, `lambda_init`.
        qkv: Query, key, value, each `(B, P + N, D)`.
        bias: Added to the attention logits, as `fused_attention` takes it, or None.

    Returns:
        The attention's output before its projection, `(B, P + N, D)`, and its two maps.
    """
    batch, count, width = qkv[0].shape
    query, key = (t.reshape(batch, count, 2 * layer.num_heads, -1).transpose(1, 2) for t in qkv[:2])
    value = qkv[2].reshape(batch, count, layer.num_heads, -1).transpose(1, 2)
    # Heads stand in pairs: the even ones make the first map, the odd ones the second.
    query, key = (t.unflatten(1, (layer.num_heads, 2)) for t in (layer.q_norm(query), layer.k_norm(key)))
    weight = layer._compute_lambda().type_as(query)
    first, second = _differing(layer, query, key, value, bias)
    y = layer.sub_norm(first - weight * second) * (1 - layer.lambda_init)
    maps = (QueryKey(query[:, :, 0], key[:, :, 0]), QueryKey(query[:, :, 1], key[:, :, 1], -weight.float()))
    return y.transpose(1, 2).reshape(batch, count, width), maps


def _differing(layer: TimmModule, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """The two attentions whose difference is taken, each `(B, H, P + N, d)`, of queries and keys `(B, H, 2, P + N, d)`.

    Fused, but where somebody looks at the weights of all `2 H` maps, as `mixed_values` says.
    """
    if layer.fused_attn or not has_hooks(layer.attn_drop):
        dropout = layer.attn_drop_p if layer.training else 0.0
        return tuple(
            F.scaled_dot_product_attention(query[:, :, i], key[:, :, i], value, attn_mask=bias, dropout_p=dropout)
            for i in (0, 1)
        )
    query, key = query.flatten(1, 2), key.flatten(1, 2)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    weights: Tensor = layer.attn_drop((logits if bias is None else logits + bias).softmax(dim=-1))
    return tuple(maps @ value for maps in weights.unflatten(1, (-1, 2)).unbind(2))
