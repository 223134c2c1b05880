"""What families have in common whose tokens run through one column of blocks: patches, two halves, pooling, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, AttentionPoolPrr, PatchEmbed
from torch import Tensor, nn

from tokencut.adapters.base import Adapter, Context, counted_macs, linear_macs
from tokencut.adapters.pooling import ClassAndMean, weighted_mean
from tokencut.adapters.subclasses import known_class, why_unknown
from tokencut.adapters.vit_blocks import BlockHandler
from tokencut.attention import AttentionInfo, TimmModule, has_biased_kernel
from tokencut.calling import call, is_bare, parts_of, through, unwrapped
from tokencut.cost import Macs, ModelCost
from tokencut.errors import ModelError
from tokencut.tokens import Tokens

_AVERAGE_POOLS = ("avg", "avgmax")


class ColumnarAdapter(Adapter):
    """A model with timm's `patch_embed`, `blocks`, `norm`, pooling, `fc_norm`, `head_drop` and `head`; patches and
    blocks may stand in a part of it, `core`.

    Attributes:
        classes: timm's classes of such models; those derived from them are taken where they run as these do.
        handlers: What runs each class of block in halves.
    """

    classes: ClassVar[tuple[type[nn.Module], ...]]
    handlers: ClassVar[Mapping[type[nn.Module], BlockHandler]]

    def accepts(self, model: nn.Module) -> bool:
        return known_class(model, self.classes) is not None

    def why_not(self, model: nn.Module) -> str | None:
        return why_unknown(model, self.classes)

    def check(self, model: TimmModule) -> None:
        patches = self.patches(model)
        if not len(self.blocks(model)) or not patches:
            what = f"patches of {self.patch_size(model)[0]} px in images of its size" if not patches else "blocks"
            raise ModelError(
                f"the model has no {what}, so there is nothing to reduce; change `img_size` or `model_kwargs`"
            )
        embed = getattr(self.core(model), "patch_embed", None)
        dynamic = getattr(model, "dynamic_img_size", False)
        if (
            getattr(embed, "dynamic_img_pad", False)
            and not dynamic
            and patches != getattr(embed, "num_patches", patches)
        ):
            raise ModelError("dynamic_img_pad works with dynamic_img_size only; add `dynamic_img_size=True`")
        for block in self.blocks(model):
            self.handler(block).check(block)
        pool = _attention_pool_of(model)
        if pool is not None and known_class(pool, (AttentionPoolLatent, AttentionPoolPrr, ClassAndMean)) is None:
            raise ModelError(f"the attention pooling {type(pool).__name__} is not known to tokencut; "
                             "please report the model's name")  # fmt: skip

    def handler(self, block: TimmModule) -> BlockHandler:
        """What runs a block in halves.

        Raises:
            ModelError: The block's class is not known.
        """
        kind = known_class(block, self.handlers)
        if kind is None:
            names = ", ".join(known.__name__ for known in self.handlers)
            why = why_unknown(block, self.handlers) or f"the block {type(block).__name__} is not known"
            raise ModelError(f"{why}: no stage can stand in it; tokencut knows {names}; use a model built from those")
        return self.handlers[kind]

    def core(self, model: TimmModule) -> TimmModule:
        """The part of a model that holds patches and blocks."""
        return model

    def num_prefix_tokens(self, model: TimmModule) -> int:
        return int(model.num_prefix_tokens)

    def grid(self, model: TimmModule, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.core(model).patch_embed.dynamic_feat_size((height, width))
        return int(rows), int(columns)

    def input_size(self, model: TimmModule) -> tuple[int, int] | None:
        return self.core(model).patch_embed.img_size

    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        height, width = self.core(model).patch_embed.feat_ratio(as_scalar=False)
        return int(height), int(width)

    def classifier(self, model: TimmModule) -> nn.Module:
        return model.head

    def blocks(self, model: TimmModule) -> nn.ModuleList | nn.Sequential:
        return self.core(model).blocks

    def class_rows(self, model: TimmModule) -> tuple[int, ...]:
        """Positions of the class token, and of the distillation token; empty where there is none."""
        return (0,) if getattr(model, "cls_token", None) is not None else ()

    def needs_halves(self, block: TimmModule, features: Tensor, context: Context) -> bool:
        """Whether a block that does not reduce is run in halves all the same."""
        if context.bias is None:
            return False
        # timm would pass the bias as a mask, which rules out the fastest kernels.
        return has_biased_kernel(context.bias, features) or self.handler(block).passes_hooks_by(block)

    def complete(self, block: TimmModule, context: Context) -> Context:
        """The context for a block that runs in halves: with what timm's block adds by itself."""
        return context

    def run(self, block: TimmModule, tokens: Tokens, context: Context) -> Tokens:
        return tokens.with_features(self._run((block,), tokens.features, context))

    def run_all(self, model: TimmModule, first: int, blocks: Sequence[TimmModule], tokens: Tokens) -> Tokens:
        kind = type(self)
        if kind.context is not Adapter.context or kind.entering is not Adapter.entering:
            return super().run_all(model, first, blocks, tokens)  # blocks differ in more than their features
        features, context = tokens.features, self.context(model, first, tokens)
        return tokens.with_features(self._run(blocks, features, context, _hurried(features)))

    def _run(self, blocks: Sequence[TimmModule], features: Tensor, context: Context, hurried: bool = False) -> Tensor:
        """Blocks that are given the same context, one after the other.

        Args:
            blocks: The blocks.
            features: Of the tokens entering, `(B, P + N, D)`.
            context: Their context.
            hurried: Whether a block with nothing around it runs in halves too, which call less than timm's block does:
                a sixth of a host's time, for which a GPU waits on small batches.
        """
        arguments = context.block_arguments()
        for block in blocks:
            kind = known_class(block, self.handlers) if hurried else None
            bare = kind is not None and self.handlers[kind].is_bare(block)
            if bare or self.needs_halves(block, features, context):
                features = self._in_halves(block, features, context)
            else:
                features = block(features, **arguments)
        return features

    def _in_halves(self, block: TimmModule, features: Tensor, context: Context) -> Tensor:
        handler = self.handler(block)

        def halves(features: Tensor, **given: Any) -> Tensor:
            whole = self.complete(block, context.given(**given) if given else context)
            return handler.mlp_half(block, handler.attention_half(block, features, whole)[0])

        if is_bare(block):
            return halves(features)
        called: Tensor = call(block, halves, features, **context.block_arguments())
        return called

    def stood_in_for(self, block: TimmModule) -> list[nn.Module]:
        return [block, *self.handler(block).attentions(block)]

    def attention_half(
        self, model: TimmModule, block: TimmModule, tokens: Tokens, context: Context
    ) -> tuple[Tokens, AttentionInfo]:
        context = self.complete(block, context)
        features, layers = self.handler(block).attention_half(block, tokens.features, context)
        info = AttentionInfo(layers, tokens.num_prefix_tokens, self.class_rows(model), context.bias)
        return tokens.with_features(features), info

    def mlp_half(self, block: TimmModule, tokens: Tokens) -> Tokens:
        return tokens.with_features(self.handler(block).mlp_half(block, tokens.features))

    def pre_mlp_norm(self, block: TimmModule, features: Tensor) -> Tensor:
        return self.handler(block).pre_mlp_norm(block, features)

    def final_norm(self, model: TimmModule, features: Tensor) -> Tensor:
        normed: Tensor = model.norm(features)
        return normed

    def forward_head(self, model: TimmModule, tokens: Tokens, pre_logits: bool = False) -> Tensor:
        features, bias = tokens.features, tokens.bias
        pool = _attention_pool_of(model)
        weighted = pool is None and model.global_pool in _AVERAGE_POOLS
        if isinstance(pool, AttentionPoolLatent) and bias is not None:
            skipped = self._skipped(model, tokens.num_prefix_tokens)
            # under proportional attention
            pooled = model.attn_pool(features[:, skipped:], attn_mask=bias[..., skipped:])
        elif isinstance(pool, ClassAndMean):
            pooled = pool(features, tokens.counts())
        elif weighted and (counts := tokens.counts()) is not None:
            skipped = self._skipped(model, tokens.num_prefix_tokens)
            pooled = average_pool(model.global_pool, features, counts, skipped)
        else:
            return super().forward_head(model, tokens, pre_logits)
        pooled = model.head_drop(model.fc_norm(pooled) if hasattr(model, "fc_norm") else pooled)
        return pooled if pre_logits else model.head(pooled)

    def pools_by_size(self, model: TimmModule) -> bool:
        pool = _attention_pool_of(model)
        return isinstance(pool, (AttentionPoolLatent, ClassAndMean)) or model.global_pool in _AVERAGE_POOLS

    def _skipped(self, model: TimmModule, prefix: int) -> int:
        """How many of the prefix tokens the pooling leaves out."""
        pools_all = getattr(model, "pool_include_prefix", getattr(model, "attn_pool", None) is not None)
        return 0 if pools_all else prefix

    def cost(self, model: TimmModule) -> ModelCost:
        blocks, rows = self.blocks(model), max(1, len(self.class_rows(model)))
        pooled, head_prefix_tokens = self._pool_macs(model)
        return ModelCost(
            embed=self.embed_macs(model),
            blocks=tuple(self.handler(block).cost(block, rows) for block in blocks),
            head=pooled,
            num_prefix_tokens=self.num_prefix_tokens(model),
            patches=self.patches(model),
            head_prefix_tokens=head_prefix_tokens,
        )

    def patches(self, model: TimmModule) -> int:
        """Patches of an image of the size that the model is built for, with those that padding adds."""
        size = self.input_size(model)
        assert size is not None
        rows, columns = self.grid(model, *size)
        return rows * columns

    def embed_macs(self, model: TimmModule) -> int:
        """Multiply-adds of making patches."""
        embed = self.core(model).patch_embed
        if not isinstance(embed, PatchEmbed):
            return counted_macs(embed, (embed.in_chans, *embed.img_size))
        proj: TimmModule = unwrapped(embed.proj)
        if isinstance(proj, nn.Conv2d):
            return int(proj.weight.numel() * self.patches(model))
        return counted_macs(embed, (proj.base_layer.in_channels, *embed.img_size))  # LoRA's

    def classifier_macs(self, model: TimmModule) -> int:
        """Multiply-adds of what makes logits of pooled tokens."""
        return linear_macs(model.head)

    def _pool_macs(self, model: TimmModule) -> tuple[Macs, int]:
        """Multiply-adds of pooling and classifier, and how many prefix tokens their token count includes."""
        classifier = self.classifier_macs(model)
        prefix = self.num_prefix_tokens(model)
        included = prefix - self._skipped(model, prefix)
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
            return Macs(per_token=classifier), self.num_prefix_tokens(model)
        return Macs(fixed=classifier), included


def _hurried(features: Tensor) -> bool:
    """Whether a device waits for what a host starts: not where it also keeps what a gradient or a compiler asks for."""
    return features.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _attention_pool_of(model: TimmModule) -> TimmModule | None:
    """timm's attention pooling, out of what is wrapped around it; None where tokens are pooled otherwise."""
    pool = getattr(model, "attn_pool", None)
    return None if pool is None else unwrapped(pool)


def described_size(model: TimmModule) -> tuple[int, int]:
    """Height and width in px that a model was asked for, or that its weights were made for, where no part of it tells.

    Raises:
        ModelError: It was not built by timm's factory.
    """
    asked = getattr(model, "_model_args", {}).get("img_size") or (getattr(model, "pretrained_cfg", None) or {}).get(
        "input_size"
    )
    if asked is None:
        raise ModelError(f"this {type(model).__name__} does not tell the size of its images; build it with "
                         "timm.create_model(NAME, img_size=...)")  # fmt: skip
    sizes = (asked, asked) if isinstance(asked, int) else tuple(asked)[-2:]
    return int(sizes[0]), int(sizes[1])


def patches(embed: TimmModule, images: Tensor) -> Any:
    """timm's patch embedding, `(B, C, H, W)` to `(B, N, D)`.

    In half precision on a GPU, by autocast too, as one matrix product: the convolution of 16 x 16 patches alone took
    1.6 of DeiT-S's 11 ms there (H100, bf16, batch 256), and as much again in backward.
    """
    half = images.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled("cuda")
    if not (images.is_cuda and half) or type(embed) is not PatchEmbed:
        return embed(images)
    proj, (batch, channels, *size) = parts_of(embed)["proj"], images.shape
    plain = (
        type(proj) is nn.Conv2d and embed.flatten and not embed.dynamic_img_pad and size == list(embed.img_size or ())
    )
    if not plain or not is_bare(embed) or not is_bare(proj):
        return embed(images)
    (rows, columns), (height, width) = embed.grid_size, embed.patch_size
    if size != [rows * height, columns * width]:
        images = images[:, :, : rows * height, : columns * width]
    pixels = images.reshape(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    pixels = pixels.reshape(batch, rows * columns, channels * height * width)
    return through(embed.norm, F.linear(pixels, proj.weight.flatten(1), proj.bias))


def average_pool(kind: str, features: Tensor, counts: Tensor, skipped: int) -> Tensor:
    """timm's `avg` and `avgmax` pooling with each token counted as often as it holds patches.

    Args:
        kind: `avg` or `avgmax`.
        features: `(B, P + N, D)`.
        counts: What each image token counts for, fp32 `(B, N)`.
        skipped: How many prefix tokens are left out.

    Returns:
        `(B, D)`.
    """
    seen = features[:, skipped:]
    counts = F.pad(counts, (seen.shape[1] - counts.shape[1], 0), value=1.0)
    mean = weighted_mean(seen, counts)
    return mean if kind == "avg" else 0.5 * (seen.amax(1) + mean)
