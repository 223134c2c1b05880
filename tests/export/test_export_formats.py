"""How operators are written that torch.onnx does not know, or in a way that hides shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
from torch import Tensor, nn

from tokencut.export.translations import translations


class Sorts(nn.Module):
    """Both orders of two kinds of scores."""

    def forward(self, real: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.sort(scores, dim=1, descending=descending, stable=True).indices
            for scores in (real, whole)
            for descending in (True, False)
        )


class Reduces(nn.Module):
    """Extremes and lengths over each kind of axes, of numbers with many equal ones."""

    def forward(self, real: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
        lowest, where = real.min(2)
        highest, first = real.max(1, keepdim=True)
        extremes = (real.amin(2), real.amax(-2, keepdim=True), real.amin((0, 2)), whole.amax(1), real.amax())
        lengths = (real.norm(dim=2), torch.nn.functional.normalize(real, dim=-1), real.norm(dim=1, p=1), real.norm())
        return (lowest, where, highest, first, whole.min(1).values, *extremes, *lengths)


def written(module: nn.Module, given: tuple[Tensor, ...], **shapes: Any) -> Any:
    program = torch.onnx.export(
        torch.export.export(module, given, **shapes), custom_translation_table=translations(), verbose=False
    )
    assert program is not None
    return program.model_proto


def outputs(model: Any, given: tuple[Tensor, ...]) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    inputs = {each.name: tensor.numpy() for each, tensor in zip(session.get_inputs(), given, strict=True)}
    return session.run(None, inputs)


@pytest.mark.slow
def test_extremes_and_lengths_have_shapes_and_torchs_values() -> None:
    generator = torch.Generator().manual_seed(2)
    given = (
        torch.randint(-9, 9, (3, 40, 50), generator=generator) / 4,
        torch.randint(-9, 9, (3, 50), generator=generator),
    )
    model = written(Reduces(), given, dynamic_shapes=({0: torch.export.Dim("batch")},) * 2)
    expected = Reduces()(*given)
    for got, wanted in zip(outputs(model, given), expected, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.numpy().dtype
        if wanted.is_floating_point():
            np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-6)
        else:
            assert np.array_equal(got, wanted.numpy()), "another of equal extremes"
    inferred = SymbolicShapeInference.infer_shapes(model)
    ranks = [len(each.type.tensor_type.shape.dim) for each in inferred.graph.output]
    assert ranks == [wanted.dim() for wanted in expected]


@pytest.mark.slow
def test_equal_scores_keep_their_order() -> None:
    """onnxruntime's TopK and torch's stable sort, on 6 values 50 times over."""
    whole = torch.randint(-3, 3, (4, 300), generator=torch.Generator().manual_seed(1))
    scores = (whole.float(), whole)
    orders = outputs(written(Sorts(), scores), scores)
    expected = [order.numpy() for order in Sorts()(*scores)]
    assert len(orders) == 4
    assert all(np.array_equal(order, wanted) for order, wanted in zip(orders, expected, strict=True))
    assert not np.array_equal(orders[0], orders[1][:, ::-1])  # of equals, the turned order has the higher index first
