"""Every architecture that timm builds of its class `VisionTransformer`, also with convolutions before the blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, AttentionPoolPrr, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokencut.adapters import vit_blocks
from tokencut.adapters.base import Adapter, Context, counted_macs, linear_macs, register_adapter
from tokencut.adapters.pooling import ClassAndMean, weighted_mean
from tokencut.adapters.subclasses import known_class, why_unknown
from tokencut.attention import AttentionInfo, TimmModule, has_biased_kernel
from tokencut.calling import call, has_hooks, is_patched, unwrapped
from tokencut.cost import Macs, ModelCost
from tokencut.errors import ModelError
from tokencut.tokens import Tokens

_CLASSES = (VisionTransformer, VisionTransformerDistilled)
_AVERAGE_POOLS = ("avg", "avgmax")


@register_adapter
class ViTAdapter(Adapter):
    """Plain, distilled (two heads), register tokens, no class token, average or attention pooling, LayerScale,
    q/k norm, pre-norm, res-post-norm, parallel and differential blocks; patches cut by one convolution, or by a whole
    backbone of them (hybrids, ViTamin).
    """

    family = "ViT / DeiT"
    timm_modules = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin")

    def accepts(self, model: nn.Module) -> bool:
        return known_class(model, _CLASSES) is not None

    def why_not(self, model: nn.Module) -> str | None:
        return why_unknown(model, _CLASSES)

    def check(self, model: TimmModule) -> None:
        embed = model.patch_embed
        if not len(model.blocks) or not embed.num_patches:
            what = "blocks" if embed.num_patches else f"patches of {embed.patch_size[0]} px in images of its size"
            raise ModelError(
                f"the model has no {what}, so there is nothing to reduce; change `img_size` or `model_kwargs`"
            )
        if embed.dynamic_img_pad and not model.dynamic_img_size and _patch_count(embed) != embed.num_patches:
            raise ModelError("dynamic_img_pad works with dynamic_img_size only; add `dynamic_img_size=True`")
        for block in model.blocks:
            vit_blocks.handler(block).check(block)
        pool = _attention_pool_of(model)
        if pool is not None and known_class(pool, (AttentionPoolLatent, AttentionPoolPrr, ClassAndMean)) is None:
            raise ModelError(f"the attention pooling {type(pool).__name__} is not known to tokencut; "
                             "please report the model's name")  # fmt: skip

    def num_prefix_tokens(self, model: TimmModule) -> int:
        return int(model.num_prefix_tokens)

    def grid(self, model: TimmModule, height: int, width: int) -> tuple[int, int]:
        rows, columns = model.patch_embed.dynamic_feat_size((height, width))
        return int(rows), int(columns)

    def input_size(self, model: TimmModule) -> tuple[int, int] | None:
        return model.patch_embed.img_size

    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        height, width = model.patch_embed.feat_ratio(as_scalar=False)
        return int(height), int(width)

    def classifier(self, model: TimmModule) -> nn.Module:
        return model.head

    def separate_heads(self, model: TimmModule, apart: bool) -> bool:
        if not isinstance(model, VisionTransformerDistilled):
            return False
        model.set_distilled_training(apart)
        return True

    def blocks(self, model: TimmModule) -> nn.ModuleList | nn.Sequential:
        return model.blocks

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        features = model.norm_pre(model.patch_drop(model._pos_embed(_patches(model.patch_embed, images))))
        return Tokens(features, self.num_prefix_tokens(model))

    def run(self, block: TimmModule, tokens: Tokens, context: Context) -> Tokens:
        features, bias = tokens.features, context.bias
        if bias is None:
            return tokens.with_features(block(features))
        handler = vit_blocks.handler(block)
        # timm would pass the bias as a mask, which rules out the fastest kernels.
        if has_biased_kernel(bias, features) or handler.passes_hooks_by(block):

            def halves(features: Tensor, attn_mask: Tensor | None = None) -> Tensor:
                return handler.mlp_half(block, handler.attention_half(block, features, attn_mask)[0])

            return tokens.with_features(call(block, halves, features, attn_mask=bias))
        return tokens.with_features(block(features, attn_mask=bias))

    def stood_in_for(self, block: TimmModule) -> list[nn.Module]:
        return [block, *vit_blocks.handler(block).attentions(block)]

    def attention_half(
        self, model: TimmModule, block: TimmModule, tokens: Tokens, context: Context
    ) -> tuple[Tokens, AttentionInfo]:
        features, layers = vit_blocks.handler(block).attention_half(block, tokens.features, context.bias)
        info = AttentionInfo(layers, tokens.num_prefix_tokens, _class_rows(model), context.bias)
        return tokens.with_features(features), info

    def mlp_half(self, block: TimmModule, tokens: Tokens) -> Tokens:
        return tokens.with_features(vit_blocks.handler(block).mlp_half(block, tokens.features))

    def pre_mlp_norm(self, block: TimmModule, features: Tensor) -> Tensor:
        return vit_blocks.handler(block).pre_mlp_norm(block, features)

    def final_norm(self, model: TimmModule, features: Tensor) -> Tensor:
        normed: Tensor = model.norm(features)
        return normed

    def forward_head(self, model: TimmModule, tokens: Tokens, pre_logits: bool = False) -> Tensor:
        features, bias = tokens.features, tokens.bias
        pool = _attention_pool_of(model)
        weighted = pool is None and model.global_pool in _AVERAGE_POOLS
        if isinstance(pool, AttentionPoolLatent) and bias is not None:
            pooled = _attention_pool(model, features, bias)
        elif isinstance(pool, ClassAndMean):
            pooled = pool(features, tokens.counts())
        elif weighted and (counts := tokens.counts()) is not None:
            pooled = _average_pool(model, features, counts)
        else:
            return super().forward_head(model, tokens, pre_logits)
        pooled = model.head_drop(model.fc_norm(pooled))
        return pooled if pre_logits else model.head(pooled)

    def pools_by_size(self, model: TimmModule) -> bool:
        pool = _attention_pool_of(model)
        return isinstance(pool, (AttentionPoolLatent, ClassAndMean)) or model.global_pool in _AVERAGE_POOLS

    def cost(self, model: TimmModule) -> ModelCost:
        embed = model.patch_embed
        patches = _patch_count(embed)
        pooled, head_prefix_tokens = _pool_macs(model)
        return ModelCost(
            embed=_embed_macs(embed),
            blocks=tuple(vit_blocks.handler(b).cost(b, max(1, len(_class_rows(model)))) for b in model.blocks),
            head=pooled,
            num_prefix_tokens=self.num_prefix_tokens(model),
            patches=patches,
            head_prefix_tokens=head_prefix_tokens,
        )


def _patch_count(embed: TimmModule) -> int:
    """Patches of an image of the size that the model is built for, with those that padding adds."""
    rows, columns = embed.dynamic_feat_size(embed.img_size)
    return int(rows * columns)


def _embed_macs(embed: TimmModule) -> int:
    """Multiply-adds of making patches."""
    if not isinstance(embed, PatchEmbed):
        return counted_macs(embed, (embed.in_chans, *embed.img_size))
    proj: TimmModule = unwrapped(embed.proj)
    if isinstance(proj, nn.Conv2d):
        return int(proj.weight.numel() * _patch_count(embed))
    return counted_macs(embed, (proj.base_layer.in_channels, *embed.img_size))  # LoRA's


def _patches(embed: TimmModule, images: Tensor) -> Tensor:
    """timm's patch embedding, `(B, C, H, W)` to `(B, N, D)`.

    In half precision on a GPU as one matrix product: the convolution of 16 x 16 patches alone took 1.6 of DeiT-S's
    11 ms there (H100, bf16, batch 256).
    """
    plain = type(embed) is PatchEmbed and type(embed.proj) is nn.Conv2d and embed.flatten and not embed.dynamic_img_pad
    plain = plain and tuple(images.shape[-2:]) == tuple(embed.img_size or ())
    plain = plain and not any(has_hooks(part) or is_patched(part) for part in (embed, embed.proj))
    if not (plain and images.is_cuda and images.dtype in (torch.float16, torch.bfloat16)):
        return embed(images)
    (rows, columns), (height, width) = embed.grid_size, embed.patch_size
    pixels = (
        images[:, :, : rows * height, : columns * width].unflatten(3, (columns, width)).unflatten(2, (rows, height))
    )
    pixels = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return embed.norm(F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias))


def _class_rows(model: TimmModule) -> tuple[int, ...]:
    """Positions of the class token and the distillation token."""
    if isinstance(model, VisionTransformerDistilled):
        return (0, 1)
    return (0,) if model.cls_token is not None else ()


def _average_pool(model: TimmModule, features: Tensor, counts: Tensor) -> Tensor:
    """timm's `avg` and `avgmax` pooling with each token counted as often as it holds patches."""
    skipped = 0 if model.pool_include_prefix else model.num_prefix_tokens
    seen, prefix = features[:, skipped:], model.num_prefix_tokens - skipped
    counts = nn.functional.pad(counts, (prefix, 0), value=1.0)
    mean = weighted_mean(seen, counts)
    return mean if model.global_pool == "avg" else 0.5 * (seen.amax(1) + mean)


def _attention_pool_of(model: TimmModule) -> TimmModule | None:
    """timm's attention pooling, out of what is wrapped around it; None where tokens are pooled otherwise."""
    pool = getattr(model, "attn_pool", None)
    return None if pool is None else unwrapped(pool)


def _attention_pool(model: TimmModule, features: Tensor, bias: Tensor) -> Tensor:
    """timm's latent attention pooling under proportional attention."""
    skipped = 0 if model.pool_include_prefix else model.num_prefix_tokens
    return model.attn_pool(features[:, skipped:], attn_mask=bias[..., skipped:])


def _pool_macs(model: TimmModule) -> tuple[Macs, int]:
    """Multiply-adds of pooling and classifier, and how many prefix tokens their token count includes."""
    heads = [model.head] + ([model.head_dist] if isinstance(model, VisionTransformerDistilled) else [])
    classifier = sum(linear_macs(head) for head in heads)
    included = model.num_prefix_tokens if model.pool_include_prefix else 0
    pool = _attention_pool_of(model)
    if isinstance(pool, AttentionPoolLatent):
        latent, width = pool.latent_len, pool.num_heads * pool.head_dim
        once = sum(linear_macs(part) for part in (pool.q, pool.proj, pool.mlp) if part is not None) * latent
        return Macs(fixed=once + classifier, per_token=linear_macs(pool.kv) + 2 * width * latent), included
    if isinstance(pool, AttentionPoolPrr):
        return Macs(fixed=classifier, per_pair=2 * model.embed_dim), included
    if isinstance(pool, ClassAndMean):
        return Macs(fixed=classifier), included
    if not model.global_pool:
        return Macs(per_token=classifier), model.num_prefix_tokens
    return Macs(fixed=classifier), included
