"""Every architecture that timm builds of its class `VisionTransformer`, also with convolutions before the blocks."""

from __future__ import annotations

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokencut.adapters import vit_blocks
from tokencut.adapters.base import linear_macs, register_adapter
from tokencut.adapters.columnar import ColumnarAdapter, patches
from tokencut.attention import TimmModule
from tokencut.calling import through
from tokencut.tokens import Tokens


@register_adapter
class ViTAdapter(ColumnarAdapter):
    """Plain, distilled (two heads), register tokens, no class token, average or attention pooling, LayerScale,
    q/k norm, pre-norm, res-post-norm, parallel and differential blocks; patches cut by one convolution, or by a whole
    backbone of them (hybrids, ViTamin).
    """

    family = "ViT / DeiT"
    timm_modules = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin")
    classes = (VisionTransformer, VisionTransformerDistilled)
    handlers = vit_blocks.HANDLERS

    def separate_heads(self, model: TimmModule, apart: bool) -> bool:
        if not isinstance(model, VisionTransformerDistilled):
            return False
        model.set_distilled_training(apart)
        return True

    def class_rows(self, model: TimmModule) -> tuple[int, ...]:
        return (0, 1) if isinstance(model, VisionTransformerDistilled) else super().class_rows(model)

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        features = model._pos_embed(patches(model.patch_embed, images))
        features = through(model.norm_pre, through(model.patch_drop, features))
        return Tokens(features, self.num_prefix_tokens(model))

    def classifier_macs(self, model: TimmModule) -> int:
        heads = [model.head] + ([model.head_dist] if isinstance(model, VisionTransformerDistilled) else [])
        return sum(linear_macs(head) for head in heads)
