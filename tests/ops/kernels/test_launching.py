"""Compiled kernels are remembered by what they were compiled for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tokencut.ops.kernels import attention, launching


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


def test_a_launch_is_prepared_once_for_its_shapes_and_what_is_remembered_is_bounded() -> None:
    prepared: list[tuple[int, ...]] = []

    @launching.by_shape
    def prepare(*shape: int) -> int:
        prepared.append(shape)
        return len(prepared)

    assert [prepare(2, 3), prepare(2, 4), prepare(2, 3)] == [1, 2, 1]
    for count in range(launching.REMEMBERED):
        prepare(5, count)
    assert prepare(2, 3) == launching.REMEMBERED + 3
