"""What compares and gathers tokens is arithmetic with the same results to the bit."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from tokencut.export.arithmetic import without_truths
from tokencut.export.baking import bake_sizes
from tokencut.export.graph import drop_checks
from tokencut.export.lowering import lowered

# Equal, next to equal, next to nothing and far apart: the least numbers that there are in fp32 stand among them.
SCORES = torch.tensor([
    [0.0, 1e-45, -1e-45, 1.2e-38, 1.0, 1.0 + 2**-23, 1.0, 3e38],
    [-3e38, 2.0, 2.0, -0.0, 0.0, 5e-40, 4e-40, 1e-20],
])  # fmt: skip
TOKENS = torch.tensor([[0, 7, 2, 2, 5, 5, 1, 0], [3, 3, 3, 0, 1, 2, 6, 7]], dtype=torch.int32)


class Compares(nn.Module):
    def forward(self, scores: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        theirs, own = scores.unsqueeze(1), scores.unsqueeze(2)
        numbers = torch.arange(8, dtype=torch.int32)
        later = numbers.unsqueeze(0) >= numbers.unsqueeze(1)
        near = (theirs - own).abs()
        found = (
            theirs < own, theirs <= own, theirs > own, theirs >= own, theirs == own, theirs != own, near <= 1.5,
            near == 0, near != 0, near == 1.0,
            tokens.unsqueeze(1) == numbers.view(1, 8, 1), tokens.unsqueeze(1) != tokens.unsqueeze(2),
            torch.logical_or(theirs < own, torch.logical_and(theirs <= own, later)), torch.logical_not(theirs < own),
            torch.logical_and(theirs < own, torch.isfinite(theirs + own)),  # an operator that is not known here
        )  # fmt: skip
        return tuple(each.to(torch.float32) for each in found)


class Gathers(nn.Module):
    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        rows = features.gather(1, tokens.to(torch.int64).unsqueeze(2).expand(-1, -1, features.shape[2]))
        return rows, features.gather(2, tokens.to(torch.int64).unsqueeze(1))


def captured(module: nn.Module, *given: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=32)
    program = torch.export.export(module, given, dynamic_shapes=[{0: batch} for _ in given])
    drop_checks(program)
    return cast(torch.export.ExportedProgram, lowered(program))


def truths(program: torch.export.ExportedProgram) -> list[str]:
    """What gives truths about pairs of tokens."""
    found = [node for node in program.graph.nodes if node.op == "call_function" and node.meta["val"].dim() == 3]
    return [node.target._opname for node in found if node.meta["val"].dtype == torch.bool]


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 2])
def test_comparisons(images: int) -> None:
    program = captured(Compares(), SCORES, TOKENS)
    before = set(truths(program))
    assert {"lt", "le", "gt", "ge", "eq", "ne", "logical_or", "logical_and", "logical_not"} <= before
    without_truths(program)
    bake_sizes(program)
    # What asks whether a sum is finite is compared as before.
    assert set(truths(program)) == {"eq", "ne", "mul"}
    given = SCORES[:images], TOKENS[:images]
    for place, (found, expected) in enumerate(zip(program.module()(*given), Compares()(*given), strict=True)):
        assert torch.equal(found, expected), place


def test_gathers_of_tokens() -> None:
    features = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    tokens = TOKENS[:, :3]  # as many as features are wide, so that both gathers take them
    program = captured(Gathers(), features, tokens % 3)
    without_truths(program)
    names = [node.target._opname for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert names.count("gather") == 1 and names.count("bmm") == 1
    for found, expected in zip(program.module()(features, tokens % 3), Gathers()(features, tokens % 3), strict=True):
        assert torch.equal(found, expected)
