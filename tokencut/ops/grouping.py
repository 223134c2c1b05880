"""Which tokens stay and which become one: decisions as pure index data, and how groups are numbered and weighed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.ops import kernels
from tokencut.ops.exporting import exporting, lifted, numbers, pick, running, whole
from tokencut.ops.grid_clusters import GridClusters
from tokencut.ops.ranking import take_rows

# Members that cancel out leave a sum of rounding errors: it is not scaled up beyond this.
LONGEST = 10.0


@dataclass(frozen=True)
class Selection:
    """The decision to keep some tokens and drop the rest.

    Attributes:
        index: The image tokens that stay, int64 `(B, M)`, ascending.
        features: The prefix tokens and those that stay, `(B, P + M, D)`, where they were copied along.
    """

    index: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class Grouping:
    """The decision which tokens become one.

    Attributes:
        group: For each image token the token it goes into, int64 `(B, N)`, values `0..M-1`, none unused: the
            order of the tokens leaving. Methods number them by `in_order`, or as published. `M` where it is dropped.
        weight: What each token contributes to its group, fp32 `(B, N)`: the coefficients of a weighted sum. Weights of
            a group add up to 1 for an average (`group_average`).
        count: `M`, the number of tokens that leave.
        sizes: How many patches each group holds, fp32 `(B, M)`, where that is known already.
        ordered: Whether groups are known to be numbered by `in_order`.
        keep_norm: Whether each sum is scaled to the average length of its members, by the same weights (MLERP,
            arXiv 2312.01026): an average of different tokens is shorter than they are, and what later blocks add to it
            then weighs more than it did in training.
    """

    group: Tensor
    weight: Tensor
    count: int
    sizes: Tensor | None = None
    ordered: bool = False
    keep_norm: bool = False


@dataclass(frozen=True)
class GridGroups:
    """The decision which tokens of a grid share one run of what looks at each token alone.

    Attributes:
        group: The group of each token, int64 `(B, N)`, values `0..M-1`: in the order of the tokens that stay.
        stays: The token of each group that stays, int64 `(B, M)`, ascending.
    """

    group: Tensor
    stays: Tensor

    @property
    def count(self) -> int:
        """`M`, the groups; a plain number also where `torch.jit.trace` makes tensors of sizes."""
        return int(self.stays.shape[1])

    def given_back(self, x: Tensor) -> Tensor:
        """What each token gets of its group, `(B, M, D)` to `(B, N, D)`."""
        return take_rows(x, self.group)

    def taken(self, x: Tensor) -> Tensor:
        """The tokens that stay, `(B, N, D)` to `(B, M, D)`."""
        return take_rows(x, self.stays)


Decision = Selection | Grouping | GridClusters | GridGroups


def membership(group: Tensor, count: int) -> Tensor:
    """Which token is in which group, as a mask.

    Args:
        group: Group of each token, int64 `(B, N)`.
        count: `M`, the number of groups.

    Returns:
        Bool `(B, M, N)`.
    """
    return group.unsqueeze(1) == numbers(group, count).view(1, count, 1)


def group_average(group: Tensor, weight: Tensor, sizes: Tensor, count: int) -> Tensor:
    """Turns raw weights into coefficients that add up to 1 within each group.

    Args:
        group: Group of each token, int64 `(B, N)`; `M` for a token that is dropped, whose coefficient means nothing.
        weight: Raw weight of each token, fp32 `(B, N)`, not negative.
        sizes: Patches held by each token, fp32 `(B, N)`; they stand in for the weights of a group that sum to 0.
        count: `M`, the number of groups.

    Returns:
        Coefficients, fp32 `(B, N)`; a token alone in its group gets exactly 1.
    """
    by_size = sizes / _sum_around(group, sizes, count)
    if weight is sizes:
        return by_size
    tiny = torch.finfo(torch.float32).tiny  # a sum below it has lost its digits, and some devices flush it to 0
    total = _sum_around(group, weight, count)
    return torch.where(total >= tiny, weight / total.clamp(min=tiny), by_size)


def group_sum(group: Tensor, values: Tensor, count: int) -> Tensor:
    """Sums the values of each group.

    Args:
        group: Group of each token, int64 `(B, N)`; `M` for none.
        values: fp32 `(B, N)`.
        count: `M`, the number of groups.

    Returns:
        fp32 `(B, M)`.
    """
    if exporting():
        return (membership(group, count).to(values.dtype) * values.unsqueeze(1)).sum(2)
    return _sums(group, values, count)[:, :count]


def _sum_around(group: Tensor, values: Tensor, count: int) -> Tensor:
    """For each token the sum of its group, `(B, N)`; where it is in none, any number but 0."""
    if exporting():
        others = max(1, group.shape[1] - count)  # an image whose features are no numbers may have more groups
        return pick(F.pad(group_sum(group, values, count), (0, others), value=1.0), group)
    return pick(_sums(group, values, count), group)


def group_centres(group: Tensor, positions: Tensor, sizes: Tensor, count: int) -> Tensor:
    """The mean position of the patches of each group, whatever weights its features take.

    Args:
        group: Group of each token, int64 `(B, N)`; `M` for none.
        positions: Mean position of each token's patches, fp32 `(B, N, 2)`.
        sizes: Patches held by each token, fp32 `(B, N)`.
        count: `M`, the number of groups.

    Returns:
        fp32 `(B, M, 2)`; a token alone in its group keeps its position to the bit.
    """
    weight = group_average(group, sizes, sizes, count)
    if positions.is_cuda or torch.compiler.is_compiling():
        # Sums in the same order each time; a batched product might round its operands to 10 bits there (TF32).
        matrix = membership(group, count).to(weight.dtype) * weight.unsqueeze(1)
        return torch.stack([(matrix * line.unsqueeze(1)).sum(2) for line in positions.unbind(2)], 2)
    return torch.stack([group_sum(group, weight * line, count) for line in positions.unbind(2)], 2)


def norm_factors(group: Tensor, weight: Tensor, lengths: Tensor, merged: Tensor, count: int) -> Tensor:
    """What each group's sum is multiplied by, so that it is as long as its members on average.

    Args:
        group: Group of each token, int64 `(B, N)`; `M` for none.
        weight: Coefficient of each token, fp32 `(B, N)`.
        lengths: Length of each token, fp32 `(B, N)`.
        merged: Length of each group's weighted sum, fp32 `(B, M)`.
        count: `M`, the number of groups.

    Returns:
        fp32 `(B, M)`, from 0 to `LONGEST`; exactly 1 for a token alone.
    """
    factors = group_sum(group, weight * lengths, count) / merged.clamp(min=torch.finfo(torch.float32).tiny)
    # A token alone passes unchanged: two reductions of the same numbers may differ in the last bit.
    return torch.where((factors - 1).abs() < 1e-5, torch.ones_like(factors), factors.clamp(max=LONGEST))


def _sums(group: Tensor, values: Tensor, count: int) -> Tensor:
    """The sums of each group, and in a column more, of what is in none: `(B, M + 1)`."""
    return values.new_zeros((values.shape[0], count + 1)).scatter_add(1, group, values)


def in_order(group: Tensor, count: int) -> Tensor:
    """Renumbers groups by their smallest member, which is also the order of their smallest source patch.

    Args:
        group: Group of each token, int64 `(B, N)`, any numbering within `0..M-1`, no group empty; `M` stays `M`.
        count: `M`, the number of groups.

    Returns:
        The same groups, int64 `(B, N)`.
    """
    if exporting():
        stays = group < count
        return torch.where(stays, led_by(group, stays), group)
    tokens = group.shape[1]
    positions = numbers(group, tokens).expand_as(group)
    firsts = torch.full((group.shape[0], count + 1), tokens, device=group.device, dtype=torch.int64)
    first = F.pad(firsts.scatter_reduce(1, group, positions, "amin")[:, :count], (0, 1), value=tokens)
    first = pick(first, group)  # no position, where there is no group
    # The number of a group is how many groups have begun before its first member.
    begun = running(first == positions) - 1
    return pick(F.pad(begun, (0, 1), value=count), first)


def led_by(leaders: Tensor, counted: Tensor | None = None) -> Tensor:
    """Numbers groups by their smallest member, in an exported graph.

    Args:
        leaders: What tells each token's group, such as the number of one of its tokens, int32 `(B, N)`.
        counted: Which tokens are in a group that gets a number, bool `(B, N)`; all where None.

    Returns:
        Group of each token, int32 `(B, N)`.
    """
    every = numbers(leaders, leaders.shape[1])
    apart = (leaders.unsqueeze(1) != leaders.unsqueeze(2)).to(torch.float32)
    # A minimum in fp32: OpenVINO finds where a maximum is by sorting.
    first = lifted(every.to(torch.float32), apart, float(leaders.shape[1])).amin(2).to(whole())
    begins = first == every
    return pick(running(begins if counted is None else torch.logical_and(begins, counted)), first) - 1


def ordered_average(group: Tensor, weight: Tensor, sizes: Tensor, count: int) -> Grouping:
    """The decision to average groups of tokens, numbered by `in_order`.

    Args:
        group: Group of each token, int64 `(B, N)`, any numbering within `0..M-1`, no group empty; `M` for none.
        weight: Raw weight of each token, fp32 `(B, N)`, not negative; see `group_average`.
        sizes: Patches held by each token, fp32 `(B, N)`.
        count: `M`, the number of groups.
    """
    if kernels.usable(group, weight, sizes):
        ordered, coefficients, held = kernels.clusters.ordered_average(group, weight, sizes, count)
        return Grouping(ordered, coefficients, count, held, ordered=True)
    group = in_order(group, count)
    return Grouping(group, group_average(group, weight, sizes, count), count, ordered=True)
