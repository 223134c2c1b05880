"""Every architecture that timm builds of its class `VisionTransformerRelPos`."""

from __future__ import annotations

import torch
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor

from tokencut.adapters.base import Context, linear_macs, register_adapter
from tokencut.adapters.columnar import patches
from tokencut.adapters.pairs import PairBiasAdapter
from tokencut.adapters.vit_blocks import BlockHandler, ResPostBlockHandler
from tokencut.attention import QueryKey, TimmModule, mixed_values
from tokencut.cost import Macs
from tokencut.tokens import Tokens


def _attention(layer: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, tuple[QueryKey, ...]]:
    """Runs `RelPosAttention` by its own sub-modules, with all of the bias in `context`."""
    query, key, value = (
        part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=2)
    )
    query, key = layer.q_norm(query), layer.k_norm(key)
    y = mixed_values(layer, query, key, value, context.bias)
    return layer.proj_drop(layer.proj(y.transpose(1, 2).flatten(2))), (QueryKey(query, key),)


class RelPosBlockHandler(BlockHandler):
    """`RelPosBlock`: pre-norm with LayerScale."""

    attention_runs = {RelPosAttention: _attention}

    def layer_macs(self, layer: TimmModule) -> Macs:
        # The network that makes biases runs once for every offset, not for every token.
        network = 0 if layer.rel_pos is None else linear_macs(layer.rel_pos)
        return super().layer_macs(layer) + Macs(per_token=-network)


class ResPostRelPosBlockHandler(RelPosBlockHandler, ResPostBlockHandler):
    """`ResPostRelPosBlock`: the norms stand behind attention and MLP."""


@register_adapter
class RelPosAdapter(PairBiasAdapter):
    """Biases out of a table or of a small network, for each block or for all; with a class token or without."""

    family = "ViT with relative positions"
    timm_modules = ("vision_transformer_relpos",)
    classes = (VisionTransformerRelPos,)
    handlers = {RelPosBlock: RelPosBlockHandler(), ResPostRelPosBlock: ResPostRelPosBlockHandler()}
    keyword = "shared_rel_pos"

    def shared_holder(self, model: TimmModule) -> TimmModule | None:
        return model.shared_rel_pos

    def own_holder(self, block: TimmModule) -> TimmModule | None:
        return block.attn.rel_pos

    def whole_bias(self, holder: TimmModule) -> Tensor:
        bias: Tensor = holder.get_bias()
        return bias

    def adds_what_it_is_given(self, block: TimmModule) -> bool:
        return False

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        x = patches(model.patch_embed, images)
        if model.cls_token is not None:
            x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.paired(model, x, images)
