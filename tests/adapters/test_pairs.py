"""Biases for pairs of tokens: timm's own at its patches, what lies between, averages, and prefix tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.models.beit import RelativePositionBias
from torch import Tensor, nn

from tokencut.adapters import adapter_for
from tokencut.adapters.beit import BeitAdapter
from tokencut.adapters.pairs import PairPlaces, offset_table, pair_bias
from tokencut.adapters.positions import POSITION_RULES, grid_positions
from tokencut.model import compress

GRID = (3, 4)

HOLDERS: dict[str, Callable[[], tuple[Any, int]]] = {
    "beit": lambda: (RelativePositionBias(GRID, num_heads=2), 1),
    "table": lambda: (RelPosBias(GRID, num_heads=2), 0),
    "table, class token": lambda: (RelPosBias(GRID, num_heads=2, prefix_tokens=1), 1),
    "network": lambda: (RelPosMlp(GRID, num_heads=2, mode="swin"), 0),
    "network, class token": lambda: (RelPosMlp(GRID, num_heads=2, prefix_tokens=1), 1),
}


def whole_of(kind: str) -> tuple[Tensor, int]:
    torch.manual_seed(0)
    holder, prefix = HOLDERS[kind]()
    for weight in holder.parameters():
        nn.init.normal_(weight)
    whole = holder().unsqueeze(0) if kind == "beit" else holder.eval().get_bias()
    return whole.detach(), prefix


def at(positions: Tensor) -> PairPlaces:
    """Places for tokens at rows and columns `(B, N, 2)` of the grid."""
    offsets = positions.unsqueeze(2) - positions.unsqueeze(1)
    return PairPlaces(None, None, torch.stack((offsets[..., 1] / 3, offsets[..., 0] / 2), -1))


@pytest.mark.parametrize("kind", HOLDERS)
def test_at_the_patches_it_is_timms_bias(kind: str) -> None:
    whole, prefix = whole_of(kind)
    order = torch.tensor([[5, 0, 11, 7, 2], [3, 8, 4, 10, 1]])
    got = pair_bias(whole, at(grid_positions(GRID, torch.device("cpu"))[order]), GRID, prefix)
    for image, patches in enumerate(order):
        rows = torch.cat((torch.arange(prefix), patches + prefix))
        torch.testing.assert_close(got[image], whole[0][:, rows][:, :, rows], rtol=0, atol=2e-5)


def test_between_patches_it_is_bilinear() -> None:
    whole, _ = whole_of("table")
    table = offset_table(whole, GRID)[0]
    assert table.shape == (2, 5, 7)
    # The second token is 0.5 rows below the first and 1.25 columns to its left.
    got = pair_bias(whole, at(torch.tensor([[[1.0, 2.25], [1.5, 1.0]]])), GRID, 0)[0]
    expected = 0.5 * (0.75 * table[:, 2, 2] + 0.25 * table[:, 2, 1] + 0.75 * table[:, 3, 2] + 0.25 * table[:, 3, 1])
    torch.testing.assert_close(got[:, 1, 0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(got[:, 0, 0], table[:, 2, 3], rtol=0, atol=1e-5)


def test_an_average_is_over_all_pairs_of_patches() -> None:
    whole, _ = whole_of("table, class token")
    shares = torch.zeros(1, 2, 12)
    shares[0, 0, [0, 5]], shares[0, 1, 7] = 0.5, 1.0
    got = pair_bias(whole, PairPlaces(None, None, shares=shares), GRID, 1)[0]
    inner = whole[0, :, 1:, 1:]
    torch.testing.assert_close(got[:, 1, 2], (inner[:, 0, 7] + inner[:, 5, 7]) / 2)
    torch.testing.assert_close(got[:, 1, 1], inner[:, [0, 0, 5, 5], [0, 5, 0, 5]].mean(1))
    torch.testing.assert_close(got[:, 0], whole[0, :, 0, [0, 1, 8]])
    torch.testing.assert_close(got[:, :, 0], whole[0, :, [0, 1, 8], 0])


def beit(**arguments: Any) -> Any:
    torch.manual_seed(0)
    small = {"img_size": (48, 64), "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
    model = timm.create_model("beit_base_patch16_224", **{**small, **arguments}).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.4)
    return model


@pytest.fixture
def adapter() -> Iterator[BeitAdapter]:
    found = adapter_for(beit())
    assert isinstance(found, BeitAdapter)
    yield found
    found.__dict__.pop("position_rule", None)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rule", POSITION_RULES)
def test_every_rule_is_the_model_where_tokens_are_patches(adapter: BeitAdapter, rule: str, shared: bool) -> None:
    adapter.position_rule = rule
    model = beit(use_shared_rel_pos_bias=shared)
    pixels = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    compressed = compress(model, keep=0.5, layers=[1], method="topk").eval()
    with torch.no_grad():
        logits, traces = compressed.trace(pixels)
        assert traces[0].tokens.source is not None
        x = adapter.mlp_half(model.blocks[0], traces[0].tokens).features
        rows = torch.stack([torch.cat((torch.zeros(1).long(), 1 + (row >= 0).nonzero().squeeze(1)))
                            for row in traces[0].tokens.source])  # fmt: skip
        common = model.rel_pos_bias() if shared else 0
        for block in model.blocks[1:]:
            bias = block.attn._get_rel_pos_bias()[0] + common
            bias = torch.stack([bias[:, row][:, :, row] for row in rows])
            q, k, v = (part.unflatten(2, (3, 16)).transpose(1, 2) for part in _qkv(block, x))
            y = ((q @ k.mT / 4 + bias).softmax(3) @ v).transpose(1, 2).flatten(2)
            x = x + block.gamma_1 * block.attn.proj(y)
            x = x + block.gamma_2 * block.mlp(block.norm2(x))
        torch.testing.assert_close(logits, model.forward_head(model.norm(x)), rtol=1e-3, atol=1e-3)


def _qkv(block: Any, x: Tensor) -> tuple[Tensor, ...]:
    attn = block.attn
    biases = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return (attn.qkv(block.norm1(x)) + biases).chunk(3, 2)


def test_hooks_see_what_timm_gives_a_block_and_behind_a_stage_the_bias_of_what_is_left() -> None:
    model = compress(beit(), keep=0.5, layers=[2], method="tome").eval()
    seen: list[Any] = []
    for block in model.model.blocks:
        block.register_forward_pre_hook(
            lambda _, __, given: seen.append(given["shared_rel_pos_bias"]), with_kwargs=True
        )
    with torch.no_grad():
        model(torch.randn(2, 3, 48, 64))
    assert seen[:2] == [None, None]
    assert seen[2].shape == (2, 3, 7, 7)
