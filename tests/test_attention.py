"""What is known beside fused attention: class rows and keys against attention written out in full."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Attention, DiffAttention
from torch import Tensor

from tokencut.attention import AttentionInfo, QueryKey, differential_attention, log_size_bias, self_attention
from tokencut.tokens import Tokens


def heads(batch: int = 2, count: int = 7, seed: int = 0) -> QueryKey:
    generator = torch.Generator().manual_seed(seed)
    return QueryKey(*(torch.randn(batch, 3, count, 4, generator=generator) for _ in range(2)))


def full_attention(maps: QueryKey, bias: Tensor | None = None) -> Tensor:
    """Softmax attention with its `N x N` matrix, averaged over heads: `(B, P + N, P + N)`."""
    logits = maps.query @ maps.key.transpose(-2, -1) / 2.0  # sqrt of 4 numbers a head
    return (logits if bias is None else logits + bias).softmax(-1).mean(1)


@pytest.mark.parametrize(("prefix", "rows"), [(1, (0,)), (2, (0, 1)), (5, (0,))])
def test_class_attention_is_the_class_row_of_the_full_matrix(prefix: int, rows: tuple[int, ...]) -> None:
    maps = heads()
    expected = full_attention(maps)[:, list(rows), prefix:].mean(1)
    got = AttentionInfo(((maps,),), prefix, rows).class_attention()
    torch.testing.assert_close(got, expected)


def test_without_a_class_token_the_mean_query_takes_its_place() -> None:
    maps, prefix = heads(), 1
    query = maps.query[:, :, prefix:].mean(2, keepdim=True)
    expected = (query @ maps.key.transpose(-2, -1) / 2.0).softmax(-1).mean((1, 2))[:, prefix:]
    torch.testing.assert_close(AttentionInfo(((maps,),), prefix, ()).class_attention(), expected)


def test_parallel_layers_are_averaged() -> None:
    one, two = heads(seed=1), heads(seed=2)
    rows = [AttentionInfo(((maps,),), 1, (0,)).class_attention() for maps in (one, two)]
    torch.testing.assert_close(AttentionInfo(((one,), (two,)), 1, (0,)).class_attention(), torch.stack(rows).mean(0))


def test_differential_maps_give_their_difference_clamped_at_zero() -> None:
    one, two = heads(seed=1), heads(seed=2)
    rows = [full_attention(maps)[:, 0, 1:] for maps in (one, two)]
    expected = (rows[0] - 0.5 * rows[1]).clamp(min=0)
    maps = (one, QueryKey(two.query, two.key, -0.5))
    got = AttentionInfo((maps,), 1, (0,)).class_attention()
    torch.testing.assert_close(got, expected)
    assert (got == 0).any() and (got > 0).any()


def test_the_log_size_bias_enters_the_class_row() -> None:
    maps = heads(batch=1)
    tokens = Tokens(torch.zeros(1, 7, 8), 1, torch.tensor([[1.0, 2.0, 3.0, 1.0, 1.0, 4.0]]))
    bias = log_size_bias(tokens)
    assert bias is not None and bias.shape == (1, 1, 1, 7)
    torch.testing.assert_close(bias[0, 0, 0].exp(), torch.tensor([1.0, 1.0, 2.0, 3.0, 1.0, 1.0, 4.0]))
    got = AttentionInfo(((maps,),), 1, (0,), bias).class_attention()
    torch.testing.assert_close(got, full_attention(maps, bias)[:, 0, 1:])


@pytest.mark.parametrize("rows", [(0, 1), ()], ids=["class and distillation token", "no class token"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (1, 3, 7, 7), (2, 1, 7, 7), (2, 3, 1, 7)], ids=str)
def test_a_bias_for_each_pair_enters_by_the_row_of_the_query(shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    maps, prefix = heads(), 2
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    logits = maps.query @ maps.key.transpose(-2, -1) / 2.0 + bias
    # Logits are linear in the query, so the mean query's are the mean of those of the image tokens.
    logits = logits[:, :, list(rows)] if rows else logits[:, :, prefix:].mean(2, keepdim=True)
    got = AttentionInfo(((maps,),), prefix, rows, bias).class_attention()
    torch.testing.assert_close(got, logits.softmax(3).mean((1, 2))[:, prefix:])


def test_no_mask_while_nothing_was_merged() -> None:
    assert log_size_bias(Tokens(torch.zeros(1, 7, 8), 1)) is None


def test_keys_are_averaged_over_heads() -> None:
    maps = heads()
    torch.testing.assert_close(AttentionInfo(((maps,),), 2, (0,)).keys(), maps.key.mean(1)[:, 2:])


def test_scores_are_fp32_under_autocast() -> None:
    maps = heads()
    attention = AttentionInfo(((maps,),), 1, (0,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention.class_attention()
    assert inside.dtype == torch.float32 and torch.equal(inside, attention.class_attention())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("layer", "run"),
    [
        (Attention(16, 2, qkv_bias=True, qk_norm=True, scale_norm=True, norm_layer=torch.nn.LayerNorm), self_attention),
        (Attention(16, num_heads=2, gated=True), self_attention),
        (DiffAttention(16, num_heads=2, depth=3), differential_attention),
    ],
    ids=["qk norm and scale norm", "gated", "differential"],
)  # fmt: skip
def test_attention_by_its_parts_is_timms(layer: torch.nn.Module, run: object, masked: bool) -> None:
    layer.eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    bias = torch.tensor([0.0, 0.0, 0.7, 0.0, 1.1, 0.0]).view(1, 1, 1, 6).expand(2, -1, -1, -1) if masked else None
    got, _ = run(layer, x, bias)  # type: ignore[operator]
    assert torch.equal(got, layer(x, attn_mask=bias))
