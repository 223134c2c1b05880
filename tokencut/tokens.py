"""The tokens in flight: features, sizes, source map and positions, and the two things a stage can do with them.

A reduction decides once (`ops/grouping.py`), and the same decision is then applied to all of these.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.ops import kernels
from tokencut.ops.grid_clusters import GridClusters, Windows
from tokencut.ops.grouping import (
    Decision,
    GridGroups,
    Grouping,
    Selection,
    group_average,
    group_centres,
    group_sum,
    membership,
    norm_factors,
)
from tokencut.ops.ranking import take


@dataclass(frozen=True)
class Clustered:
    """What the tokens of a grid were before a stage made a smaller grid of them, and how to go back.

    Attributes:
        entering: Their features before it, `(B, N, D)`.
        leaving: Those behind it, `(B, M, D)`.
        clusters: What it did.
        block: The 1-based block before which it stood.
    """

    entering: Tensor
    leaving: Tensor
    clusters: GridClusters
    block: int = 1


@dataclass(frozen=True)
class Grouped:
    """Which tokens of a grid share one run of a block's MLP, while each stays.

    Attributes:
        groups: The groups in the block to come; None before the first that has any.
        turn: How many blocks before it had such groups.
        block: The 1-based block before which tokens were first grouped.
    """

    groups: GridGroups | None = None
    turn: int = 0
    block: int = 1


@dataclass(frozen=True)
class Tokens:
    """What travels from block to block.

    Attributes:
        features: Token features, `(B, P + N, D)`: `P` prefix tokens (class, distillation, register), `N` image tokens.
        num_prefix_tokens: `P`, the number of prefix tokens; they stand first and are never reduced.
        sizes: How many patches each image token holds, fp32 `(B, N)`; None while each holds one.
        source: For each patch of the image the image token it went into, int64 `(B, patches)`, -1 where it was
            dropped; None where nobody asked for it.
        positions: Where each image token is, in rows and columns of patches from the first, fp32 `(B, N, 2)`: the mean
            over the patches that it holds. None where the model's blocks ask for no positions.
        grid: Rows and columns of patches of the image, where positions are asked for.
        shared: What the model's family makes once for all blocks up to the next stage (`Adapter.embed` and, behind a
            stage, `Adapter.prepare`), such as a table of rotations; None for nothing.
        policy: Which image tokens still count, fp32 `(B, N)`, 1 or 0 with a gradient: only while a method trains that
            hides tokens instead of dropping them (`Method.soft_policy`).
        bias: What attention adds to its logits for the tokens' sizes and policy, `(B, 1, 1, P + N)` in the features'
            dtype (`attention.attention_bias`); None for nothing. The block loop makes it, once behind each stage.
        log_sizes: The logarithm of `sizes` in the form of `bias`, where it was made along with the features; else None.
        windows: The grid in which the image tokens stand in raster order, and its windows, of a model whose blocks need
            a regular one; else None.
        clustered: What they were before a stage made that grid smaller; None where it did not.
        grouped: Which of them share a run of the MLP, where a method groups them anew before each block; else None.
    """

    features: Tensor
    num_prefix_tokens: int
    sizes: Tensor | None = None
    source: Tensor | None = None
    positions: Tensor | None = None
    grid: tuple[int, int] | None = None
    shared: Any = None
    policy: Tensor | None = None
    bias: Tensor | None = None
    log_sizes: Tensor | None = None
    windows: Windows | None = None
    clustered: Clustered | None = None
    grouped: Grouped | None = None

    @property
    def image(self) -> Tensor:
        """The image tokens' features, `(B, N, D)`."""
        return self.features[:, self.num_prefix_tokens :]

    @property
    def runs(self) -> int:
        """How many image tokens the block to come runs on, or its MLP alone where tokens are grouped for that."""
        grouped = None if self.grouped is None else self.grouped.groups
        return self.count if grouped is None else grouped.count

    @property
    def count(self) -> int:
        """`N`, the number of image tokens; a plain number also where `torch.jit.trace` makes tensors of sizes."""
        return int(self.features.shape[1]) - self.num_prefix_tokens

    def known_sizes(self) -> Tensor:
        """The sizes of the image tokens, fp32 `(B, N)`: all one where nothing was merged yet."""
        if self.sizes is not None:
            return self.sizes
        return torch.ones((self.features.shape[0], self.count), dtype=torch.float32, device=self.features.device)

    def counts(self) -> Tensor | None:
        """What each image token counts for in an average, fp32 `(B, N)`: its patches; None where all count alike."""
        if self.policy is None:
            return self.sizes
        return self.policy * self.known_sizes()

    def with_features(self, features: Tensor) -> Tokens:
        """The same tokens with other features of the same shape."""
        # Twice a block: spelled out it takes a fifth of the time of `replace`.
        return Tokens(features, self.num_prefix_tokens, self.sizes, self.source, self.positions, self.grid, self.shared,
                      self.policy, self.bias, self.log_sizes, self.windows, self.clustered, self.grouped)  # fmt: skip

    def with_bias(self, bias: Tensor | None) -> Tokens:
        """The same tokens with another bias."""
        return Tokens(self.features, self.num_prefix_tokens, self.sizes, self.source, self.positions, self.grid,
                      self.shared, self.policy, bias, self.log_sizes, self.windows, self.clustered,
                      self.grouped)  # fmt: skip

    def left(
        self, features: Tensor, sizes: Tensor | None, source: Tensor | None, positions: Tensor | None,
        log_sizes: Tensor | None = None,
    ) -> Tokens:  # fmt: skip
        """The tokens that left a stage, `M` image tokens; arguments as in the class."""
        return Tokens(features, self.num_prefix_tokens, sizes, source, positions, self.grid, self.shared, self.policy,
                      None, log_sizes, self.windows, self.clustered, self.grouped)  # fmt: skip


def apply_decision(tokens: Tokens, decision: Decision) -> Tokens:
    """Carries out a decision on all that travels; prefix tokens pass through untouched.

    Args:
        tokens: The tokens entering, `N` image tokens.
        decision: What to do with the image tokens.

    Returns:
        The tokens leaving, `M` image tokens, in the order of the selection or of the groups.
    """
    if isinstance(decision, GridClusters):
        return _cluster(tokens, decision)
    if isinstance(decision, GridGroups):
        return _group(tokens, decision)
    return _select(tokens, decision) if isinstance(decision, Selection) else _merge(tokens, decision)


def _cluster(tokens: Tokens, decision: GridClusters) -> Tokens:
    features = decision.merged(tokens.image)
    source = None if tokens.source is None else _follow(tokens.source, decision.source())
    clustered = Clustered(tokens.image, features, decision)
    return replace(tokens, features=features, source=source, windows=decision.smaller, clustered=clustered, bias=None)


def _group(tokens: Tokens, decision: GridGroups) -> Tokens:
    before = tokens.grouped
    turn = 0 if before is None or before.groups is None else before.turn + 1
    grouped = Grouped(decision, turn, 1 if before is None else before.block)
    source = None if tokens.source is None else decision.group
    return replace(tokens, source=source, grouped=grouped)


def group_means(x: Tensor, groups: GridGroups) -> Tensor:
    """The mean of each group, of what there is for each token: `(B, N, D)` to `(B, M, D)`."""
    each = torch.ones(groups.group.shape, device=x.device)
    weight = group_average(groups.group, each, each, groups.count)
    grouping, sizes = Grouping(groups.group, weight, groups.count), group_sum(groups.group, each, groups.count)
    return _weighted_sums(Tokens(x, 0), grouping, sizes)[0]


def unclustered(tokens: Tokens) -> Tokens:
    """Undoes what made the grid smaller: each token of the grid before it takes from those that it went into.

    Args:
        tokens: Tokens of a smaller grid; returned as they are where it is none.

    Returns:
        Tokens of the grid before, `(B, N, D)`; their source map, if any, goes on telling of the smaller one.
    """
    if tokens.clustered is None:
        return tokens
    before, clusters = tokens.clustered, tokens.clustered.clusters
    if clusters.change:
        features = before.entering + clusters.given_back(tokens.image - before.leaving)
    else:
        features = clusters.given_back(tokens.image)
    return replace(tokens, features=features, windows=clusters.windows, clustered=None)


def _select(tokens: Tokens, decision: Selection) -> Tokens:
    index, source = decision.index, tokens.source
    if source is not None:
        place = torch.full((index.shape[0], tokens.count), -1, dtype=torch.int64, device=index.device)
        place = place.scatter(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
        source = _follow(source, place)
    sizes = None if tokens.sizes is None else take(tokens.sizes, index)
    positions = None if tokens.positions is None else take(tokens.positions, index)
    features = _taken(tokens, index) if decision.features is None else decision.features
    return tokens.left(features, sizes, source, positions)


def _taken(tokens: Tokens, index: Tensor) -> Tensor:
    """The features of the tokens that stay, `(B, P + M, D)`."""
    if kernels.usable(tokens.features, index):
        return kernels.merging.take(tokens.features, tokens.num_prefix_tokens, index)
    return torch.cat((tokens.features[:, : tokens.num_prefix_tokens], take(tokens.image, index)), 1)


def _merge(tokens: Tokens, decision: Grouping) -> Tokens:
    sizes, source = decision.sizes, tokens.source
    if sizes is None:
        sizes = group_sum(decision.group, tokens.known_sizes(), decision.count)
    if source is not None:
        source = _follow(source, torch.where(decision.group < decision.count, decision.group, -1))
    positions = tokens.positions
    if positions is not None:
        positions = group_centres(decision.group, positions, tokens.known_sizes(), decision.count)
    features, log_sizes = _weighted_sums(tokens, decision, sizes)
    if decision.keep_norm:
        features = _lengthened(tokens, decision, features)
    return tokens.left(features, sizes, source, positions, log_sizes)


def _lengthened(tokens: Tokens, decision: Grouping, sums: Tensor) -> Tensor:
    """Sums `(B, P + M, D)`, those of image tokens as long as their members."""
    with torch.no_grad():  # a part of the decision
        lengths, merged = (values.float().norm(dim=2) for values in (tokens.image, sums[:, tokens.num_prefix_tokens :]))
        factors = norm_factors(decision.group, decision.weight, lengths, merged, decision.count)
        factors = F.pad(factors, (tokens.num_prefix_tokens, 0), value=1.0).to(sums.dtype)
    return sums * factors.unsqueeze(2)


def _weighted_sums(tokens: Tokens, decision: Grouping, sizes: Tensor) -> tuple[Tensor, Tensor | None]:
    """The groups' sums behind the prefix tokens, `(B, P + M, D)`, and the logarithms of their sizes, if made along."""
    features, prefix = tokens.features, tokens.num_prefix_tokens
    # A token alone in its group has weight 1, so it passes unchanged in any precision.
    if kernels.usable(features, decision.weight, backward=True):
        if kernels.usable(features):
            return kernels.merging.merge_and_weigh(
                features, prefix, decision.group, decision.weight, sizes, decision.ordered
            )
        of_count = decision.count, decision.ordered
        return kernels.merging.merge(features, prefix, decision.group, decision.weight, *of_count), None
    if features.is_cuda or torch.compiler.is_compiling():
        return _merged_by_product(tokens, decision), None
    return _merged_by_adding(tokens, decision), None


def _merged_by_product(tokens: Tokens, decision: Grouping) -> Tensor:
    """Gather and weighted sum in one batched product: in the same order each time, and quick wherever products are."""
    weight = decision.weight.to(tokens.features.dtype)
    matrix = membership(decision.group, decision.count).to(weight.dtype) * weight.unsqueeze(1)
    merged = torch.bmm(matrix, tokens.image)
    return torch.cat((tokens.features[:, : tokens.num_prefix_tokens], merged), 1)


def _merged_by_adding(tokens: Tokens, decision: Grouping) -> Tensor:
    """Adds each weighted token to its group's row: 0.2 ms on a CPU where the product takes 3.8 (16 x 196 x 384)."""
    batch, _, width = tokens.features.shape
    dropped, leaving = decision.group == decision.count, tokens.num_prefix_tokens + decision.count
    # Prefix tokens are groups of their own, and what is dropped adds nothing to the first token.
    rows = F.pad((decision.group + tokens.num_prefix_tokens).masked_fill(dropped, 0), (tokens.num_prefix_tokens, 0))
    rows = rows + F.pad(torch.arange(tokens.num_prefix_tokens, device=rows.device), (0, tokens.count))
    weight = F.pad(decision.weight.masked_fill(dropped, 0), (tokens.num_prefix_tokens, 0), value=1.0)
    rows = rows + leaving * torch.arange(batch, device=rows.device).unsqueeze(1)
    weighted = tokens.features * weight.unsqueeze(2)  # fp32, also where the features are not
    sums = weighted.new_zeros((batch * leaving, width)).index_add(0, rows.flatten(), weighted.flatten(0, 1))
    return sums.view(batch, leaving, width).to(tokens.features.dtype)


_NOTHING = contextlib.nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast leaves products alone, so that decisions are made in fp32 in any precision."""
    kind = device.type
    # The meta device, on which costs are counted, knows no autocast.
    return torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else _NOTHING


def without_gradient() -> AbstractContextManager[object]:
    """`torch.no_grad()` where a gradient would be kept."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def _follow(source: Tensor, place: Tensor) -> Tensor:
    """Where each patch is after its token moved to `place`; a dropped patch stays dropped."""
    return torch.where(source >= 0, place.gather(1, source.clamp(min=0)), source)
