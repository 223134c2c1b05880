"""The kernel of rotary positions against timm's own operations."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat

from tokencut.model import compress
from tokencut.ops import kernels

pytest.importorskip("triton")

from tokencut.ops.kernels.rotation import rotate


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("table_shape", [(2, 1, 37, 24), (2, 3, 37, 24), (37, 24), (3, 37, 24)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_turned_as_by_timm(table_shape: tuple[int, ...], half: bool, prefix: int, device: str) -> None:
    packed = torch.randn(2, prefix + 37, 3, 3, 12).permute(2, 0, 3, 1, 4)
    query, key, table = packed[0], packed[1], torch.randn(table_shape)
    for got, x in zip(
        rotate(query.to(device), key.to(device), table.to(device), prefix, half), (query, key), strict=True
    ):
        expected = torch.cat((x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], table, half=half)), 2)
        torch.testing.assert_close(got.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["bat", "topk"])
@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224", "eva02_tiny_patch14_224"]
)
def test_models_with_and_without_the_kernel(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = timm.create_model(name, img_size=112, depth=4)
    model = compress(dense, keep=0.6, layers=[2], method=method).cuda().to(torch.bfloat16).eval()
    pixels = torch.randn(3, 3, 112, 112, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        fast = model(pixels)
        monkeypatch.setattr(kernels, "_FOUND", False)
        slow = model(pixels)
    torch.testing.assert_close(fast, slow, rtol=0.1, atol=0.05)
