"""What a token counts for when it is merged."""

from __future__ import annotations

import pytest
import torch

from tokencut.ops.merge_weights import raw_weights

SIZES, ATTENTION = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("equal", [1.0, 1.0]), ("size", [1.0, 2.0]), ("attention", [0.5, 0.25]), ("product", [0.5, 0.5])],
)
def test_weights(kind: str, expected: list[float]) -> None:
    assert raw_weights(kind, SIZES, ATTENTION).tolist() == [expected]


@pytest.mark.parametrize("kind", ["attention", "product"])
def test_attention_must_be_given_where_it_is_needed(kind: str) -> None:
    with pytest.raises(AssertionError, match=f"merge weights '{kind}' need class attention"):
        raw_weights(kind, SIZES, None)
