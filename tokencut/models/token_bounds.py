"""How large a number may get that enters a linear layer of a block, whatever the image: by the weights before it.

A norm leaves tokens that are no longer than the square root of their width, so its own weights bound each of their
numbers, and those of a layer behind it what that one gives (Cauchy-Schwarz). Attention gives averages of values, and
the activations of MLPs nothing larger than what they are given. So the range of eight bits can be fixed without images,
and nothing is ever beyond it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm import layers as timm_layers
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

# What is given is rounded to three bits and more, a sixteenth at most, and so is what half precision computes with.
ROUNDED = 1.1
NORMS = (nn.LayerNorm, nn.RMSNorm, timm_layers.RmsNorm)
ACTIVATIONS = (
    nn.GELU, timm_layers.GELU, timm_layers.GELUTanh, timm_layers.QuickGELU, nn.SiLU, nn.ReLU,
)  # fmt: skip


def largest_entering(block: nn.Module, layer: nn.Linear) -> float | None:
    """The largest magnitude of what enters a linear layer of a block.

    Args:
        block: The block.
        layer: One of its layers. What stands before it may be quantised: then that counts as it is.

    Returns:
        The bound; None where the weights don't tell: the block, its attention, norms or MLP are not those of a plain
        Vision Transformer.
    """
    part: Any = block
    if type(part) is not Block:
        return None
    attention, mlp = part.attn, part.mlp
    if type(attention) is Attention:
        width = attention.qkv.in_features
        if layer is attention.qkv:
            return _behind_norm(part.norm1)
        if layer is attention.proj and type(attention.norm) is nn.Identity and layer.in_features == width:
            return _behind_layer(part.norm1, attention.qkv, slice(2 * width, None))
    if type(mlp) is Mlp:
        if layer is mlp.fc1:
            return _behind_norm(part.norm2)
        if layer is mlp.fc2 and type(mlp.norm) is nn.Identity and type(mlp.act) in ACTIVATIONS:
            return _behind_layer(part.norm2, mlp.fc1, slice(None))
    return None


def _behind_norm(norm: nn.Module) -> float | None:
    if not isinstance(norm, NORMS):
        return None
    weight, bias = _affine(norm)
    return float((weight.abs() * math.sqrt(weight.numel()) + bias.abs()).max()) * ROUNDED


def _behind_layer(norm: nn.Module, layer: Any, rows: slice) -> float | None:
    if not isinstance(norm, NORMS):
        return None
    scale, shift = _affine(norm)
    weight = layer.weight.detach().double()[rows]
    if weight.shape[1:] != scale.shape:
        return None
    constant = weight @ shift
    if layer.bias is not None:
        constant = constant + layer.bias.detach().double()[rows]
    longest = (weight * scale).norm(dim=1) * math.sqrt(scale.numel())
    return float((longest * ROUNDED + (weight.abs() @ shift.abs()) * (ROUNDED - 1) + constant.abs()).max()) * ROUNDED


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm, fp64; ones and zeros where it has none."""
    size, bias = tuple(norm.normalized_shape), getattr(norm, "bias", None)
    weight = torch.ones(size) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros(size, device=weight.device) if bias is None else bias.detach()
    return weight.double(), bias.double()
