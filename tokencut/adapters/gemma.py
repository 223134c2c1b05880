"""The vision encoder of Gemma 4, by timm's `gemma4_vit`: alone, or inside a classifier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models.gemma4_vit import (
    Gemma4Attention,
    Gemma4Block,
    Gemma4VitClassifier,
    Gemma4VitEncoder,
    apply_multidimensional_rope,
)
from torch import Tensor

from tokencut.adapters import columnar, projected
from tokencut.adapters.base import Context, linear_macs, register_adapter
from tokencut.adapters.positions import grid_positions
from tokencut.adapters.rotary import RotatedQueryKey
from tokencut.adapters.vit_blocks import BlockHandler, Layers
from tokencut.attention import QueryKey, TimmModule, mixed_values
from tokencut.tokens import Tokens


@dataclass(frozen=True)
class CosineSineContext(Context):
    """`Context` with cosines and sines for the block, each `(B, N, d)`."""

    cosines: Tensor | None = None
    sines: Tensor | None = None

    def block_arguments(self) -> dict[str, Any]:
        return {"rope_cos": self.cosines, "rope_sin": self.sines, "attn_mask": self.bias}

    def attention_arguments(self) -> dict[str, Any]:
        return self.block_arguments()

    def given(self, **arguments: Any) -> Context:
        return replace(
            self, cosines=arguments["rope_cos"], sines=arguments["rope_sin"], bias=arguments.get("attn_mask")
        )


def _attention(layer: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, tuple[QueryKey, ...]]:
    """Runs `Gemma4Attention` by its own sub-modules, fused, and keeps queries and keys."""
    assert isinstance(context, CosineSineContext)
    assert context.cosines is not None and context.sines is not None
    query, key, value = (
        norm(proj(x).unflatten(2, (heads, layer.head_dim)))
        for norm, proj, heads in (
            (layer.q_norm, layer.q_proj, layer.num_heads),
            (layer.k_norm, layer.k_proj, layer.num_kv_heads),
            (layer.v_norm, layer.v_proj, layer.num_kv_heads),
        )
    )
    # Logits are not scaled here, and fused attention scales them.
    query = query * layer.head_dim**0.5
    raw = QueryKey(query.transpose(1, 2), key.transpose(1, 2).repeat_interleave(layer.num_kv_groups, 1))
    query, key = (
        apply_multidimensional_rope(part, context.cosines, context.sines).transpose(1, 2) for part in (query, key)
    )
    value = value.transpose(1, 2)
    if layer.num_kv_groups > 1:
        key, value = (part.repeat_interleave(layer.num_kv_groups, 1) for part in (key, value))
    y = mixed_values(layer, query, key, value, context.bias)
    return layer.proj_drop(layer.o_proj(y.transpose(1, 2).flatten(2))), (RotatedQueryKey(query, key, raw=raw),)


class GemmaBlockHandler(BlockHandler):
    """`Gemma4Block`: norms before and behind attention and MLP, one drop path for both halves."""

    attention_runs = {Gemma4Attention: _attention}

    def attention_half(self, block: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, Layers]:
        y, maps = self.attend(block.attn, block.norm1(x), context)
        return x + block.drop_path(block.norm2(y)), (maps,)

    def mlp_half(self, block: TimmModule, x: Tensor) -> Tensor:
        return x + block.drop_path(block.norm4(block.mlp(block.norm3(x))))

    def pre_mlp_norm(self, block: TimmModule, x: Tensor) -> Tensor:
        return block.norm3(x)

    def projection(self, layer: TimmModule) -> TimmModule:
        return layer.o_proj.linear


@register_adapter
class GemmaAdapter(projected.EncoderAdapter):
    """Rotary positions by cosines and sines, gated MLP; its pooler averages squares of 3 x 3 patches."""

    family = "Gemma 4 vision"
    timm_modules = ("gemma4_vit",)
    classes = (Gemma4VitEncoder, Gemma4VitClassifier)
    handlers = {Gemma4Block: GemmaBlockHandler()}

    def check(self, model: TimmModule) -> None:
        super().check(model)
        self.check_squares(model, self.core(model).pooling_kernel_size)

    def rope(self, model: TimmModule) -> TimmModule | None:
        return None  # none of timm's own; see `prepare`

    def num_prefix_tokens(self, model: TimmModule) -> int:
        return 0

    def grid(self, model: TimmModule, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.patch_size(model)
        return height // rows, width // columns

    def input_size(self, model: TimmModule) -> tuple[int, int] | None:
        return columnar.described_size(model)

    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        height, width = model.patch_size
        return int(height), int(width)

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        core = self.core(model)
        core._assert_raw_img_conformant(images)
        features, position_ids, _ = core.patch_embed(images)
        tokens = self.located(model, features, self.grid(model, *images.shape[-2:]))
        return replace(tokens, shared=core.rotary_emb(features, position_ids))

    def prepare(self, model: TimmModule, tokens: Tokens) -> Tokens:
        if tokens.positions is None:
            return tokens
        rope, shares, dtype = self.core(model).rotary_emb, self.shares(tokens), tokens.features.dtype
        if shares is None:
            found = _rotations(rope, self.places(tokens))
        else:
            assert tokens.grid is not None
            whole = _rotations(rope, grid_positions(tokens.grid, shares.device).unsqueeze(0))
            found = (shares @ whole[0], shares @ whole[1])
        return replace(tokens, shared=tuple(part.to(dtype) for part in found))

    def context(self, model: TimmModule, number: int, tokens: Tokens) -> Context:
        return CosineSineContext(tokens.bias, *tokens.shared)

    def projector(self, model: TimmModule) -> TimmModule | None:
        core = self.core(model)
        return core.pooler if core.global_pool == "soft" else None

    def squares(self, model: TimmModule, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1] // self.core(model).pooling_kernel_size ** 2

    def projector_macs(self, model: TimmModule, squares: int) -> int:
        # The pooler is a product with a matrix that says which patch is in which square.
        return squares * self.patches(model) * int(model.embed_dim)

    def output(self, model: TimmModule, tokens: Tokens) -> Tensor:
        core, x = self.core(model), projected.on_grid(tokens).flatten(1, 2)
        if self.projector(model) is None:
            return x
        assert tokens.grid is not None
        # Columns before rows, as the model counts.
        places = grid_positions(tokens.grid, x.device).long().flip(-1).expand(x.shape[0], -1, -1)
        x, _ = core.pooler(x, places, None)
        return x if core.std_bias is None else (x - core.std_bias) * core.std_scale

    def embed_macs(self, model: TimmModule) -> int:
        embed, frequencies = self.core(model).patch_embed, self.core(model).rotary_emb.inv_freq.numel()
        # Positions are looked up by products with a one for each, rows and columns; angles are products too.
        lookup = 2 * embed.position_embedding_size * embed.embed_dim
        return (linear_macs(embed.input_proj) + lookup + 2 * frequencies) * self.patches(model)


def _rotations(rope: TimmModule, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for tokens at rows and columns `(B, N, 2)`, each `(B, N, d)`: columns first, as timm's."""
    angles = [line.unsqueeze(-1) * rope.inv_freq for line in positions.flip(-1).unbind(-1)]
    turned = torch.cat([part for angle in angles for part in (angle, angle)], -1)
    return turned.cos(), turned.sin()
