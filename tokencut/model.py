"""compress(model, ...) -> an nn.Module: a model that runs its blocks with stages between attention and MLP."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tokencut import cost
from tokencut.adapters import adapter_for, instead_of, plain_model, refuse_sharded
from tokencut.blocks import BlockLoop
from tokencut.calling import call
from tokencut.errors import ModelError, UsageError
from tokencut.features import Form, Indices, Intermediates, block_indices
from tokencut.limits import check_number
from tokencut.methods import Method, StageShape, make_method
from tokencut.ops.spread import SPREAD_MACS, spread
from tokencut.recipe import Levels, Recipe, resolve_stages
from tokencut.schedule import Keep, Layers
from tokencut.timm_protocol import AroundTimm
from tokencut.tokens import Tokens
from tokencut.tracing import BlockObserver, Trace, Tracer
from tokencut.unmerging import Unmerging

Run = Callable[[Tokens], Tokens]


class CompressedModel(AroundTimm):
    """A timm model with stages that reduce its tokens.

    `model` is timm's own, with timm's parameter names; `stages` holds one `Stage` for each layer of the recipe's
    schedule; `recipe` says what was done, `method` is the reduction it names. `unmerge` is how `forward_intermediates`
    goes back to all patches where it is not told: `"change"` or `"copy"`. No file keeps it.

    Example:
        >>> import timm, torch, tokencut
        >>> model = tokencut.compress(timm.create_model("test_vit"), keep=0.5, layers=[2, 4])
        >>> model.recipe.method, model.recipe.keep, model.recipe.schedule.layers
        ('bat', 0.5, (2, 4))
        >>> [tuple(features.shape) for features in model.forward_intermediates(torch.zeros(1, 3, 160, 160))[1]][:2]
        [(1, 64, 10, 10), (1, 64, 10, 10)]
    """

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, classes)` for images `(B, 3, H, W)`."""
        if self.recipe.levels is not None:
            return self.by_level(images, self.at_levels())
        loop = self.loop
        plans = self._ready(images, loop)
        if len(plans) == 0:  # torch.compile knows no bool(tuple)
            return loop.model(images)  # timm's own forward, to the bit
        logits: Tensor = call(loop.model, self._through(loop, lambda tokens: self._run(loop, tokens, plans)), images)
        return logits

    def at_levels(self) -> list[CompressedModel]:
        """The model at each level of its recipe, around the same weights: one schedule each, and so compiled, captured
        and exported as any other. Itself alone where the recipe has one schedule.
        """
        levels = self.recipe.levels
        return [self] if levels is None else [self.at(keep) for keep in levels.keeps]

    def at(self, keep: float) -> CompressedModel:
        """The model with one keep rate, around the same weights."""
        schedule = replace(self.recipe.schedule, keep=keep)
        recipe = replace(self.recipe, schedule=schedule, levels=None)
        grid, method = self.adapter.own_grid(self.model), self.method
        tokens_out = self.adapter.tokens_out(self.model, grid, method) or method.tokens_out
        stages = resolve_stages(schedule, recipe.static_keep, recipe.tokens, prod(grid[1:]), tokens_out)
        made = CompressedModel(self.model, replace(recipe, stages=stages))
        made.training = self.training
        made.stages.train(self.training)
        return made

    def levels_of(self, images: Tensor) -> Tensor:
        """The level of each image, int64 `(B,)`; it depends on nothing but the image."""
        levels = self.recipe.levels
        if levels is None:
            return torch.zeros(len(images), dtype=torch.int64, device=images.device)
        limits = torch.tensor(levels.limits, dtype=torch.float32, device=images.device)
        return torch.bucketize(spread(images), limits, right=True)

    def by_level(self, images: Tensor, models: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """Logits of images that are sorted into levels.

        Args:
            images: `(B, 3, H, W)`.
            models: What runs each level, such as `at_levels()`, compiled or not.

        Returns:
            Logits in the order of the images, `(B, classes)`.
        """
        if not len(images):
            return models[0](images)
        level = self.levels_of(images)
        rows = [(level == number).nonzero().squeeze(1) for number in range(len(models))]
        parts = [run(images[row]) for run, row in zip(models, rows, strict=True) if len(row)]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _through(
        self, loop: BlockLoop, run: Run, *, source: bool = False, observer: BlockObserver | None = None
    ) -> Callable[[Tensor], Tensor]:
        """The model's forward with other code for its blocks, from images to logits.

        Args:
            loop: The model as a loop.
            run: From the tokens entering the first block to those behind the last.
            source: Whether to follow which patch goes into which token.
            observer: Is told of what is removed before the first block.
        """
        if self.adapter.runs_inside:
            inside = self._inside(lambda tokens: run(loop.begun(tokens, source=source)))
            forward: Callable[[Tensor], Tensor] = inside.forward
            return forward
        return lambda images: loop.head(run(loop.embed(images, source=source, observer=observer)))

    def trace(self, images: Tensor, *, source: bool = True, attention: bool = False) -> tuple[Tensor, list[Trace]]:
        """Logits, and the tokens behind each stage.

        Args:
            images: `(B, 3, H, W)`.
            source: Whether to follow which patch went into which token.
            attention: Whether to compute the class attention at each stage.

        Returns:
            Logits `(B, classes)`, and a trace for each stage in order, ending with the tokens after the last block
            (`block` is then the number of blocks, and the features are those before the final norm).

        Raises:
            UsageError: Class attention is asked for, of a hierarchical model.
        """
        if attention and self.adapter.hierarchical:
            raise UsageError(f"{self.adapter.family} has no class attention over all its tokens; leave out "
                             "`attention`, or `alpha` of a fine-tune")  # fmt: skip
        loop, tracer = self.loop, Tracer(self.method, attention)
        plans = self._ready(images, loop)

        def traced(tokens: Tokens) -> Tokens:
            tokens = self._run(loop, tokens, plans, tracer)
            tracer.traces.append(Trace(loop.depth, tokens))
            return tokens

        logits: Tensor = call(self.model, self._through(loop, traced, source=source, observer=tracer), images)
        return logits, tracer.traces

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        *,
        unmerge: str | None = None,
    ) -> Any:
        """Features of several blocks for every patch, with timm's arguments, shapes and order.

        By `unmerge="change"` a patch keeps the features that it had just before a stage and gets what its token has
        changed by since; one that was dropped, or fused with unlike ones, what the most similar token left has. By
        `"copy"` it gets its token's features, and one that was dropped keeps its last. From the first stage on either
        holds a map of all patches, `(B, patches, D)`, whichever blocks are asked for. Where nothing is reduced this is
        timm's own method.

        Args:
            x: Images, `(B, 3, H, W)`.
            indices: So many last blocks, or 0-based blocks (negative ones from the end); all where None.
            return_prefix_tokens: Whether each output is a pair with the prefix tokens, `(B, P, D)`, if there are any.
            norm: Whether the model's final norm applies to each output.
            stop_early: Whether blocks behind the last one asked for are left out.
            output_fmt: `"NCHW"` for `(B, D, rows, columns)`, of clips `(B, D, tubelets, rows, columns)`; `"NLC"` for
                `(B, patches, D)`.
            intermediates_only: Whether to leave out the final features.
            output_dict: Whether to return timm's dictionary.
            unmerge: How patches get their features, `"change"` or `"copy"`; the model's attribute `unmerge` where None.

        Returns:
            The final features, normed, `(B, P + patches, D)`, and a list of outputs in the order of blocks; or what
            the arguments make of that. For logits call the model: dropped patches are in the final features too.

        Raises:
            UsageError: A block, a format or a rule of un-merging does not exist.
            ModelError: Patch dropout has left no full grid.
        """
        if self.adapter.runs_inside:
            if unmerge is not None:
                how = ": its method's setting reconstruct says how" if self.adapter.hierarchical else ""
                raise UsageError(f"unmerge {unmerge!r} is not chosen here for {self.adapter.family}, whose stage gives "
                                 f"each token back; leave it out{how}")  # fmt: skip
            return self._maps(x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only,
                              output_dict)  # fmt: skip
        form = Form(return_prefix_tokens, output_fmt, intermediates_only, output_dict)
        unmerging = Unmerging(self.unmerge if unmerge is None else unmerge, similar=not self.method.averages())
        loop = self.loop
        plans = self._ready(x, loop)
        taken = block_indices(loop.depth, indices)
        as_timm = inspect.signature(self.model.forward_intermediates).parameters if len(plans) == 0 else {}
        if as_timm and (not output_dict or "output_dict" in as_timm):
            given = {
                "return_prefix_tokens": return_prefix_tokens,
                "norm": norm,
                "stop_early": stop_early,
                "output_fmt": output_fmt,
                "intermediates_only": intermediates_only,
                "output_dict": output_dict,
            }
            return self.model.forward_intermediates(
                x, indices=taken, **{name: value for name, value in given.items() if name in as_timm}
            )
        grid, observer = self._grid(x), Intermediates(taken, unmerging)
        tokens = loop.embed(x, source=True, observer=observer)
        if loop.static is None and tokens.count != prod(grid):
            raise ModelError(f"patch dropout left {tokens.count} of {prod(grid)} patches, and no full grid; "
                             "type model.eval(), or build the model with patch_drop_rate=0")  # fmt: skip
        tokens = loop.run(tokens, plans, observer, max(taken) + 1 if stop_early else None)
        return observer.handed_out(form, tokens, partial(self.adapter.final_norm, self.model), norm, grid)

    def _maps(
        self,
        x: Tensor,
        indices: Indices,
        return_prefix_tokens: bool,
        norm: bool,
        stop_early: bool,
        output_fmt: str,
        intermediates_only: bool,
        output_dict: bool,
    ) -> Any:
        """timm's own `forward_intermediates` of a hierarchical model, which gives a map for each of its stages."""
        loop = self.loop
        plans = self._ready(x, loop)
        taken = block_indices(self.adapter.feature_maps(self.model), indices)
        if output_fmt != "NCHW":
            raise UsageError(f"output_fmt {output_fmt!r} is none of timm's {self.adapter.family}; give 'NCHW'")
        around = self.model if len(plans) == 0 else self._inside(lambda t: self._run(loop, loop.begun(t), plans))
        found = around.forward_intermediates(
            x, indices=taken, norm=norm, stop_early=stop_early, output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )  # fmt: skip
        if not output_dict:
            return found
        if intermediates_only:
            return {"image_intermediates": found}
        return {"image_intermediates": found[1], "image_features": found[0]}

    def get_intermediate_layers(
        self, x: Tensor, n: Any = 1, reshape: bool = False, return_prefix_tokens: bool = False, norm: bool = False
    ) -> Any:
        """Features of several blocks for every patch, by DINO's arguments; see `forward_intermediates`."""
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True
        )

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes, in place, what `forward_intermediates` does not need for some blocks, as timm's method of that name.

        Stages go with their blocks, the recipe stays; what is left cannot be saved. `indices` as there; returned as
        0-based blocks, in the order given. `prune_norm` takes the final norm away, `prune_head` pooling and classifier.
        """
        taken = block_indices(self.adapter.feature_maps(self.model), indices)
        self.model.prune_intermediate_layers(taken, prune_norm, prune_head)
        if self.adapter.runs_inside:
            if not len(self.adapter.blocks(self.model)):
                self.stages.clear()
            return taken
        for layer in [layer for layer in self.stages if int(layer) > max(taken) + 1]:
            del self.stages[layer]
        return taken


def compress(
    model: nn.Module,
    *,
    keep: Keep | None = 0.7,
    layers: Layers | None = None,
    method: str | None = None,
    reduce_by: int | None = None,
    prop_attn: bool | None = None,
    method_options: Mapping[str, Any] | None = None,
    static_keep: float | None = None,
    levels: Levels | None = None,
) -> CompressedModel:
    """Makes a Vision Transformer cheaper by reducing its tokens (default method: arXiv 2211.11315).

    Args:
        model: A timm model of a supported family, also inside `torch.compile` or `DistributedDataParallel`; it is
            copied, with its hooks, and stays as it was.
        keep: Fraction of the image tokens entering a stage that leave it, in (0, 1]: one number, or one a layer.
            `reduce_by` takes its place where given.
        layers: 1-based numbers of the blocks that reduce, or `"all"`, `"late"` (6, 8, 10 of 12) or `"gradual"` (each
            from 4 to 10 of 12); blocks 4, 7, 10 of 12 where None. Of a hierarchical model one block of its third
            stage, before which that stage's tokens are clustered.
        method: A method's name, such as `bat`, `evit` or `tome`; where None the family's default, `bat`, of
            hierarchical models `window`.
        reduce_by: Instead of `keep`: so many tokens fewer in each layer.
        prop_attn: Whether merged tokens weigh by size in later attention; the method's own default where None.
        method_options: Settings of the method, by name.
        static_keep: Of a model of clips: the fraction of tubelets that enters the first block, those that differ most
            from the one before at their place, in (0, 1]. The others go into the last such (RLT, arXiv 2411.05222).
            Those of the first frames always stay. None for all.
        levels: A keep rate for each image, as `find_levels` finds them, instead of `keep`.

    Returns:
        A module with the same input and output as `model`.

    Raises:
        UsageError: An argument is out of range or unknown.
        ModelError: The model's family is not supported.

    Example:
        >>> import timm, torch, tokencut
        >>> model = tokencut.compress(timm.create_model("test_vit"), keep=0.5, layers=[2, 4])
        >>> model(torch.zeros(3, 3, 160, 160)).shape
        torch.Size([3, 1000])
    """
    model = plain_model(model)
    refuse_sharded(model)
    adapter = adapter_for(model)
    built = make_method(method or adapter.default_method, dict(method_options or {}))
    adapter.check_method(built)
    if prop_attn and built.keeps_grid:
        raise UsageError(f"method {built.name} leaves clusters of equal weight, and no proportional attention; leave "
                         "out `prop_attn`")  # fmt: skip
    if levels is not None:
        _check_levels(levels, built, adapter.frames(model), reduce_by)
        keep = max(levels.keeps)
    layers = adapter.usual_layers(model, built) if layers is None else layers
    schedule = adapter.schedule(model, keep if reduce_by is None else None, layers, reduce_by)
    tokens = adapter.cost(model).patches
    grid = adapter.own_grid(model)
    if static_keep is not None:
        check_number("static_keep", static_keep)
        if adapter.frames(model) is None:
            raise UsageError("`static_keep` is for models of clips, in which tubelets may stay as they were, and "
                             f"{type(model).__name__} takes images; leave it out")  # fmt: skip
    tokens_out = adapter.tokens_out(model, grid, built) or built.tokens_out
    recipe = Recipe(
        method=built.name,
        schedule=schedule,
        prop_attn=built.prop_attn if prop_attn is None else prop_attn,
        tokens=tokens,
        stages=resolve_stages(schedule, static_keep, tokens, prod(grid[1:]), tokens_out),
        method_options=built.options(),
        static_keep=static_keep,
        levels=levels,
    )
    compressed = CompressedModel(copy.deepcopy(model), recipe)
    compressed.training = model.training  # the model's own parts may be in modes of their own
    compressed.stages.train(model.training)
    return compressed


def _check_levels(levels: Levels, method: Method, frames: int | None, reduce_by: int | None) -> None:
    """Refuses levels where there can be none."""
    problem = levels.problem()
    if problem is not None:
        raise UsageError(f"`levels` {problem}; take those that find_levels gives")
    if method.needs_training:
        raise UsageError(f"method {method.name} is trained for one schedule, and `levels` are several; leave one out")
    if frames is not None or method.keeps_grid:
        what = "clips" if frames is not None else "a model with windows"
        raise UsageError(f"`levels` are for images and models whose tokens all see each other, and this is for {what}; "
                         "give `keep` instead")  # fmt: skip
    if reduce_by is not None:
        raise UsageError("`levels` hold keep rates, and `reduce_by` takes their place; leave one out")


def require_one_schedule(model: nn.Module, function: str) -> None:
    """Refuses a model with a keep rate for each image, where tokens have to be as many for all.

    Raises:
        UsageError: Saying what to do.
    """
    if isinstance(model, CompressedModel) and model.recipe.levels is not None:
        rates = ", ".join(f"{keep:g}" for keep in model.recipe.levels.keeps)
        raise UsageError(f"{function} takes one schedule, and this model has levels ({rates}); type `keep=0.5` for "
                         "one, or take a level of it: `model.at_levels()[0]`")  # fmt: skip


def require_compressed(model: nn.Module, function: str) -> CompressedModel:
    """The compressed model that a function takes, also out of wrappers that change nothing.

    Args:
        model: What it was given.
        function: Its name, for the message.

    Raises:
        UsageError: The model is none, saying what to type.
    """
    instead = None
    if isinstance(model, nn.Module):
        model = plain_model(model)
        if isinstance(model, CompressedModel):
            return model
        instead = instead_of(model, lambda part: isinstance(part, CompressedModel))
    if instead is None:
        instead = f"none; type `model = tokencut.compress(model, keep=0.7)` and then tokencut.{function}(model, ...)"
    raise UsageError(f"{function} takes a compressed model, and this {type(model).__name__} is {instead}")


def predicted_macs(model: nn.Module) -> tuple[cost.BlockRow, ...]:
    """Multiply-adds per image by the closed form, row by row, without running anything.

    Args:
        model: A compressed or a dense one, at its present input size.

    Returns:
        Rows as `cost.predict` gives them; `cost.total` adds them up.

    Raises:
        ModelError: A dense model's family is not supported.
        UsageError: Images have levels, and so no rows in common.
    """
    model = plain_model(model)
    require_one_schedule(model, "predicted_macs")
    if not isinstance(model, CompressedModel):
        return cost.predict(adapter_for(model).cost(model), {})
    shape = model.adapter.cost(model.model)
    stages = {
        plan.block: stage_cost(model.method, shape.blocks[plan.block - 1], plan.tokens_in, plan.tokens_out)
        if plan.block
        else cost.StageCost(plan.tokens_in, plan.tokens_out, 0, reads_attention=False)
        for plan in model.built_for()
    }
    return cost.predict(shape, stages)


def predicted_gmacs(model: nn.Module) -> float:
    """Multiply-adds per image by the closed form, in units of 1e9; see `predicted_macs`.

    Of a model with levels the mean over them, by the shares of the images that they were chosen by, and what sorting
    an image takes.
    """
    model = plain_model(model)
    if isinstance(model, CompressedModel) and (levels := model.recipe.levels) is not None:
        each = zip(levels.shares, model.at_levels(), strict=True)
        mean = sum(share * cost.total(predicted_macs(one)) for share, one in each)
        return (mean + SPREAD_MACS) / 1e9
    return cost.total(predicted_macs(model)) / 1e9


def stage_cost(method: Method, block: cost.BlockCost, tokens_in: int, tokens_out: int) -> cost.StageCost:
    """What a stage of a method costs in a block, for `cost.predict`.

    Args:
        method: The reduction.
        block: The block, as its adapter describes it.
        tokens_in: Image tokens entering.
        tokens_out: Image tokens leaving.
    """
    left = dict(block.smaller).get(tokens_out, 0)
    stage = StageShape(tokens_in, tokens_out, block.width, block.key_width, block.windows, block.places, left,
                       block.grid)  # fmt: skip
    return cost.StageCost(tokens_in, tokens_out, method.macs(stage), method.reads_attention(), method.each_block)
