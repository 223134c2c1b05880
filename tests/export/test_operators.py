"""Stages are made of operators that every runtime has, and of numbers that leave a quantiser its scale."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokencut.attention import AttentionInfo, QueryKey
from tokencut.blocks import Stage
from tokencut.methods import StageInput, make_method, methods
from tokencut.ops.grid_clusters import Windows
from tokencut.tokens import Tokens, group_means

# What stages use of torch's core operators. ONNX, OpenVINO (also from an ExportedProgram), ExecuTorch with XNNPACK and
# its portable kernels, LiteRT and Core ML have all of them, in these dtypes.
SHAPES = {
    "alias", "arange", "cat", "clone", "constant_pad_nd", "expand", "full", "full_like", "permute", "select", "slice",
    "split_with_sizes", "squeeze", "unsqueeze", "view",
}  # fmt: skip
NUMBERS = {
    "_log_softmax", "_softmax", "abs", "add", "addmm", "amax", "amin", "argmax", "argmin", "bmm", "clamp", "cumsum",
    "div", "gelu", "log", "maximum", "mean", "minimum", "mul", "native_layer_norm", "neg", "pow", "rsqrt", "sub", "sum",
    "topk",
}  # fmt: skip
WHOLE = {"add", "mul", "neg", "scatter", "sub", "sum"}
TRUTHS = {"any", "eq", "ge", "gt", "le", "logical_and", "logical_not", "logical_or", "lt", "ne"}
ALLOWED = {
    torch.float32: SHAPES | NUMBERS | {"_to_copy", "gather", "where"},
    torch.int32: SHAPES | WHOLE | {"_to_copy", "gather", "where"},
    # Places to gather from and to scatter to, which torch wants so, and where extremes are: made of int32, or into it.
    torch.int64: {"_to_copy", "argmax", "argmin", "expand", "unsqueeze"},
    torch.bool: SHAPES | TRUTHS,
}
# What Core ML has of tensors only.
NO_SCALARS = {"where"}
# Tokens here are some 4 long: squared distances are below 100, and twice that and one.
LARGEST = 1e3

# With other settings than by default; medoids are chosen once, since more often only makes the graph larger.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("bat", {"preset": "paper"}),
    ("bat", {"clusters": 0.5, "pairs": 0.2, "inattentive": "drop"}),
    ("bat", {"window": 16, "neighbours": 4}),
    ("evit", {"normalized": True}),
    ("window", {"clustering": "pool"}),
]
METHODS = [(name, {"iterations": 1} if name == "kmedoids" else {}) for name in sorted(methods())] + OTHERS
BATCH, TOKENS, HEADS, WIDTH = 2, 40, 2, 8


class OneStage(nn.Module):
    """A stage of its own, behind one class token."""

    def __init__(self, method: str, options: dict[str, Any]) -> None:
        super().__init__()
        chosen = make_method(method, options)
        self.stage = Stage(chosen, chosen.make_module(HEADS * WIDTH, 0)).eval()
        self.norm = nn.LayerNorm(HEADS * WIDTH)

    def forward(self, features: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        attention = AttentionInfo(((QueryKey(query, key),),), 1, (0,))
        if self.stage.method.keeps_grid:  # a grid whose last windows are padded
            windows = Windows(5, TOKENS // 5, 4, 4)
            grid = StageInput(Tokens(features[:, 1:], 0, windows=windows), attention, self.norm)
            kept = self.stage(grid, windows.smaller()[-1].count)
            if kept.grouped is None:
                return kept.features, None
            groups = kept.grouped.groups
            return groups.given_back(group_means(kept.image, groups)), groups.taken(kept.image)
        left = self.stage(StageInput(Tokens(features, 1), attention, self.norm), TOKENS // 2)
        return left.features, left.sizes


def entering() -> tuple[Tensor, Tensor, Tensor]:
    """Features, queries and keys; in the second image half of the tokens are alike."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(BATCH, 1 + TOKENS, HEADS * WIDTH, generator=generator)
    features[1, 1 : TOKENS // 2] = features[1, 1]
    heads = torch.randn(2, BATCH, HEADS, 1 + TOKENS, WIDTH, generator=generator)
    heads[:, 1, :, 1 : TOKENS // 2] = heads[:, 1, :, 1:2]
    return features, heads[0], heads[1]


def exported(method: str, options: dict[str, Any]) -> tuple[OneStage, Any]:
    stage = OneStage(method, options)
    with torch.no_grad():
        return stage, torch.export.export(stage, entering(), strict=False).run_decompositions()


def _every(cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """The first, and all others as slow."""
    return [
        pytest.param(
            *case, id="-".join((case[0], *map(str, case[1].values()))), marks=[pytest.mark.slow] if place else []
        )
        for place, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("method", "options"), _every(METHODS))
def test_a_stage_uses_operators_that_every_runtime_has(method: str, options: Any) -> None:
    stage, program = exported(method, options)
    odd = set()
    for node in program.graph.nodes:
        made = node.meta.get("val")
        first = made[0] if isinstance(made, (tuple, list)) else made
        if node.op != "call_function" or node.target is operator.getitem or first is None:  # gives nothing: a check
            continue
        name, which = node.target._opname, node.target._overloadname
        if name not in ALLOWED.get(first.dtype, set()) or ("Scalar" in which and name in NO_SCALARS):
            odd.add((name, which, str(first.dtype)))
    assert not odd, "not every runtime has them"
    with torch.no_grad(), Largest() as largest:
        found = program.module()(*entering())
        assert largest.seen < LARGEST, "a quantiser takes its scale from the largest"
        for got, expected in zip(found, stage(*entering()), strict=True):
            torch.testing.assert_close(got, expected)
        nothing = [given.index_fill(0, torch.tensor([1]), math.nan) for given in entering()]
        for got, expected in zip(program.module()(*nothing), found, strict=True):
            if got is not None:  # sizes of tokens, where a method tracks none
                torch.testing.assert_close(got[0], expected[0], msg="an image of no numbers leaves the others alone")


class Largest(TorchDispatchMode):
    """Remembers the largest number that any operator gives."""

    seen = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                self.seen = max(self.seen, float(tensor.abs().nan_to_num(nan=math.inf).max()))
        return made


@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
def test_no_number_goes_beyond_the_data(method: str, options: Any) -> None:
    """The largest float in place of a mask left a quantiser no scale for the rest, and cost eleven points."""
    stage = OneStage(method, options)
    with torch.no_grad(), Largest() as largest:
        stage(*entering())
    assert 1 < largest.seen < LARGEST
