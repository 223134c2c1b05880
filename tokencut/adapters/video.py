"""Vision Transformers whose tokens are tubelets of a clip: VideoMAE, ViViT."""

from __future__ import annotations

from torch import Tensor

from tokencut.adapters import vit_blocks
from tokencut.adapters.base import register_adapter
from tokencut.adapters.columnar import ColumnarAdapter
from tokencut.adapters.space_time import SpaceTimeTransformer
from tokencut.attention import TimmModule
from tokencut.ops import static
from tokencut.tokens import Tokens


@register_adapter
class VideoAdapter(ColumnarAdapter):
    """Joint attention over space and time: all tubelets of a clip are tokens of one sequence."""

    family = "VideoMAE / ViViT"
    timm_modules = ("space_time",)
    classes = (SpaceTimeTransformer,)
    handlers = vit_blocks.HANDLERS

    def frames(self, model: TimmModule) -> int | None:
        return int(model.patch_embed.num_frames)

    def grid_of(self, model: TimmModule, images: Tensor) -> tuple[int, ...]:
        return (images.shape[-3] // model.patch_embed.tubelet_size, *super().grid_of(model, images))

    def own_grid(self, model: TimmModule) -> tuple[int, ...]:
        grid: tuple[int, ...] = model.patch_embed.grid_size
        return grid

    def changes(self, model: TimmModule, images: Tensor) -> Tensor:
        return static.changes(images, (model.patch_embed.tubelet_size, *model.patch_embed.patch_size))

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        features = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return Tokens(features, self.num_prefix_tokens(model))

    def patches(self, model: TimmModule) -> int:
        return int(model.patch_embed.num_patches)

    def embed_macs(self, model: TimmModule) -> int:
        return int(model.patch_embed.proj.weight.numel() * self.patches(model))
