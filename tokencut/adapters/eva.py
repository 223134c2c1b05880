"""Every architecture that timm builds of its class `Eva`: EVA, EVA-02, RoPE-ViT, DINOv3, Perception Encoder, ..."""

from __future__ import annotations

from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from tokencut.adapters.base import register_adapter
from tokencut.adapters.columnar import patches
from tokencut.adapters.rotary import RotaryAdapter, ScaledBlockHandler
from tokencut.adapters.vit_blocks import ResPostBlockHandler
from tokencut.attention import TimmModule
from tokencut.tokens import Tokens


class PostNormHandler(ResPostBlockHandler, ScaledBlockHandler):
    """`EvaBlockPostNorm`: the norms stand behind attention and MLP."""


@register_adapter
class EvaAdapter(RotaryAdapter):
    """Rotary positions of any kind or none, beside learned ones or without; class and register tokens; q/k/v biases
    apart, grouped queries, gates, SwiGLU, LayerScale, norms before or behind; class, average or attention pooling.
    """

    family = "EVA / DINOv3"
    timm_modules = ("eva",)
    classes = (Eva,)
    handlers = {EvaBlock: ScaledBlockHandler(), EvaBlockPostNorm: PostNormHandler()}

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        if model.training and model.patch_drop is not None:
            features, table, kept = _dropping(model, images)
        else:
            (features, table), kept = model._pos_embed(patches(model.patch_embed, images)), None
        return self.turned(model, model.norm_pre(features), table, self.grid(model, *images.shape[-2:]), kept)


def _dropping(model: TimmModule, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Features and table with some patches dropped by timm, and which are left, `(B, N)`; None for all."""
    kept: list[Tensor | None] = []
    hook = model.patch_drop.register_forward_hook(lambda _, __, output: kept.append(output[1]))
    try:
        features, table = model._pos_embed(patches(model.patch_embed, images))
    finally:
        hook.remove()
    return features, table, kept[0]
