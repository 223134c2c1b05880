"""What families have in common that make their grid of tokens smaller from stage to stage, and need it whole for that.

Of such a model the third stage is reduced, in which most blocks are. From one of its blocks on tokens share what their
MLPs do, and all of them stay; or they are clustered to a smaller grid before that block, and each token of the grid is
had back behind the last. All else is timm's own forward, which is run with another `blocks` in that one stage
(`calling.StandIn`); no module is changed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from tokencut.adapters.base import Adapter, BareContext, Context
from tokencut.adapters.subclasses import known_class, why_unknown
from tokencut.attention import AttentionInfo, TimmModule
from tokencut.calling import StandIn, StandInSequence
from tokencut.cost import BlockCost, Macs, ModelCost, TabledMacs
from tokencut.errors import ModelError, UsageError
from tokencut.ops.grid_clusters import Windows
from tokencut.ops.grouping import GridGroups
from tokencut.schedule import Keep, Layers, Schedule, TokensOut, kept_tokens, make_schedule
from tokencut.tokens import Tokens, unclustered

# The place of the stage that is reduced. In most models it has more blocks than all others together.
STAGE = 2

Run = Callable[[Tokens], Tokens]


class _ReachedError(Exception):
    """A forward has come to the blocks that may be reduced."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self.tokens = tokens


def tokens_reached(inside: Callable[[Run], StandIn], images: Tensor) -> Tokens:
    """The tokens entering the blocks that may be reduced, by timm's own forward, which is left there.

    Args:
        inside: Makes timm's model with other code for those blocks; see `Adapter.inside`.
        images: `(B, C, H, W)`.
    """

    def reached(tokens: Tokens) -> Tokens:
        raise _ReachedError(tokens)

    try:
        inside(reached).forward(images)
    except _ReachedError as end:
        return end.tokens
    raise AssertionError("the model has run without the blocks that may be reduced")


class HierarchicalAdapter(Adapter):
    """A model that runs one part, its stages, after another, each with `downsample` and `blocks`.

    A family says where these are, in which windows tokens are clustered, how a block runs on a smaller grid, and what
    blocks and stages cost.

    Attributes:
        classes: timm's classes of such models; those derived from them are taken where they run as these do.
        block_classes: timm's classes of their blocks.
        stages_name: The attribute that holds the stages, a `Sequential`.
        before_stages: The attributes of what the model runs before the stages.
    """

    classes: ClassVar[tuple[type[nn.Module], ...]]
    block_classes: ClassVar[tuple[type[nn.Module], ...]]
    stages_name: ClassVar[str]
    before_stages: ClassVar[tuple[str, ...]] = ("patch_embed",)
    hierarchical = True
    runs_inside = True
    default_method = "window"

    @abstractmethod
    def windows(self, model: TimmModule, rows: int, columns: int) -> Windows:
        """The grid of the stage, and the windows in which its tokens are clustered."""

    @abstractmethod
    def stage_grid(self, model: TimmModule, stage: int, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens in a stage (from 0 on), for an image of `height` x `width` px."""

    @abstractmethod
    def run_smaller(self, block: TimmModule, features: Tensor, tokens: Tokens) -> Tensor:
        """A block on a smaller grid, by its own parts.

        Args:
            block: The block.
            features: `(B, rows, columns, D)` of the smaller grid.
            tokens: The same tokens with their `windows`, and what `prepare` has made for all blocks.
        """

    @abstractmethod
    def run_grouped(self, block: TimmModule, features: Tensor, groups: GridGroups | None) -> Tensor:
        """A block whose MLP runs once for each group of tokens.

        Args:
            block: The block.
            features: `(B, rows, columns, D)`.
            groups: The groups; None where each token is one, in blocks before the first that has groups.
        """

    @abstractmethod
    def grouped_macs(self, block: TimmModule, windows: Windows, count: int) -> int:
        """Multiply-adds of `run_grouped` on a grid with such windows, for so many groups."""

    @abstractmethod
    def block_macs(self, block: TimmModule, windows: Windows, *, smaller: bool) -> int:
        """Multiply-adds of a block on a grid with such windows.

        Args:
            block: The block.
            windows: The grid. In its own windows attention looks where `smaller`, and in the model's own else.
            smaller: Whether the grid is one that a stage has left.
        """

    @abstractmethod
    def other_macs(self, model: TimmModule, stage: int, height: int, width: int) -> int:
        """Multiply-adds of what leads into a stage (from 0 on), for an image of `height` x `width` px: the patch
        embedding for the first, the merging of patches for the others.
        """

    @abstractmethod
    def head_macs(self, model: TimmModule, tokens: int) -> int:
        """Multiply-adds of pooling and classifier, on so many tokens of the last stage."""

    def accepts(self, model: nn.Module) -> bool:
        return known_class(model, self.classes) is not None

    def why_not(self, model: nn.Module) -> str | None:
        return why_unknown(model, self.classes)

    def check(self, model: TimmModule) -> None:
        stages: Any = self.stages(model)
        for block in (block for stage in stages for block in stage.blocks):
            if known_class(block, self.block_classes) is None:
                why = why_unknown(block, self.block_classes) or f"the block {type(block).__name__} is not known"
                raise ModelError(f"{why}, so it cannot run on a smaller grid; use a model built from "
                                 f"{', '.join(known.__name__ for known in self.block_classes)}")  # fmt: skip

    def check_method(self, method: Any) -> None:
        if not method.keeps_grid:
            raise UsageError(
                f"method {method.name} leaves tokens in no grid, and {self.family} needs one between its stages; type "
                f"`method={self.default_method!r}`, or leave it out"
            )

    def stages(self, model: TimmModule) -> nn.Sequential:
        """The model's stages."""
        stages: nn.Sequential = getattr(model, self.stages_name)
        return stages

    def blocks(self, model: TimmModule) -> nn.ModuleList | nn.Sequential:
        """The blocks that may be reduced, those of the third stage; none of a model that has lost it."""
        stages: Any = self.stages(model)
        return stages[STAGE].blocks if len(stages) > STAGE else nn.Sequential()

    def feature_maps(self, model: TimmModule) -> int:
        return len(self.stages(model))

    def num_prefix_tokens(self, model: TimmModule) -> int:
        return 0

    def grid(self, model: TimmModule, height: int, width: int) -> tuple[int, int]:
        return self.stage_grid(model, STAGE, height, width)

    def recomputes(self, model: TimmModule) -> bool:
        return bool(self.stages(model)[STAGE].grad_checkpointing)

    def schedule(self, model: TimmModule, keep: Keep | None, layers: Layers | None, reduce_by: int | None) -> Schedule:
        depth = len(self.blocks(model))
        usual = default_beginning(depth)
        example = f"`layers=[{usual}]`"
        if reduce_by is not None:
            raise UsageError(f"{self.family} keeps a regular grid, from which not any {reduce_by} tokens can go; type "
                             "a share that stays, such as `keep=0.5`, instead of `reduce_by`")  # fmt: skip
        if isinstance(layers, str):
            raise UsageError(f"layers {layers!r} are several, and {self.family} is reduced once; type the block of its "
                             f"third stage where that begins, such as {example}")  # fmt: skip
        beyond = [layer for layer in layers or () if isinstance(layer, int) and not 1 <= layer <= depth]
        if beyond:
            raise UsageError(f"layer {beyond[0]} does not exist: the third stage, which is reduced, has blocks 1 to "
                             f"{depth}; type that where it begins, such as {example}")  # fmt: skip
        schedule = make_schedule(depth, keep, (usual,) if layers is None else layers, None)
        if len(schedule.layers) > 1:
            raise UsageError(f"layers {','.join(map(str, schedule.layers))} are several, and {self.family} is reduced "
                             f"once; type the block of its third stage where that begins, such as {example}"
                             )  # fmt: skip
        return schedule

    def usual_layers(self, model: TimmModule, method: Any) -> Layers | None:
        return (default_beginning(len(self.blocks(model)), method.each_block),)

    def tokens_out(self, model: TimmModule, grid: tuple[int, ...], method: Any) -> TokensOut | None:
        windows = self.windows(model, *grid)
        if not method.each_block:
            return nearest_count(windows)
        left = self.work_left(model, windows)
        return lambda tokens, budget: min(left, key=lambda count: (abs(left[count] - budget / tokens), -count))

    def work_left(self, model: TimmModule, windows: Windows) -> dict[int, float]:
        """What part of a block's multiply-adds is left where its MLP runs for so many groups of tokens."""
        block = self.blocks(model)[0]
        whole = self.block_macs(block, windows, smaller=False)
        counts = (each.count for each in windows.smaller())
        return {**{count: self.grouped_macs(block, windows, count) / whole for count in counts}, windows.count: 1.0}

    def keep_note(self, model: TimmModule, keep: float, method: Any) -> str | None:
        size = self.input_size(model)
        assert size is not None
        grid = self.grid(model, *size)
        windows, tokens_out = self.windows(model, *grid), self.tokens_out(model, grid, method)
        assert tokens_out is not None
        left = tokens_out(windows.count, kept_tokens(keep, windows.count))
        if keep == 1 or not windows.smaller():
            return None
        if method.each_block:
            return self._grouped_note(model, windows, keep, left)
        sides = f"{windows.height} x {windows.width}"
        if left == windows.count:
            next_best = windows.smaller()[-1]
            return (f"at `keep={keep:g}` the nearest to that share of {sides} tokens is all of them, so nothing is "
                    f"reduced; the next smaller is {next_best.height} x {next_best.width}, "
                    f"`keep={next_best.count / windows.count:.2f}`")  # fmt: skip
        smaller = windows.with_count(left)
        return (f"of each {sides} tokens {smaller.height} x {smaller.width} stay, {left / windows.count:.3g} of them, "
                f"the nearest to `keep={keep:g}`")  # fmt: skip

    def _grouped_note(self, model: TimmModule, windows: Windows, keep: float, left: int) -> str:
        """The same of a method that groups tokens, so many groups of them."""
        shares = self.work_left(model, windows)
        if left < windows.count:
            return (f"the MLPs run for {left} of {windows.count} tokens, which leaves {shares[left]:.3g} of a block's "
                    f"multiply-adds, the nearest to `keep={keep:g}`")  # fmt: skip
        return (f"at `keep={keep:g}` the nearest to that share of a block's multiply-adds is all of them, so nothing "
                f"is reduced; the next smaller is `keep={max(each for each in shares.values() if each < 1):.2f}`"
                )  # fmt: skip

    def stood_in(self, model: TimmModule, layers: tuple[int, ...]) -> list[tuple[int, nn.Module]]:
        if not len(self.blocks(model)):
            return []
        stages = self.stages(model)
        around = [stages, stages[STAGE], self.blocks(model)]
        inside = [
            part for block in self.blocks(model)[min(layers) - 1 :] for part in self.stood_in_for(block)
        ]  # fmt: skip
        return [*((0, part) for part in around), *((min(layers), part) for part in inside)]

    def called_as_one(self, model: TimmModule) -> None:
        return None  # `all_blocks` calls them as timm does

    def inside(self, model: TimmModule, run: Run) -> StandIn:
        """timm's model with other code for the blocks of its third stage; its own methods run all the rest.

        Args:
            model: The model.
            run: Takes the tokens entering them, in windows, and gives those behind the last, in the same grid.
        """
        stages: Any = self.stages(model)
        third = StandIn(stages[STAGE], blocks=self.all_blocks(model, run), grad_checkpointing=False)
        parts = [third if number == STAGE else stage for number, stage in enumerate(stages)]
        return StandIn(model, **{self.stages_name: StandInSequence(stages, parts)})

    @abstractmethod
    def all_blocks(self, model: TimmModule, run: Run) -> Any:
        """What takes the place of the stage's `blocks` where timm's own code calls them.

        Args:
            model: The model.
            run: As in `inside`.
        """

    def on_grid(self, model: TimmModule, run: Run, x: Tensor) -> Tensor:
        """Runs all blocks of the stage on a grid.

        Args:
            model: The model.
            run: As in `inside`.
            x: `(B, rows, columns, D)`.
        """
        rows, columns = int(x.shape[1]), int(x.shape[2])
        tokens = Tokens(x.flatten(1, 2), 0, windows=self.windows(model, rows, columns))
        return run(tokens).features.unflatten(1, (rows, columns))

    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        return tokens_reached(partial(self.inside, model), images)

    def leaving(self, model: TimmModule, tokens: Tokens) -> Tokens:
        return replace(unclustered(tokens), grouped=None)

    def head(self, model: TimmModule, tokens: Tokens) -> Tensor:
        """All that follows the blocks of the third stage: logits `(B, classes)`."""
        stages: Any = self.stages(model)
        end = StandIn(
            stages[STAGE], downsample=_unchanged, grad_checkpointing=False,
            blocks=self.all_blocks(model, lambda entering: tokens),
        )  # fmt: skip
        parts = [*[_unchanged] * STAGE, end, *stages[STAGE + 1 :]]
        skipped: dict[str, Any] = dict.fromkeys(self.before_stages, _unchanged)
        rest = StandIn(model, **skipped, **{self.stages_name: StandInSequence(stages, parts)})
        assert tokens.windows is not None
        grid = tokens.features.unflatten(1, (tokens.windows.rows, tokens.windows.columns))
        logits: Tensor = rest.forward(self.as_taken(grid))
        return logits

    def as_taken(self, grid: Tensor) -> Tensor:
        """A grid `(B, rows, columns, D)` in the form in which stages of this family take it."""
        return grid

    def pools_by_size(self, model: TimmModule) -> bool:
        return False

    def context(self, model: TimmModule, number: int, tokens: Tokens) -> Context:
        return BareContext()

    def run(self, block: TimmModule, tokens: Tokens, context: Context) -> Tokens:
        windows = tokens.windows
        assert windows is not None
        features = tokens.features.unflatten(1, (windows.rows, windows.columns))
        if tokens.grouped is not None:
            features = self.run_grouped(block, features, tokens.grouped.groups)
        elif tokens.clustered is None:
            features = self.run_block(block, features)
        else:
            features = self.run_smaller(block, features, tokens)
        return tokens.with_features(features.flatten(1, 2))

    def run_block(self, block: TimmModule, features: Tensor) -> Tensor:
        """A block as timm runs it, `(B, rows, columns, D)` to the same."""
        done: Tensor = block(features)
        return done

    def attention_half(
        self, model: TimmModule, block: TimmModule, tokens: Tokens, context: Context
    ) -> tuple[Tokens, AttentionInfo]:
        """What a stage sees, which stands before the block: the tokens as they are, and no attention."""
        return tokens, AttentionInfo((), 0, (), None)

    def mlp_half(self, block: TimmModule, tokens: Tokens) -> Tokens:
        """The whole block, behind its stage."""
        return self.run(block, tokens, BareContext())

    def pre_mlp_norm(self, block: TimmModule, features: Tensor) -> Tensor:
        return features

    def final_norm(self, model: TimmModule, features: Tensor) -> Tensor:
        normed: Tensor = model.norm(features)
        return normed

    def cost(self, model: TimmModule) -> ModelCost:
        size = self.input_size(model)
        assert size is not None
        before = after = rows = columns = 0
        stages: Any = self.stages(model)
        for number, stage in enumerate(stages):
            rows, columns = self.stage_grid(model, number, *size)
            macs = self.other_macs(model, number, *size)
            if number != STAGE:
                macs += sum(self.block_macs(block, _plain(rows, columns), smaller=False) for block in stage.blocks)
            before, after = (before + macs, after) if number <= STAGE else (before, after + macs)
        windows = self.windows(model, *self.grid(model, *size))
        return ModelCost(
            embed=before,
            blocks=tuple(self._block_cost(block, windows) for block in self.blocks(model)),
            head=Macs(fixed=after + self.head_macs(model, rows * columns)),
            num_prefix_tokens=0,
            patches=windows.count,
            head_prefix_tokens=0,
            given_back=True,
        )

    def _block_cost(self, block: TimmModule, windows: Windows) -> BlockCost:
        smaller = windows.smaller()
        known = {each.count: self.block_macs(block, each, smaller=True) for each in smaller}
        known[windows.count] = self.block_macs(block, windows, smaller=False)
        grouped = TabledMacs(known=tuple((count, self.grouped_macs(block, windows, count)) for count in known))
        width, left = self.width(block), tuple((each.count, each.places) for each in smaller)
        macs = TabledMacs(known=tuple(known.items()))
        return BlockCost(Macs(), macs, Macs(), width, width, windows.number, windows.places, left,
                         (windows.rows, windows.columns), grouped)  # fmt: skip

    @abstractmethod
    def width(self, block: TimmModule) -> int:
        """Numbers in a token's features, in this block."""


def default_beginning(depth: int, each_block: bool = False) -> int:
    """The block before which tokens are clustered where nothing else is said: 2 of 6, 3 of 18, 5 of 40; or before which
    they are grouped for the first time, 3 of 6, 5 of 18, 11 of 40.
    """
    return min(depth, 1 + max(1, round(depth / (4 if each_block else 9))))


def nearest_count(windows: Windows) -> TokensOut:
    """How many tokens leave a stage: as many as a smaller window leaves, the nearest to the budget; of two the more."""
    counts = (*(each.count for each in windows.smaller()), windows.count)
    return lambda tokens, budget: min(counts, key=lambda count: (abs(count - budget), -count))


def _unchanged(x: Any) -> Any:
    return x


def _plain(rows: int, columns: int) -> Windows:
    """A grid whose own windows nobody asks for."""
    return Windows(rows, columns, rows, columns)
