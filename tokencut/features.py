"""Features on the full grid of patches: un-merging by the source map, and timm's `forward_intermediates`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.attention import AttentionInfo
from tokencut.errors import UsageError
from tokencut.schedule import StagePlan
from tokencut.tokens import Tokens, full_precision

# As timm takes them: so many last blocks, or 0-based blocks, negative ones from the end; None for all.
Indices: TypeAlias = int | Sequence[int] | None

# What a patch is given back: its own features with what its token changed by, or its token's features.
UNMERGE_RULES = ("change", "copy")

FORMATS = ("NCHW", "NLC")


def unmerge(tokens: Tokens, last: Tensor | None = None) -> Tensor:
    """Gives every patch the features of the token that it went into.

    Shapes do not depend on the data, and the result has a gradient.

    Args:
        tokens: Tokens with a source map, `N` image tokens.
        last: What the patches become that were dropped, `(B, patches, D)`: the last features they had, if it is the
            un-merged tokens that entered the stage where they were. Zeros where None.

    Returns:
        `(B, patches, D)`, without prefix tokens, in the order of the patches.

    Raises:
        UsageError: The tokens have no source map.
    """
    if tokens.source is None:
        raise UsageError("the tokens have no source map to go back by; type model.trace(images, source=True)")
    # Behind the tokens a row of zeros, for what was dropped.
    image, dropped = F.pad(tokens.image, (0, 0, 0, 1)), tokens.source < 0
    features = _take_rows(image, torch.where(dropped, tokens.count, tokens.source))
    return features if last is None else torch.where(dropped.unsqueeze(2), last.to(image.dtype), features)


def _take_rows(features: Tensor, index: Tensor) -> Tensor:
    """`features[b, index[b, i]]`, `(B, M, D)` and `(B, I)` to `(B, I, D)`: 0.05 ms on a CPU where a gather takes 0.42
    (4 x 256 x 384).
    """
    batch, count, width = features.shape
    offset = count * torch.arange(batch, device=index.device).unsqueeze(1)
    return features.reshape(batch * count, width).index_select(0, (index + offset).flatten()).view(*index.shape, width)


class Unmerging:
    """Un-merges tokens through all the stages of a run, one after the other.

    By `change`, patch `i` of token `j` gets `y_i = x_i + (z_j - s_j)`: the features `x_i` that it had where it entered
    the last stage, and what its token has changed by since, from `s_j` right behind it to `z_j`. From the second stage
    on, `x_i` is itself un-merged by this rule. A patch alone in its token gets its token's features, to the bit.

    Tokens that were dropped have no `j`, and a token that fuses unlike ones is like none of them. Where there are such
    (`similar`), the token left that is most similar at the stage takes its place, for all stages to come.

    By `copy`, every patch gets `z_j`; one that was dropped keeps its last features, those with which it entered the
    stage that dropped it.

    From the first stage on this holds one number for each feature of each patch, `(B, patches, D)`. Which rule is how
    near to the dense model: examples/benchmarks/unmerging.md.
    """

    def __init__(self, rule: str, similar: bool = False) -> None:
        """Starts where every token is a patch.

        Args:
            rule: `change` or `copy`.
            similar: Whether stages drop tokens or fuse unlike ones (not `Method.averages`).

        Raises:
            UsageError: There is no such rule.
        """
        if rule not in UNMERGE_RULES:
            raise UsageError(f"unmerge {rule!r} is not known; give {' or '.join(map(repr, UNMERGE_RULES))}")
        self._rule = rule
        self._similar = similar
        self._own: Tensor | None = None  # what is a patch's own and not its token's
        self._followed: Tensor | None = None  # by `change`: the token whose changes are a patch's, as a source map

    def stage(self, entering: Tokens, leaving: Tokens) -> None:
        """Takes note of what a stage does to each patch.

        Args:
            entering: The tokens before the stage, with their source map.
            leaving: The tokens behind it.
        """
        patches, before = self.patches(entering), self._followed
        self._own = patches
        if self._rule == "change":
            self._followed = leaving.source
            if self._similar:
                before = entering.source if before is None else before
                assert before is not None
                self._followed = successors(entering, leaving).gather(1, before)
            # z + (x - s) is x + (z - s), but holds one map instead of two, and is z to the bit for a patch alone.
            self._own = patches - unmerge(replace(leaving, source=self._followed))

    def patches(self, tokens: Tokens) -> Tensor:
        """One feature for every patch, `(B, patches, D)`; the tokens themselves before the first stage."""
        if self._own is None:
            return tokens.image
        if self._rule == "copy":
            return unmerge(tokens, self._own)
        return unmerge(replace(tokens, source=self._followed)) + self._own.to(tokens.features.dtype)

    def full(self, tokens: Tokens) -> Tensor:
        """Prefix tokens, untouched, and all patches: `(B, P + patches, D)`."""
        if self._own is None:
            return tokens.features
        return torch.cat((tokens.features[:, : tokens.num_prefix_tokens], self.patches(tokens)), 1)


@torch.no_grad()
def successors(entering: Tokens, leaving: Tokens) -> Tensor:
    """Which token behind a stage stands for each token before it.

    Args:
        entering: The tokens before the stage, `N` image tokens with their source map.
        leaving: The tokens behind it.

    Returns:
        int64 `(B, N)`: what a token became that stayed as it was; the most similar one (Euclidean distance, the first
        of equals) for one that was dropped, or fused into one with others.
    """
    assert entering.source is not None and leaving.source is not None
    count, left = entering.count, leaving.count
    # Every token holds a patch, which tells where it went; patches dropped before write past the end.
    slot = torch.where(entering.source >= 0, entering.source, count)
    became = slot.new_full((slot.shape[0], count + 1), -1).scatter(1, slot, leaving.source)[:, :count]
    stays = became >= 0
    place = torch.where(stays, became, left)
    members = place.new_zeros((place.shape[0], left + 1)).scatter_add(1, place, torch.ones_like(place))
    alone = stays & (members.gather(1, place) == 1)
    # Dropped ones first, then fused ones. So many of both there are where the fused become one.
    lost = (stays.long() + alone.long()).argsort(dim=1, stable=True)[:, : count - left + 1]
    x, s = _take_rows(entering.image, lost).float(), leaving.image.float()
    with full_precision(x.device):
        # Half the squared distance, less what all candidates of a token share.
        distance = torch.baddbmm(0.5 * s.square().sum(2).unsqueeze(1), x, s.transpose(1, 2), alpha=-1)
    similar = torch.where(alone.gather(1, lost), became.gather(1, lost), distance.argmin(2))
    return became.scatter(1, lost, similar)


def block_indices(depth: int, indices: Indices) -> list[int]:
    """Resolves timm's `indices` into block numbers.

    Args:
        depth: The number of blocks.
        indices: All blocks where None, so many last ones where a number, those of a sequence otherwise (0-based,
            negative ones count from the end).

    Returns:
        0-based block numbers, in the order given.

    Raises:
        UsageError: A block does not exist, or none is named.
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise UsageError(f"{indices} last blocks cannot be taken of {depth}; give a number from 1 to {depth}, such "
                             f"as {min(3, depth)}, or blocks from 0 on, such as {_example(depth)}")  # fmt: skip
        return list(range(depth - indices, depth))
    for index in indices:
        if not -depth <= index < depth:
            raise UsageError(f"there is no block {index}: this model has blocks 0 to {depth - 1} (or -{depth} to -1, "
                             f"from the end); give such as {_example(depth)}")  # fmt: skip
    if not indices:
        raise UsageError(f"no block is named to take features of; give such as {_example(depth)}, or None for all")
    return [operator.index(index) % depth for index in indices]


def _example(depth: int) -> list[int]:
    """Blocks at even distances, as heads take them."""
    return sorted({(depth * part - 1) // 3 for part in (1, 2, 3)})


@dataclass(frozen=True)
class Form:
    """How features are handed out; the fields are timm's arguments.

    Raises:
        UsageError: There is no such format.
    """

    return_prefix_tokens: bool = False
    output_fmt: str = "NCHW"
    intermediates_only: bool = False
    output_dict: bool = False

    def __post_init__(self) -> None:
        # timm's own `Format` is a string whose text differs between Python versions: compare, do not print it.
        if self.output_fmt not in FORMATS:
            shown = getattr(self.output_fmt, "value", self.output_fmt)
            raise UsageError(f"output_fmt {shown!r} is not known; give {' or '.join(map(repr, FORMATS))}")

    def arranged(self, found: Sequence[Tensor], final: Tensor | None, grid: tuple[int, ...]) -> Any:
        """Puts features into this form.

        Args:
            found: The chosen blocks' features on the full grid, each `(B, P + patches, D)`.
            final: The same behind the last block and the final norm; None where only `found` are wanted.
            grid: Rows and columns of patches, of clips with tubelets along their frames before them.

        Returns:
            As timm: `(final, intermediates)`, the intermediates alone, or a dictionary. Intermediates are
            `(B, D, *grid)` or `(B, patches, D)`; each beside its prefix tokens `(B, P, D)` if those are asked
            for and there are any.
        """
        patches = prod(grid)
        spatial = [each[:, each.shape[1] - patches :] for each in found]
        if self.output_fmt == "NCHW":
            spatial = [each.unflatten(1, grid).movedim(-1, 1).contiguous() for each in spatial]
        prefixes = None
        if self.return_prefix_tokens and any(each.shape[1] > patches for each in found):
            prefixes = [each[:, : each.shape[1] - patches] for each in found]
        if self.output_dict:
            named: dict[str, Any] = {"image_intermediates": spatial}
            if prefixes is not None:
                named["image_intermediates_prefix"] = prefixes
            if final is not None:
                named["image_features"] = final
            return named
        intermediates = spatial if prefixes is None else list(zip(spatial, prefixes, strict=True))
        return intermediates if final is None else (final, intermediates)


class Intermediates:
    """An observer that un-merges the outputs of chosen blocks."""

    def __init__(self, taken: Sequence[int], unmerging: Unmerging) -> None:
        """Starts with none.

        Args:
            taken: 0-based block numbers.
            unmerging: What gives patches their features back.
        """
        self.found: list[Tensor] = []
        self._taken = frozenset(taken)
        self._unmerging = unmerging

    def stage(self, plan: StagePlan, entering: Tokens, leaving: Tokens, attention: AttentionInfo | None) -> None:
        """Keeps what every patch had before some are merged or dropped."""
        self._unmerging.stage(entering, leaving)

    def block(self, number: int, tokens: Tokens) -> None:
        """Takes the block's output, if it is a chosen one."""
        if number - 1 in self._taken:
            self.found.append(self._unmerging.full(tokens))

    def handed_out(self, form: Form, tokens: Tokens, norm: Callable[[Tensor], Tensor], every: bool,
                   grid: tuple[int, ...]) -> Any:  # fmt: skip
        """What was taken, in a form.

        Args:
            form: The form.
            tokens: The tokens behind the last block that ran.
            norm: The model's final norm.
            every: Whether it applies to the intermediates too.
            grid: As `Form.arranged` takes it.
        """
        found = [norm(each) for each in self.found] if every else self.found
        final = None if form.intermediates_only else norm(self._unmerging.full(tokens))
        return form.arranged(found, final, grid)
