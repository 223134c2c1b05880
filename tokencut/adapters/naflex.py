"""Every architecture that timm builds of its class `NaFlexVit`, on images of one size."""

from __future__ import annotations

from dataclasses import replace

from timm.layers import RotaryEmbeddingMixed
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from tokencut.adapters import columnar, vit_blocks
from tokencut.adapters.base import Context, linear_macs, register_adapter
from tokencut.adapters.rotary import RotaryAdapter, ScaledBlockHandler
from tokencut.attention import TimmModule
from tokencut.tokens import Tokens


@register_adapter
class NaFlexAdapter(RotaryAdapter):
    """Blocks of a ViT, or of EVA with rotary positions of any kind; class and register tokens or none; class, average
    or attention pooling. Images of a batch have one size; NaFlex batches, in which each has a grid of its own, are
    refused: a stage leaves as many tokens of each image.
    """

    family = "NaFlexViT"
    timm_modules = ("naflexvit",)
    classes = (NaFlexVit,)
    handlers = {**vit_blocks.HANDLERS, EvaBlock: ScaledBlockHandler()}

    def grid(self, model: TimmModule, height: int, width: int) -> tuple[int, int]:
        rows, columns = model.embeds.dynamic_feat_size((height, width))
        return int(rows), int(columns)

    def input_size(self, model: TimmModule) -> tuple[int, int] | None:
        return columnar.described_size(model)

    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        height, width = model.embeds.patch_size
        return int(height), int(width)

    def class_rows(self, model: TimmModule) -> tuple[int, ...]:
        return (0,) if model.has_class_token else ()

    def called_as_one(self, model: TimmModule) -> nn.Module | None:
        return None

    def refused_form(self, images: object) -> str | None:
        if isinstance(images, Tensor) and images.ndim == 4:
            return None
        return (
            "NaFlex batches, in which each image has a grid and padding of its own, cannot be reduced, since a stage "
            "leaves as many tokens of each image; give images of one size, (B, C, H, W)"
        )

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        found = model._forward_embeds(images, None, None, None)
        table, kept = found["rope_embeds"], found["keep_indices"]
        tokens = self.turned(model, found["patches"], table, self.grid(model, *images.shape[-2:]), kept)
        if kept is not None and isinstance(model.rope, RotaryEmbeddingMixed):
            return replace(tokens, shared=None)  # timm picks what is left block by block
        return tokens

    def context(self, model: TimmModule, number: int, tokens: Tokens) -> Context:
        if isinstance(model.blocks[number - 1], EvaBlock):
            return super().context(model, number, tokens)
        return Context(tokens.bias)

    def embed_macs(self, model: TimmModule) -> int:
        embeds = model.embeds
        if embeds.is_linear:
            return linear_macs(embeds) * self.patches(model)
        return int(embeds.proj.weight.numel() * self.patches(model))
