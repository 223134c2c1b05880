"""The kernels that rank and choose, against a stable sort."""

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
    assert order.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("count", [0, 1, 40, 149, 150])
def test_the_highest_in_order_of_their_numbers(count: int, device: str) -> None:
    scores = torch.randint(0, 40, (2, 150)).float()
    scores[0, 7], scores[1, 3:5] = torch.nan, -torch.inf
    ranked = torch.sort(scores.nan_to_num(-torch.inf, neginf=-torch.inf), dim=1, descending=True, stable=True).indices
    assert torch.equal(sorting.highest(scores.to(device), count).cpu(), ranked[:, :count].sort(1).values)
