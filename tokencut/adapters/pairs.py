"""A bias for each pair of tokens: timm's relative position biases, for tokens wherever they are.

timm keeps such biases by the offset between two patches. Behind a stage each pair of tokens gets what there is at the
offset between them, which lies between whole patches where tokens were merged.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.adapters.base import Context, linear_macs
from tokencut.adapters.positions import PositionedAdapter
from tokencut.attention import TimmModule
from tokencut.cost import ModelCost
from tokencut.tokens import Tokens


@dataclass(frozen=True)
class PairContext(Context):
    """`Context` of a block whose attention adds a bias for each pair, its own or one that all blocks share.

    Attributes:
        keyword: By which argument timm's block and attention take a bias.
        adds_own: Whether the block's own bias is not in `bias` yet: timm's block adds it to what it is given.
    """

    keyword: str = ""
    adds_own: bool = False

    def block_arguments(self) -> dict[str, Any]:
        return {self.keyword: self.bias}

    def attention_arguments(self) -> dict[str, Any]:
        return self.block_arguments()

    def given(self, **arguments: Any) -> Context:
        return replace(self, bias=arguments.get(self.keyword))


@dataclass(frozen=True)
class PairPlaces:
    """What blocks up to the next stage share (`Tokens.shared`).

    Attributes:
        whole: The bias that all blocks share, for all patches, `(1, H, P + patches, P + patches)`; None for none.
        bias: The same for the tokens there are.
        offsets: Where pairs of tokens are in a table by offset, `(B, N, N, 2)`, columns first, each from -1 to 1.
        shares: In place of offsets, what each patch counts for in a token, `(B, N, patches)`.
    """

    whole: Tensor | None
    bias: Tensor | None
    offsets: Tensor | None = None
    shares: Tensor | None = None

    @property
    def on_grid(self) -> bool:
        """Whether the tokens are the patches as they came, for which biases are timm's own."""
        return self.offsets is None and self.shares is None


class PairBiasAdapter(PositionedAdapter):
    """A columnar model whose attention adds a bias for each pair of tokens, a block's own or one for all blocks.

    Up to the first stage blocks run as timm runs them; behind it those that would add a bias of their own, which is for
    all patches, run in halves.

    Attributes:
        keyword: By which argument timm's blocks take the bias that all share.
    """

    keyword: ClassVar[str]

    @abstractmethod
    def shared_holder(self, model: TimmModule) -> TimmModule | None:
        """The module that holds the bias of all blocks; None where each has its own."""

    @abstractmethod
    def own_holder(self, block: TimmModule) -> TimmModule | None:
        """The module that holds a block's own bias; None for none."""

    @abstractmethod
    def whole_bias(self, holder: TimmModule) -> Tensor:
        """A bias for all patches as timm makes it, `(1, H, P + patches, P + patches)`."""

    def adds_what_it_is_given(self, block: TimmModule) -> bool:
        """Whether timm's block adds a shared bias to its own; otherwise it passes the shared one over."""
        return True

    def attention_note(self, model: TimmModule) -> str | None:
        if self.shared_holder(model) is None and all(self.own_holder(block) is None for block in self.blocks(model)):
            return None
        return ("attention adds a bias for each pair of tokens, which flash attention does not take: it runs by a "
                "slower kernel, in timm's own model too")  # fmt: skip

    def paired(self, model: TimmModule, features: Tensor, images: Tensor) -> Tokens:
        """The tokens entering the first block, `(B, P + N, D)`, where they are, and the bias that all blocks share."""
        tokens = self.located(model, features, self.grid(model, *images.shape[-2:]))
        holder = self.shared_holder(model)
        whole = None if holder is None else self.whole_bias(holder)
        return replace(tokens, shared=PairPlaces(whole, whole))

    def prepare(self, model: TimmModule, tokens: Tokens) -> Tokens:
        if tokens.positions is None:
            return tokens
        whole, shares, grid = tokens.shared.whole, self.shares(tokens), tokens.grid
        places = PairPlaces(whole, None, shares=shares)
        if shares is None:
            assert grid is not None
            rows, columns = ((line.unsqueeze(2) - line.unsqueeze(1)) / max(1, count - 1)
                             for line, count in zip(self.places(tokens).unbind(-1), grid, strict=True))  # fmt: skip
            places = PairPlaces(whole, None, torch.stack((columns, rows), -1))
        if whole is not None:
            places = replace(places, bias=pair_bias(whole, places, grid or (1, 1), tokens.num_prefix_tokens))
        return replace(tokens, shared=places)

    def context(self, model: TimmModule, number: int, tokens: Tokens) -> Context:
        places, bias = tokens.shared, _added(tokens.shared.bias, tokens.bias)
        holder = self.own_holder(self.blocks(model)[number - 1])
        if holder is None or places.on_grid:
            return PairContext(bias, self.keyword, adds_own=holder is not None)
        assert tokens.grid is not None
        own = pair_bias(self.whole_bias(holder), places, tokens.grid, tokens.num_prefix_tokens)
        return PairContext(_added(own, bias), self.keyword)

    def needs_halves(self, block: TimmModule, features: Tensor, context: Context) -> bool:
        assert isinstance(context, PairContext)
        if self.own_holder(block) is None:
            return False
        return not (context.adds_own and (context.bias is None or self.adds_what_it_is_given(block)))

    def complete(self, block: TimmModule, context: Context) -> Context:
        assert isinstance(context, PairContext)
        if not context.adds_own:
            return context
        bias = _added(self.whole_bias(self.own_holder(block)), context.bias)
        return replace(context, bias=bias, adds_own=False)

    def cost(self, model: TimmModule) -> ModelCost:
        cost, holder = super().cost(model), self.shared_holder(model)
        # A bias may come out of a small network, once for every offset.
        shared = 0 if holder is None else self.bias_macs(holder)
        own = [self.own_holder(block) for block in self.blocks(model)]
        blocks = [
            block
            if holder is None
            else replace(block, before=replace(block.before, fixed=block.before.fixed + self.bias_macs(holder)))
            for block, holder in zip(cost.blocks, own, strict=True)
        ]
        return replace(cost, embed=cost.embed + shared, blocks=tuple(blocks))

    def bias_macs(self, holder: TimmModule) -> int:
        """Multiply-adds of making a bias for all offsets, once for a batch."""
        network = getattr(holder, "mlp", None)
        rows, columns = holder.window_size
        return 0 if network is None else linear_macs(network) * (2 * rows - 1) * (2 * columns - 1)


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def pair_bias(whole: Tensor, places: PairPlaces, grid: tuple[int, int], prefix: int) -> Tensor:
    """A bias for each pair of tokens, out of that for each pair of patches.

    Args:
        whole: The bias for all patches, `(1, H, P + patches, P + patches)`, the same for pairs at the same offset.
        places: Where the tokens are.
        grid: Rows and columns of patches.
        prefix: `P`.

    Returns:
        `(B, H, P + N, P + N)` in the dtype of `whole`: between two image tokens the value at their offset, bilinear
        between whole offsets, or the average over their patches; with prefix tokens what patches have with them.
    """
    if places.shares is not None:
        inner = places.shares.unsqueeze(1) @ whole[:, :, prefix:, prefix:].float()
        inner = inner @ places.shares.unsqueeze(1).transpose(2, 3)
    else:
        assert places.offsets is not None
        table = offset_table(whole[:, :, prefix:, prefix:], grid).float()
        table = table.expand(places.offsets.shape[0], -1, -1, -1)
        inner = F.grid_sample(table, places.offsets, mode="bilinear", padding_mode="border", align_corners=True)
    inner = inner.to(whole.dtype)
    if not prefix:
        return inner
    batch, heads, count, _ = inner.shape
    rows = whole[:, :, prefix:, :prefix].mean(2, keepdim=True).expand(batch, heads, count, prefix)
    columns = whole[:, :, :prefix, prefix:].mean(3, keepdim=True).expand(batch, heads, prefix, count)
    corner = whole[:, :, :prefix, :prefix].expand(batch, -1, -1, -1)
    return torch.cat((torch.cat((corner, columns), 3), torch.cat((rows, inner), 3)), 2)


def offset_table(whole: Tensor, grid: tuple[int, int]) -> Tensor:
    """A bias by offset, `(1, H, 2 rows - 1, 2 columns - 1)`, out of one by pairs of patches `(1, H, patches, patches)`.

    At each offset, of the query from the key, the pair is read whose upper and whose left one are on the border.
    """
    queries, keys = [], []
    for count in grid:
        offset = torch.arange(1 - count, count, device=whole.device)
        queries.append(offset.clamp(min=0))
        keys.append((-offset).clamp(min=0))
    query, key = (line[0].unsqueeze(1) * grid[1] + line[1] for line in (queries, keys))
    return whole[:, :, query, key]
