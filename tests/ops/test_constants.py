"""Small tensors that are made once, and anew where something looks on."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tokencut.ops.constants import constant

made: list[int] = []


def numbers(count: int, device: torch.device) -> Tensor:
    made.append(count)
    return torch.arange(count, device=device, dtype=torch.float32)


def test_a_constant_is_made_once_for_each_size_and_dtype() -> None:
    made.clear()
    whole, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    first = constant(numbers, 11, like=whole)
    assert constant(numbers, 11, like=whole) is first and made == [11]
    assert constant(numbers, 11, like=half).dtype == torch.bfloat16 and made == [11, 11]
    assert constant(numbers, 12, like=whole).tolist() == list(range(12)) and made == [11, 11, 12]


def test_a_constant_of_a_forward_without_gradients_is_good_for_training() -> None:
    with torch.inference_mode():
        found = constant(numbers, 13, like=torch.zeros(1))
    weight = torch.ones(13, requires_grad=True)
    (weight * found).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, found)


def test_what_records_makes_its_own() -> None:
    made.clear()
    kept = constant(numbers, 14, like=torch.zeros(1))
    with warnings.catch_warnings():  # torch calls it deprecated; multiply-adds are counted on its traces
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: x + constant(numbers, 14, like=x), torch.zeros(14), check_trace=False)
    assert made == [14, 14] and torch.equal(traced(torch.ones(14)), kept + 1)

    class Adding(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + constant(numbers, 14, like=x)

    program = torch.export.export(Adding(), (torch.zeros(14),))
    assert not program.constants and torch.equal(program.module()(torch.ones(14)), kept + 1)
