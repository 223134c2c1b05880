"""What timm's models answer beside logits, for a model around one: optimizers, heads, features, sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from timm.models import get_model_traits
from torch import Tensor, nn

from tokencut.adapters import Adapter, TimmModule, adapter_for, plain_model
from tokencut.blocks import BlockLoop, Stage
from tokencut.calling import StandIn, call, has_own_hooks, is_bare, is_patched
from tokencut.errors import ModelError, UsageError
from tokencut.methods import make_method
from tokencut.recipe import Recipe
from tokencut.schedule import StagePlan, TokensOut
from tokencut.tokens import Tokens
from tokencut.tracing import BlockObserver
from tokencut.unmerging import UNMERGE_RULES

# timm's own model is the attribute of this name, so its parameters' names begin with it.
INSIDE = "model."

# Where a pattern begins, `^` says what `re.match` does anyway; behind a prefix it would match nowhere.
_ANCHORS = re.compile(r"(?:(?<=^)|(?<=[|(]))\^")

# Where the features of merged tokens keep what pooling needs to know of them: sizes and policy, as in `Tokens`.
_COUNTS = "_tokencut_counts"


class AroundTimm(nn.Module):
    """timm's model with stages in its blocks, answering what timm's models answer.

    Names hold for the parameters of the whole: so `timm.optim.create_optimizer_v2` with weight decay and layer decay
    makes the groups that it makes of timm's model.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        """Wraps a model; it is not copied (`compress` does that).

        Args:
            model: A timm model of a supported family.
            recipe: A recipe made for a model of this depth.

        Raises:
            ModelError: The family is not supported.
            UsageError: The recipe's method or one of its settings is unknown.
        """
        super().__init__()
        model = plain_model(model)
        self.adapter: Adapter = adapter_for(model)
        self.model: TimmModule = model
        self.recipe = recipe
        self._refuse_patched()
        self.method = make_method(recipe.method, dict(recipe.method_options))
        self.adapter.check_method(self.method)
        self.unmerge = UNMERGE_RULES[0]
        blocks = self.adapter.cost(model).blocks
        self.stages = nn.ModuleDict(
            {
                str(layer): Stage(self.method, self.method.make_module(blocks[layer - 1].width, seed=layer))
                for layer in recipe.schedule.layers
            }
        ).to(next(model.parameters()).device)

    @property
    def loop(self) -> BlockLoop:
        """The model as a loop over blocks, to be run block by block."""
        recipe, model = self.recipe, self.model
        stages = {int(layer): stage for layer, stage in self.stages.items()}
        static = recipe.stages[0] if recipe.stages and recipe.stages[0].block == 0 else None
        return BlockLoop(self.adapter, model, stages, recipe.prop_attn, tuple(self.adapter.blocks(model)), static)

    @property
    def num_classes(self) -> int:
        """Number of classes of the head, also of one that was put there by hand; 0 for a model without one."""
        return self.adapter.num_classes(self.model)

    @property
    def num_features(self) -> int:
        """Numbers in a token's features, `D`."""
        return int(self.model.num_features)

    @property
    def head_hidden_size(self) -> int:
        """Numbers in what the classifier reads."""
        return int(self.model.head_hidden_size)

    @property
    def embed_dim(self) -> int:
        """Numbers in a token's features between blocks."""
        return int(self.model.embed_dim)

    @property
    def num_prefix_tokens(self) -> int:
        """`P`, the class, distillation and register tokens."""
        return self.adapter.num_prefix_tokens(self.model)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return int(self.model.in_chans)

    @property
    def global_pool(self) -> str:
        """How tokens are pooled for the head."""
        return str(self.model.global_pool)

    @property
    def grad_checkpointing(self) -> bool:
        """What `set_grad_checkpointing` has set."""
        return self.adapter.recomputes(self.model)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """timm's description of each block's output: channels, reduction (px to a patch), module inside `model`."""
        return self.model.feature_info

    @property
    def _model_args(self) -> dict[str, Any]:
        """The arguments that timm built the model with, which timm's `save_for_hf` writes down."""
        return dict(getattr(self.model, "_model_args", {}))

    @property
    def _traits(self) -> dict[str, Any]:
        """What timm keeps of the model's input, likewise."""
        return get_model_traits(self.model)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """A copy of timm's description of weights and preprocessing; its names of modules begin with `model.`."""
        cfg = dict(self.model.pretrained_cfg)
        for entry in ("first_conv", "classifier"):
            if cfg.get(entry):
                names = cfg[entry]
                cfg[entry] = INSIDE + names if isinstance(names, str) else tuple(INSIDE + name for name in names)
        return cfg

    default_cfg = pretrained_cfg

    def no_weight_decay(self) -> set[str]:
        """The parameters that timm's optimizers give no weight decay."""
        inside = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {INSIDE + name for name in inside}

    def group_matcher(self, coarse: bool = False) -> Mapping[str, Any] | Callable[[str], Any]:
        """Which parameters belong to one layer, for timm's layer decay; what stages learn goes with the head.

        Args:
            coarse: Whether in coarse groups.
        """
        matcher = self.model.group_matcher(coarse=coarse)
        if callable(matcher):
            return lambda name: matcher(name.removeprefix(INSIDE)) if name.startswith(INSIDE) else (float("inf"),)
        return {group: _inside(patterns) for group, patterns in matcher.items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps no activations of blocks without a stage, and computes them again; as timm's."""
        self.model.set_grad_checkpointing(enable)

    def get_classifier(self) -> Any:
        """The classifier, or both of a distilled model."""
        return self.model.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new classifier there, in place, with random weights.

        Args:
            num_classes: Its classes; 0 for none.
            global_pool: Another pooling, by timm's name; as it is where None.
        """
        self.model.reset_classifier(num_classes, global_pool)
        head, width = self.model.get_classifier(), self.head_hidden_size
        if isinstance(head, nn.Linear) and head.in_features != width:  # a pooling that timm does not know
            self.model.head = nn.Linear(width, num_classes, device=head.weight.device, dtype=head.weight.dtype)
            self.model.head.train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: Any = None) -> None:
        """Changes the input size in place, as timm's: positions are resampled, stages go by the same keep rates.

        Args:
            img_size: Height and width in px; as it is where None.
            patch_size: Another size of patches in px; as it is where None.
        """
        self.model.set_input_size(img_size=img_size, patch_size=patch_size)
        tokens = self.adapter.cost(self.model).patches
        self.recipe = replace(self.recipe, tokens=tokens, stages=self.built_for())

    def built_for(self) -> tuple[StagePlan, ...]:
        """The stages for images of the size that the model is built for."""
        return self._stages_on(self.adapter.own_grid(self.model))

    def possible_counts(self) -> TokensOut | None:
        """How many tokens can leave a stage, for images of that size; None where any can."""
        return self.adapter.tokens_out(self.model, self.adapter.own_grid(self.model), self.method)

    def _stages_on(self, grid: tuple[int, ...]) -> tuple[StagePlan, ...]:
        """The stages for images whose tokens stand in such a grid."""
        if self.method.each_block and prod(grid) == self.recipe.tokens:
            return self.recipe.stages  # there can be any number of groups
        tokens_out = self.adapter.tokens_out(self.model, grid, self.method)
        return self.recipe.stages_for(prod(grid), tokens_out, prod(grid[1:]))

    def forward_features(self, x: Tensor) -> Any:
        """The tokens that are left behind the last block, normed: `(B, P + M, D)` for images `(B, C, H, W)`.

        `forward_head` makes logits of them. For features of every patch take `forward_intermediates`.
        """
        loop = self.loop
        plans = self._ready(x, loop)
        if len(plans) == 0:
            return self.model.forward_features(x)
        if self.adapter.runs_inside:
            return self._inside(lambda tokens: self._run(loop, loop.begun(tokens), plans)).forward_features(x)
        tokens = self._run(loop, loop.embed(x), plans)
        features = self.adapter.final_norm(self.model, tokens.features)
        if tokens.sizes is not None or tokens.policy is not None:
            setattr(features, _COUNTS, (tokens.sizes, tokens.policy))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier.

        Args:
            x: What `forward_features` gave, `(B, P + M, D)`. The tensor itself: it knows how many patches each token
                holds, and a copy does not.
            pre_logits: Whether to stop before the classifier.

        Returns:
            Logits `(B, classes)`, or what the classifier would read.

        Raises:
            ModelError: Tokens are pooled by their sizes, and the features don't tell these.
        """
        sizes, policy = getattr(x, _COUNTS, (None, None))
        whole = x.shape[1] - self.num_prefix_tokens == self.recipe.tokens
        unknown = sizes is None and policy is None and self.method.averages()
        if unknown and not whole and self.adapter.pools_by_size(self.model):
            raise ModelError("the features don't tell how many patches each token holds, by which they are pooled; "
                             "give forward_head the very tensor of forward_features, or call the model")  # fmt: skip
        tokens = self.loop.weighed(Tokens(x, self.num_prefix_tokens, sizes=sizes, policy=policy))
        return self.adapter.forward_head(self.model, tokens, pre_logits)

    def _refuse_patched(self) -> None:
        """Refuses a model whose forward was replaced where a stage takes its place, the same at every keep rate."""
        model = self.model
        for layer, part in ((0, model), *self.adapter.stood_in(model, self.recipe.schedule.layers)):
            if is_patched(part):
                raise ModelError(
                    f"{_name(model, part) or 'the model'} has a forward of its own, put on this one module, which "
                    "stages would pass by; use a hook (register_forward_hook), or take it off again by "
                    f"{_taken_off(part)}" + (f", or give `layers` without {layer}" if layer else "")
                )
        for part in self.adapter.passed_by(model):
            # A tracer puts hooks of its own on every module, to name what it records after them.
            if is_patched(part) or (has_own_hooks(part) and not torch.jit.is_tracing()):
                raise ModelError(f"{_name(model, part)} has a hook or a forward of its own, and what runs stages calls "
                                 "its parts; put it on the model itself, or on a part of it")  # fmt: skip

    def _ready(self, images: Tensor, loop: BlockLoop) -> tuple[StagePlan, ...]:
        """The stages for images of this size, of a model whose forward is timm's; none where its blocks are pruned."""
        self._refuse_patched()
        if self.recipe.levels is not None:
            raise UsageError("images have levels here, and so tokens of different number; take one level of the model: "
                             "`model.at_levels()[0]`, or type `keep=0.5` for one schedule")  # fmt: skip
        why = self.adapter.refused_form(images)
        if why is not None:
            raise ModelError(why)
        return self._stages_on(self.adapter.grid_of(loop.model, images)) if loop.blocks else ()

    def _grid(self, images: Tensor) -> tuple[int, ...]:
        return self.adapter.grid_of(self.model, images)

    def _inside(self, run: Callable[[Tokens], Tokens]) -> StandIn:
        """A model as timm runs it, with other code for the blocks that are reduced."""
        return self.adapter.inside(self.model, run)

    def _run(
        self, loop: BlockLoop, tokens: Tokens, plans: tuple[StagePlan, ...], observer: BlockObserver | None = None
    ) -> Tokens:
        """Runs all blocks by the plans for the whole image; by others where patch dropout has taken tokens away."""
        if len(plans) > 0 and (plans[0].tokens_in if plans[0].block else plans[0].tokens_out) != tokens.count:
            plans = self.recipe.stages_for(tokens.count)
        blocks, last = self.adapter.called_as_one(loop.model), tokens
        if blocks is None or is_bare(blocks):
            return loop.run(tokens, plans, observer)

        def all_blocks(features: Tensor) -> Tensor:
            nonlocal last
            last = loop.run(tokens.with_features(features), plans, observer)
            return last.features

        features = call(blocks, all_blocks, tokens.features)
        return last.with_features(features)


def _name(model: nn.Module, part: nn.Module) -> str:
    """The name of a module inside a model."""
    return next(name for name, each in model.named_modules() if each is part)


def _taken_off(module: nn.Module) -> str:
    """How a module loses a forward that was put on it."""
    if hasattr(module, "_hf_hook"):
        return "`accelerate.hooks.remove_hook_from_module(model, recurse=True)`"
    if hasattr(module, "_original_forward"):
        return "`accelerator.unwrap_model(model, keep_fp32_wrapper=False)`"
    return "`del module.forward`"


def _inside(patterns: Any) -> Any:
    """Patterns of timm's `group_matcher` for names that begin with `model.`."""
    if patterns is None:
        return None
    if isinstance(patterns, str):
        return rf"^{re.escape(INSIDE)}(?:{_ANCHORS.sub('', patterns)})"
    return [(_inside(pattern), suffix) for pattern, suffix in patterns]
