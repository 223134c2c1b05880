"""Vision Transformers of video clips whose tokens are tubelets: VideoMAE (arXiv 2203.12602), ViViT (2103.15691).

timm has no such models, so their class stands here, made of timm's own parts, and their names enter timm's registry
when this is imported: then `timm.create_model("videomae_base_patch16_224")` builds one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokencut.calling import has_hooks, is_patched
from tokencut.errors import ModelError

# What `pos_embed` may be: a table that is learned, or one of sines that never changes.
SINES = "sines"


class TubeletEmbed(nn.Module):
    """Cuts clips into tubelets and embeds each: a convolution over frames, rows and columns.

    Attributes:
        img_size: Height and width of a frame in px.
        patch_size: Height and width of a tubelet in px.
        num_frames: Frames of a clip.
        tubelet_size: Frames of a tubelet.
        grid_size: Tubelets along frames, rows and columns.
        num_patches: Tubelets of a clip.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        num_frames: int = 16,
        tubelet_size: int = 2,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        self.tubelet_size = tubelet_size
        kernel = (tubelet_size, *self.patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel, stride=kernel, bias=bias, device=device, dtype=dtype)
        self._resize(to_2tuple(img_size), num_frames)

    def _resize(self, img_size: tuple[int, int], num_frames: int) -> None:
        self.img_size, self.num_frames = img_size, num_frames
        self.grid_size = (num_frames // self.tubelet_size, *self.dynamic_feat_size(img_size))
        self.num_patches = self.grid_size[0] * self.grid_size[1] * self.grid_size[2]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Height and width of a tubelet in px, or the larger of them."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Tubelets along rows and columns of frames of another size in px."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, clips: Tensor) -> Tensor:
        """Clips `(B, C, frames, H, W)` to tokens `(B, N, D)`, ordered by frame, then row, then column."""
        expected = (self.in_chans, self.num_frames, *self.img_size)
        if tuple(clips.shape[1:]) != expected:
            shape, wanted = tuple(clips.shape), ", ".join(map(str, expected))
            swapped = clips.ndim == 5 and (clips.shape[2], clips.shape[1], *clips.shape[3:]) == expected
            how = "transpose(1, 2) makes them of transformers' pixel_values" if swapped else (
                "channels, frames, height and width are what the model is built for")  # fmt: skip
            raise ModelError(f"the model takes clips (B, {wanted}), and these are {shape}; {how}")
        proj: Any = self.proj
        plain = type(proj) is nn.Conv3d and not (has_hooks(proj) or is_patched(proj))
        # As one matrix product there, as patches of images are (`adapters.columnar.patches`).
        if plain and clips.is_cuda and clips.dtype in (torch.float16, torch.bfloat16):
            return F.linear(self.cut(clips), proj.weight.flatten(1), proj.bias)
        tokens: Tensor = proj(clips).flatten(2).transpose(1, 2)
        return tokens

    def cut(self, clips: Tensor) -> Tensor:
        """The pixels of each tubelet, `(B, N, C * frames * H * W)` of a tubelet's, in the order of the weights."""
        (steps, rows, columns), (height, width) = self.grid_size, self.patch_size
        whole = clips[:, :, : steps * self.tubelet_size, : rows * height, : columns * width]
        parts = whole.reshape(len(clips), self.in_chans, steps, self.tubelet_size, rows, height, columns, width)
        return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(clips), self.num_patches, -1)


class SpaceTimeTransformer(VisionTransformer):
    """timm's `VisionTransformer` on tubelets, with joint attention over space and time.

    Takes clips `(B, C, frames, H, W)`. Beside timm's arguments there are those of a clip and of two layer norms.
    """

    def __init__(
        self,
        *,
        num_frames: int = 16,
        tubelet_size: int = 2,
        pos_embed: str = SINES,
        norm_eps: float = 1e-6,
        fc_norm_eps: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Builds it with random weights.

        Args:
            num_frames: Frames of a clip.
            tubelet_size: Frames of a tubelet.
            pos_embed: `sines` for VideoMAE's table, which is never trained, or timm's `learn`.
            norm_eps: What layer norms add to a variance.
            fc_norm_eps: The same for the one behind the pooling; `norm_eps` where None.
            kwargs: timm's other arguments.
        """
        if kwargs.get("dynamic_img_size") or kwargs.get("dynamic_img_pad"):
            raise ValueError("clips have one size, and there is no dynamic_img_size")
        dynamic = ("dynamic_img_size", "dynamic_img_pad")
        kwargs = {name: value for name, value in kwargs.items() if name not in dynamic}
        super().__init__(
            **kwargs,
            pos_embed="learn" if pos_embed == SINES else pos_embed,
            embed_layer=partial(_tubelets, num_frames=num_frames, tubelet_size=tubelet_size),
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        )
        if fc_norm_eps is not None and isinstance(self.fc_norm, nn.LayerNorm):
            self.fc_norm.eps = fc_norm_eps
        self.has_sines = pos_embed == SINES
        self._write_sines()

    def _write_sines(self) -> None:
        table = self.pos_embed
        if getattr(self, "has_sines", False) and table is not None:  # the first time before it is known
            with torch.no_grad():
                table.requires_grad_(False).copy_(sines(table.shape[1], self.embed_dim))

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """As timm's; a table of sines stays one."""
        super().init_weights(mode, needs_reset)
        self._write_sines()

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: Any = None) -> None:
        """Changes the size of frames in place: sines are made anew, learned positions resampled frame by frame.

        Args:
            img_size: Height and width in px; as it is where None.
            patch_size: Must be what it is: no other tubelets can be made of learned ones.

        Raises:
            ModelError: Another size of patches is asked for.
        """
        embed: Any = self.patch_embed
        if patch_size is not None and to_2tuple(patch_size) != embed.patch_size:
            raise ModelError(f"tubelets of {embed.patch_size} px cannot be resampled to {patch_size}; leave "
                             "that out, or build the model with it")  # fmt: skip
        before = embed.grid_size
        embed._resize(to_2tuple(img_size or embed.img_size), embed.num_frames)
        after = embed.grid_size[1:]
        if self.pos_embed is None:
            return
        prefix, old = 0 if self.no_embed_class else self.num_prefix_tokens, self.pos_embed.detach()
        if self.has_sines:
            table = sines(prefix + embed.num_patches, self.embed_dim).to(old)
        else:
            grid = old[0, prefix:].unflatten(0, before).permute(0, 3, 1, 2)
            grid = F.interpolate(grid.float(), size=after, mode="bicubic", antialias=True).to(old.dtype)
            patches = grid.permute(0, 2, 3, 1).reshape(1, embed.num_patches, -1)
            table = torch.cat((old[:, :prefix], patches), 1)
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)

    def forward_intermediates(  # type: ignore[override]  # nothing here has a mask
        self,
        x: Tensor,
        indices: Any = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """timm's, whose `NCHW` is `(B, D, frames, rows, columns)` of tubelets here."""
        reshape, (taken, last) = output_fmt == "NCHW", feature_take_indices(len(self.blocks), indices)
        tokens, found = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))), []
        for number, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            tokens = block(tokens)
            if number in taken:
                found.append(self.norm(tokens) if norm else tokens)
        prefix, grid = self.num_prefix_tokens, self.patch_embed.grid_size
        prefixes = [each[:, :prefix] for each in found] if return_prefix_tokens and prefix else None
        found = [each[:, prefix:].unflatten(1, grid).movedim(-1, 1).contiguous() if reshape else each[:, prefix:]
                 for each in found]  # fmt: skip
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": found}
            named |= {} if prefixes is None else {"image_intermediates_prefix": prefixes}
            return named if intermediates_only else {**named, "image_features": self.norm(tokens)}
        outputs = found if prefixes is None else list(zip(found, prefixes, strict=True))
        return outputs if intermediates_only else (self.norm(tokens), outputs)


def _tubelets(*, dynamic_img_pad: bool, **arguments: Any) -> TubeletEmbed:
    return TubeletEmbed(**arguments)


def sines(count: int, width: int) -> Tensor:
    """VideoMAE's table of positions, fp32 `(1, count, width)`: sines and cosines of the token's number, in turns.

    Args:
        count: Tokens.
        width: Numbers a token.
    """
    pairs = torch.arange(width, dtype=torch.float64) // 2
    angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (2 * pairs / width)
    table = torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos())
    return table.float().unsqueeze(0)


def _cfg(**more: Any) -> dict[str, Any]:
    return {
        "url": "", "num_classes": 400, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 1.0,
        "interpolation": "bilinear", "fixed_input_size": True, "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225), "first_conv": "patch_embed.proj", "classifier": "head", **more,
    }  # fmt: skip


default_cfgs = generate_default_cfgs({
    "videomae_small_patch16_224": _cfg(),
    "videomae_base_patch16_224": _cfg(),
    "videomae_large_patch16_224": _cfg(),
    "videomae_huge_patch16_224": _cfg(),
    "vivit_base_patch16x2_224": _cfg(crop_pct=0.875, mean=(0.75,) * 3, std=(0.25,) * 3),
})  # fmt: skip


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SpaceTimeTransformer:
    built: SpaceTimeTransformer = build_model_with_cfg(SpaceTimeTransformer, variant, pretrained, **kwargs)
    return built


def _videomae(variant: str, pretrained: bool, given: dict[str, Any], **sizes: int) -> SpaceTimeTransformer:
    usual = {"class_token": False, "global_pool": "avg", "norm_eps": 1e-12, "fc_norm_eps": 1e-5, "num_classes": 400}
    return _create(variant, pretrained, **{**usual, **sizes, **given})


@register_model
def videomae_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> SpaceTimeTransformer:
    """VideoMAE-S, 16 frames in tubelets of 2 x 16 x 16."""
    sizes = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _videomae("videomae_small_patch16_224", pretrained, kwargs, **sizes)


@register_model
def videomae_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> SpaceTimeTransformer:
    """VideoMAE-B, 16 frames in tubelets of 2 x 16 x 16."""
    sizes = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return _videomae("videomae_base_patch16_224", pretrained, kwargs, **sizes)


@register_model
def videomae_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> SpaceTimeTransformer:
    """VideoMAE-L, 16 frames in tubelets of 2 x 16 x 16."""
    sizes = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _videomae("videomae_large_patch16_224", pretrained, kwargs, **sizes)


@register_model
def videomae_huge_patch16_224(pretrained: bool = False, **kwargs: Any) -> SpaceTimeTransformer:
    """VideoMAE-H, 16 frames in tubelets of 2 x 16 x 16."""
    sizes = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
    return _videomae("videomae_huge_patch16_224", pretrained, kwargs, **sizes)


@register_model
def vivit_base_patch16x2_224(pretrained: bool = False, **kwargs: Any) -> SpaceTimeTransformer:
    """ViViT-B/16x2 with joint space-time attention (model 1), 32 frames."""
    usual = {"num_frames": 32, "pos_embed": "learn", "act_layer": "gelu_tanh", "num_classes": 400}
    return _create("vivit_base_patch16x2_224", pretrained, **{**usual, **kwargs})
