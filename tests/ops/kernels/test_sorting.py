"""The ranking kernel against a stable sort."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tokencut.ops.kernels import sorting


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_equal_scores_by_number(descending: bool, dtype: torch.dtype, device: str) -> None:
    scores = torch.randint(0, 40, (2, 150)).to(dtype)  # many ties, more than one program
    expected = torch.sort(scores, dim=1, descending=descending, stable=True).indices
    assert torch.equal(sorting.ranking(scores.to(device), descending).cpu(), expected)


def test_scores_that_are_no_numbers_still_give_numbers_of_tokens(device: str) -> None:
    order = sorting.ranking(torch.full((1, 5), torch.nan, device=device), True)
    assert set(order[0].tolist()) <= set(range(5))
