"""The closed form: multiply-adds of a Vision Transformer for any schedule, before anything runs. No torch.

Convention (fvcore's and the papers'): one multiply-add counts as one, over convolutions, linear layers, matrix products
and attention (QK' and PV), the stages' own products included. Norms, softmax, sorting, gathers and the additions that
merge tokens are not counted.

An adapter describes its model in pieces whose cost is a polynomial in the number of tokens; a method adds the products
of its stage (`Method.macs`). `predict` sums both for a schedule, and equals what fvcore counts to the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Macs:
    """Multiply-adds as a polynomial in the number of tokens `n`: `fixed + per_token * n + per_pair * n^2`."""

    fixed: int = 0
    per_token: int = 0
    per_pair: int = 0

    def at(self, tokens: int) -> int:
        """Multiply-adds per image with `tokens` tokens."""
        return self.fixed + self.per_token * tokens + self.per_pair * tokens * tokens

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.fixed + other.fixed, self.per_token + other.per_token, self.per_pair + other.per_pair)


@dataclass(frozen=True)
class TabledMacs(Macs):
    """Multiply-adds for the numbers of tokens that can be, each beside its own: those of regular grids."""

    known: tuple[tuple[int, int], ...] = ()

    def at(self, tokens: int) -> int:
        return dict(self.known)[tokens]


@dataclass(frozen=True)
class BlockCost:
    """One transformer block.

    Attributes:
        before: The part that runs on the tokens entering (attention; the whole block where nothing follows the stage).
        after: The part that runs on the tokens leaving the stage (the MLP).
        class_row: What a stage that reads class attention adds in this block for the class row, on the tokens entering.
        width: Numbers in a token's features, where a stage stands.
        key_width: Numbers in one head's key.
        windows: How many windows the tokens stand in; 0 where all of them see all.
        places: The places of a window, padding included.
        smaller: For each number of tokens that can leave a stage the places of a window behind it, ascending.
        grid: Rows and columns of the tokens, where they stand in windows.
        grouped: The whole block where all tokens stay and so many groups of them run through its MLP; with as many as
            there are tokens, one of those before a stage that groups them.
    """

    before: Macs
    after: Macs
    class_row: Macs
    width: int
    key_width: int
    windows: int = 0
    places: int = 0
    smaller: tuple[tuple[int, int], ...] = ()
    grid: tuple[int, int] = (0, 0)
    grouped: Macs = Macs()


@dataclass(frozen=True)
class ModelCost:
    """A whole model: `embed` (patch embedding), `blocks`, `head` (pooling and classifier, on the tokens leaving).

    `num_prefix_tokens` and `patches` count the tokens entering the first block, `head_prefix_tokens` those prefix
    tokens that the head's `per_token` part sees. Blocks may differ; those that are equal cost the same in everything.
    Where tokens are `given_back` behind the last block, the head sees as many as entered the first.
    """

    embed: int
    blocks: tuple[BlockCost, ...]
    head: Macs
    num_prefix_tokens: int
    patches: int
    head_prefix_tokens: int
    given_back: bool = False

    @property
    def leaving(self) -> tuple[int, ...]:
        """How many tokens can leave a stage of a hierarchical model, ascending."""
        return tuple(count for count, _ in self.blocks[0].smaller)


@dataclass(frozen=True)
class StageCost:
    """One stage of a schedule.

    Attributes:
        tokens_in: Image tokens entering.
        tokens_out: Image tokens leaving.
        macs: Multiply-adds of its own products.
        reads_attention: Whether its method reads class attention, so that the block's class row is computed for it.
        each_block: Whether it stands before each block from its own on, and all tokens stay in these, in groups.
    """

    tokens_in: int
    tokens_out: int
    macs: int
    reads_attention: bool = True
    each_block: bool = False


@dataclass(frozen=True)
class BlockRow:
    """One line of the breakdown: `block` is 1-based, or 0 for the embedding and -1 for the head."""

    block: int
    tokens_in: int
    tokens_out: int
    macs: int
    stage_macs: int


def predict(model: ModelCost, stages: Mapping[int, StageCost]) -> tuple[BlockRow, ...]:
    """Multiply-adds per image of a model under a schedule, row by row.

    Args:
        model: The model's pieces, as its adapter describes them.
        stages: Stage of each reducing block, by 1-based block number, and by 0 what is removed before the first one;
            empty for the dense model.

    Returns:
        A row for the embedding, one a block, one for the head. Their `macs` (stages included) add up to the total.
    """
    patches, static = model.patches, stages.get(0)
    tokens = patches if static is None else static.tokens_out
    rows = [BlockRow(0, patches, tokens, model.embed, 0)]
    grouping: StageCost | None = None
    grouped = any(stage.each_block for stage in stages.values())
    for number, block in enumerate(model.blocks, start=1):
        stage = stages.get(number)
        entering, leaving = tokens, tokens if stage is None else stage.tokens_out
        grouping = stage if stage is not None and stage.each_block else grouping
        if grouped:
            own = 0 if grouping is None else grouping.macs
            rows.append(BlockRow(number, entering, leaving, block.grouped.at(leaving) + own, own))
            tokens = leaving
            continue
        before, after = model.num_prefix_tokens + entering, model.num_prefix_tokens + leaving
        row = block.class_row.at(before) if stage is not None and stage.reads_attention else 0
        own = 0 if stage is None else stage.macs + row
        macs = block.before.at(before) + block.after.at(after) + own
        rows.append(BlockRow(number, entering, leaving, macs, own))
        tokens = leaving
    tokens = model.patches if model.given_back else tokens
    rows.append(BlockRow(-1, tokens, tokens, model.head.at(model.head_prefix_tokens + tokens), 0))
    return tuple(rows)


def total(rows: tuple[BlockRow, ...]) -> int:
    """Multiply-adds per image over all rows."""
    return sum(row.macs for row in rows)
