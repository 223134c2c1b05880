"""A lowered program computes the same by plainer operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tokencut.export.lowering import lowered

QUERY, KEY, VALUE = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(2, 1, 1, 5, generator=torch.Generator().manual_seed(1))


class Attends(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        plain = scaled_dot_product_attention(query, key, value)
        biased = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.3)
        return plain, biased, scaled_dot_product_attention(query, key, value, is_causal=True)


class DoesNothing(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        whole: Tensor = values[:, 0:5].expand(3, 5)
        return whole[:, :2].expand(2, 3, 2) + whole.mean(1, keepdim=True, dtype=torch.float32)


def names(program: torch.export.ExportedProgram) -> list[str]:
    return [node.target._opname for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


def test_attention_by_two_products() -> None:
    given = (QUERY, KEY, VALUE, BIAS)
    program = lowered(torch.export.export(Attends(), given))
    for found, expected in zip(program.module()(*given), Attends()(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    plain = lowered(torch.export.export(Plain(), given[:3]))
    assert {"bmm", "_softmax"} <= set(names(plain)) <= {"mul", "view", "permute", "bmm", "_softmax"}


class Plain(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended: Tensor = scaled_dot_product_attention(query, key, value)
        return attended


def test_what_changes_nothing_is_left_out() -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    given = torch.export.export(DoesNothing(), (values,))
    program = lowered(given)
    assert torch.equal(program.module()(values), DoesNothing()(values))
    assert names(program).count("expand") == 1 and "alias" not in names(program)
    (mean,) = [node for node in program.graph.nodes if node.target is torch.ops.aten.mean.dim]
    assert not mean.kwargs.get("dtype")
