"""How operators are written that torch.onnx does not know."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from tokencut.export.formats import onnx_translations


class Sorts(nn.Module):
    """Both orders of two kinds of scores."""

    def forward(self, real: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.sort(scores, dim=1, descending=descending, stable=True).indices
            for scores in (real, whole)
            for descending in (True, False)
        )


def test_equal_scores_keep_their_order() -> None:
    """onnxruntime's TopK and torch's stable sort, on 6 values 50 times over."""
    whole = torch.randint(-3, 3, (4, 300), generator=torch.Generator().manual_seed(1))
    scores = (whole.float(), whole)
    program = torch.onnx.export(
        torch.export.export(Sorts(), scores), custom_translation_table=onnx_translations(), verbose=False
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    inputs = {given.name: tensor.numpy() for given, tensor in zip(session.get_inputs(), scores, strict=True)}
    orders = session.run(None, inputs)
    expected = [order.numpy() for order in Sorts()(*scores)]
    assert len(orders) == 4
    assert all(np.array_equal(order, wanted) for order, wanted in zip(orders, expected, strict=True))
    assert not np.array_equal(orders[0], orders[1][:, ::-1])  # of equals, the turned order has the higher index first
