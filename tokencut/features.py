"""Features of chosen blocks on the full grid of patches: timm's `forward_intermediates`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

from torch import Tensor

from tokencut.attention import AttentionInfo
from tokencut.errors import UsageError
from tokencut.schedule import StagePlan
from tokencut.tokens import Tokens
from tokencut.unmerging import Unmerging

# As timm takes them: so many last blocks, or 0-based blocks, negative ones from the end; None for all.
Indices: TypeAlias = int | Sequence[int] | None

FORMATS = ("NCHW", "NLC")


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
