"""The attention kernels against PyTorch's own attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from tokencut.attention import AttentionInfo, QueryKey, fused_attention, has_biased_kernel
from tokencut.ops.kernels.attention import biased_attention, class_attention, keep_attended, log_sizes
from tokencut.ops.ranking import highest


def heads(width: int, count: int = 70) -> list[torch.Tensor]:
    """Query, key and value as views of one tensor, `(2, 3, count, width)`."""
    qkv = torch.randn(2, count, 3, 3, width).permute(2, 0, 3, 1, 4)
    return list(qkv.unbind(0))


@pytest.mark.parametrize("width", [16, 24])
def test_biased_attention(width: int, device: str) -> None:
    query, key, value = heads(width)
    bias = torch.randint(1, 9, (2, 1, 1, 70)).float().log()
    got = biased_attention(*(t.to(device) for t in (query, key, value, bias)))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(got.cpu(), expected)
    assert got.transpose(1, 2).is_contiguous()  # so that the heads stand side by side without a copy


@pytest.mark.gpu
def test_a_bias_for_each_pair_is_left_to_pytorch() -> None:
    query, key, value = (t.cuda().half() for t in heads(16))
    bias = torch.randn(2, 3, 70, 70).cuda().half()
    assert has_biased_kernel(bias[:, :1, :1], query, key, value) and not has_biased_kernel(bias, query, key, value)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    assert torch.equal(fused_attention(query, key, value, bias), expected)
    attention = AttentionInfo(((QueryKey(query, key),),), 1, (0,), bias)
    logits = (query.float() @ key.float().transpose(2, 3)) / 4 + bias.float()
    torch.testing.assert_close(attention.class_attention(), logits[:, :, 0].softmax(2).mean(1)[:, 1:])


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_class_attention_and_the_tokens_with_most_of_it(queries: int, biased: bool, device: str) -> None:
    query, key, _ = heads(24)
    bias = torch.randn(2, 1, 1, 70) if biased else None
    logits = (query[:, :, :queries] * 24**-0.5) @ key.transpose(2, 3)
    expected = (logits if bias is None else logits + bias).softmax(3).mean((1, 2))[:, 2:]
    on_device = (query.to(device), key.to(device), None if bias is None else bias.to(device), queries, 2)
    got = class_attention(*on_device)
    torch.testing.assert_close(got.cpu(), expected)
    # The features as a view, and of more columns than a program copies.
    features = torch.randn(2, 70, 150).to(torch.bfloat16)[:, :, :140]
    kept, index = keep_attended(*on_device[:-1], features.to(device), 2, 30)
    assert torch.equal(index, highest(got, 30))
    rows = torch.cat((torch.arange(2).expand(2, -1), 2 + index.cpu()), 1)
    assert torch.equal(kept.cpu(), torch.stack([part[row] for part, row in zip(features, rows, strict=True)]))


@pytest.mark.gpu
def test_many_images() -> None:
    query, key, value = torch.randn(256, 197, 3, 6, 64, device="cuda", dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    bias = torch.randint(1, 9, (256, 1, 1, 197), device="cuda").float().log()
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=bias)
    for _ in range(3):
        torch.testing.assert_close(biased_attention(query, key, value, bias).float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_bias_of_proportional_attention(prefix: int, device: str) -> None:
    sizes = torch.randint(1, 9, (2, 300)).float()
    expected = torch.nn.functional.pad(sizes.log(), (prefix, 0))[:, None, None]
    torch.testing.assert_close(log_sizes(sizes.to(device), prefix, torch.float32).cpu(), expected)
