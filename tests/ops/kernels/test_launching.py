"""Compiled kernels are remembered by what they were compiled for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tokencut.ops.kernels import attention


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 16, 37])
def test_a_launch_like_another_gives_what_triton_gives(count: int) -> None:
    """Also from an address that is less aligned than the one before, and in another type."""
    store = torch.randint(1, 9, (3 * count + 1,), device="cuda").float()
    for _ in range(2):
        for begin in (0, 1):
            sizes = store[begin : begin + 3 * count].view(3, count)
            for dtype in (torch.float32, torch.bfloat16):
                bias = attention.log_sizes(sizes, 0, dtype)
                torch.testing.assert_close(bias[:, 0, 0], sizes.log().to(dtype))


@pytest.mark.gpu
def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokencut.ops.kernels import launching

    monkeypatch.setattr(launching, "REMEMBERED", 4)
    for count in range(1, 12):
        attention.log_sizes(torch.ones(1, count, device="cuda"), 0, torch.float32)
    assert len(attention._log_sizes._compiled) <= 4
