"""Every architecture that timm builds of its class `Beit`: BEiT and BEiT v2."""

from __future__ import annotations

import torch
from timm.models.beit import Attention, Beit, Block
from torch import Tensor

from tokencut.adapters.base import Context, register_adapter
from tokencut.adapters.columnar import patches
from tokencut.adapters.pairs import PairBiasAdapter
from tokencut.adapters.rotary import ScaledBlockHandler, project_qkv
from tokencut.attention import QueryKey, TimmModule, mixed_values
from tokencut.tokens import Tokens


def _attention(layer: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, tuple[QueryKey, ...]]:
    """Runs BEiT's attention by its own sub-modules, with all of the bias in `context`."""
    query, key, value = project_qkv(layer, x)
    y = mixed_values(layer, query, key, value, context.bias)
    return layer.proj_drop(layer.proj(y.transpose(1, 2).flatten(2))), (QueryKey(query, key),)


class BeitBlockHandler(ScaledBlockHandler):
    """`Block` of BEiT: pre-norm, LayerScale as two parameters."""

    attention_runs = {Attention: _attention}


@register_adapter
class BeitAdapter(PairBiasAdapter):
    """Relative position biases for each block, for all blocks, or both; a class token; class or average pooling."""

    family = "BEiT"
    timm_modules = ("beit",)
    classes = (Beit,)
    handlers = {Block: BeitBlockHandler()}
    keyword = "shared_rel_pos_bias"

    def shared_holder(self, model: TimmModule) -> TimmModule | None:
        return model.rel_pos_bias

    def own_holder(self, block: TimmModule) -> TimmModule | None:
        return None if block.attn.relative_position_bias_table is None else block.attn

    def whole_bias(self, holder: TimmModule) -> Tensor:
        if isinstance(holder, Attention):
            return holder._get_rel_pos_bias()
        bias: Tensor = holder()
        return bias.unsqueeze(0)

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        x = patches(model.patch_embed, images)
        x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if model.pos_embed is not None:
            x = x + model.pos_embed
        return self.paired(model, model.pos_drop(x), images)
