"""Vision encoders of DeepSeek's and Qwen's language models, by timm's `deepseek_vit` and `qwen3_vit`.

They come alone, or inside a classifier. What makes their output for a language model takes patches by squares of the
grid; for that merged tokens are spread over their patches again.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models.deepseek_vit import DeepseekVitBlock, DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.eva import EvaBlock
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import Tensor, nn

from tokencut.adapters import columnar
from tokencut.adapters.base import Context, linear_macs, register_adapter
from tokencut.adapters.positions import grid_positions
from tokencut.adapters.rotary import RotaryAdapter, RotaryContext, ScaledBlockHandler
from tokencut.adapters.vit_blocks import Layers
from tokencut.attention import TimmModule
from tokencut.cost import Macs, ModelCost
from tokencut.errors import ModelError
from tokencut.tokens import Tokens


class EncoderAdapter(RotaryAdapter):
    """An encoder, or a classifier around it (`model.encoder`), without prefix tokens."""

    @abstractmethod
    def projector(self, model: TimmModule) -> TimmModule | None:
        """What makes the output for a language model of patches `(B, rows, columns, D)`; None where it is left out."""

    @abstractmethod
    def squares(self, model: TimmModule, grid: tuple[int, int]) -> int:
        """How many squares of patches the projector makes tokens of."""

    def check_squares(self, model: TimmModule, side: int) -> None:
        """Refuses images that do not come out even in squares of `side` x `side` patches.

        Raises:
            ModelError: With the nearest size that does.
        """
        size, patch = self.input_size(model), self.patch_size(model)
        assert size is not None
        rows, columns = self.grid(model, *size)
        if self.projector(model) is None or (rows % side, columns % side) == (0, 0):
            return
        height, width = (max(1, round(pixels / (side * part))) * side * part
                         for pixels, part in zip(size, patch, strict=True))  # fmt: skip
        raise ModelError(f"its projector takes squares of {side} x {side} patches, and images of {size[0]} x {size[1]} "
                         f"px have {rows} x {columns}; give such as `img_size=({height}, {width})`")  # fmt: skip

    def projector_macs(self, model: TimmModule, squares: int) -> int:
        """Multiply-adds of the projector for so many squares."""
        projector: Any = self.projector(model)
        return linear_macs(projector) * squares

    def looked_up(self, model: TimmModule) -> dict[str, Any]:
        width = getattr(self.projector(model), "out_features", None)
        return {} if width is None else {"out_features": int(width)}

    def core(self, model: TimmModule) -> TimmModule:
        return getattr(model, "encoder", model)

    def passed_by(self, model: TimmModule) -> list[nn.Module]:
        return [model.encoder] if hasattr(model, "encoder") else []

    def recomputes(self, model: TimmModule) -> bool:
        return super().recomputes(self.core(model))

    def classifier(self, model: TimmModule) -> nn.Module:
        return model.head if hasattr(model, "encoder") else nn.Identity()

    def follows_patches(self, model: TimmModule) -> bool:
        return super().follows_patches(model) or self._takes_grid(model)

    def _takes_grid(self, model: TimmModule) -> bool:
        return self.projector(model) is not None or model.global_pool != "avg"

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        core = self.core(model)
        features, table = core._pos_embed(core.patch_embed(images))
        return self.turned(model, features, table, self.grid(model, *images.shape[-2:]))

    def final_norm(self, model: TimmModule, features: Tensor) -> Tensor:
        norm = getattr(self.core(model), "norm", None)  # Qwen's encoder has none
        return features if norm is None else norm(features)

    def forward_head(self, model: TimmModule, tokens: Tokens, pre_logits: bool = False) -> Tensor:
        counts, x = tokens.counts(), tokens.features
        if self._takes_grid(model):
            x, counts = self.output(model, tokens), None
        classifies = hasattr(model, "encoder")
        if not classifies and self._takes_grid(model):
            return x
        x = x.flatten(1, -2)
        if model.global_pool == "avg":
            x = x.mean(1) if counts is None else columnar.average_pool("avg", x, counts, 0)
        if not classifies:
            return x
        x = model.head_drop(model.norm(x))
        return x if pre_logits else model.head(x)

    def output(self, model: TimmModule, tokens: Tokens) -> Tensor:
        """What the encoder gives: every patch's features, or what the projector makes of them."""
        x, projector = on_grid(tokens), self.projector(model)
        return x if projector is None else projector(x)

    def cost(self, model: TimmModule) -> ModelCost:
        cost, projector = super().cost(model), self.projector(model)
        patches = cost.patches
        fixed = 0
        if projector is not None:
            size = self.input_size(model)
            assert size is not None
            patches = self.squares(model, self.grid(model, *size))
            fixed = self.projector_macs(model, patches)
        classifier = linear_macs(self.classifier(model))
        return replace(cost, head=Macs(fixed=fixed + classifier * (1 if model.global_pool == "avg" else patches)))

    def classifier_macs(self, model: TimmModule) -> int:
        return linear_macs(self.classifier(model))


def on_grid(tokens: Tokens) -> Tensor:
    """Tokens spread over their patches, `(B, rows, columns, D)`; a patch that was dropped takes the nearest token.

    Raises:
        ModelError: It is not known which patch went into which token.
    """
    source, positions, grid = tokens.source, tokens.positions, tokens.grid
    if source is None or positions is None or grid is None:
        raise ModelError("this model's output is made of squares of patches, and the features don't tell where their "
                         "tokens are; call the model")  # fmt: skip
    patches = grid_positions(grid, positions.device)
    nearest = (patches.view(1, -1, 1, 2) - positions.unsqueeze(1)).square().sum(-1).argmin(2)
    index = torch.where(source < 0, nearest, source).unsqueeze(2).expand(-1, -1, tokens.features.shape[2])
    return tokens.features.gather(1, index).unflatten(1, grid)


@dataclass(frozen=True)
class MaskFreeContext(RotaryContext):
    """`RotaryContext` of a block whose `forward` takes no mask."""

    def block_arguments(self) -> dict[str, Any]:
        return {"rope": self.table}

    def given(self, **arguments: Any) -> Context:
        return replace(self, table=arguments.get("rope"))


class DeepseekBlockHandler(ScaledBlockHandler):
    """`DeepseekVitBlock`: pre-norm without LayerScale."""

    def attention_half(self, block: TimmModule, x: Tensor, context: Context) -> tuple[Tensor, Layers]:
        y, maps = self.attend(block.attn, block.norm1(x), context)
        return x + block.drop_path1(y), (maps,)

    def mlp_half(self, block: TimmModule, x: Tensor) -> Tensor:
        return x + block.drop_path2(block.mlp(block.norm2(x)))


@register_adapter
class DeepseekAdapter(EncoderAdapter):
    """DeepSeek's encoder: rotary positions, SwiGLU; its aligner takes squares of 3 x 3 patches."""

    family = "DeepSeek vision"
    timm_modules = ("deepseek_vit",)
    classes = (DeepseekVitEncoder, DeepseekVitClassifier)
    handlers = {DeepseekVitBlock: DeepseekBlockHandler()}

    def projector(self, model: TimmModule) -> TimmModule | None:
        return self.core(model).aligner

    def squares(self, model: TimmModule, grid: tuple[int, int]) -> int:
        side = self.core(model).downsample_ratio
        return math.ceil(grid[0] / side) * math.ceil(grid[1] / side)

    def context(self, model: TimmModule, number: int, tokens: Tokens) -> Context:
        return MaskFreeContext(tokens.bias, tokens.shared)

    def needs_halves(self, block: TimmModule, features: Tensor, context: Context) -> bool:
        return context.bias is not None


@register_adapter
class Qwen3Adapter(EncoderAdapter):
    """Qwen3's encoder: learned and rotary positions; its merger takes squares of 2 x 2 patches."""

    family = "Qwen3 vision"
    timm_modules = ("qwen3_vit",)
    classes = (Qwen3VitEncoder, Qwen3VitClassifier)
    handlers = {EvaBlock: ScaledBlockHandler()}

    def check(self, model: TimmModule) -> None:
        super().check(model)
        self.check_squares(model, self.core(model).merge_size)

    def projector(self, model: TimmModule) -> TimmModule | None:
        return self.core(model).merger

    def squares(self, model: TimmModule, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1] // self.core(model).merge_size ** 2
