"""The closed form against sums by hand, against fvcore on a trace, and against torch's own counter."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, Mlp
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokencut import cost
from tokencut.cost import BlockCost, BlockRow, Macs, ModelCost, StageCost
from tokencut.methods import methods
from tokencut.model import compress, predicted_macs
from tokencut.profiling.counting import count_macs

SIZE = {"img_size": 64, "depth": 3}
SMALL = {**SIZE, "embed_dim": 48, "num_heads": 3, "num_classes": 5}

# Every kind of block, attention, MLP and head that timm's Vision Transformers have, at 16 tokens and 3 blocks.
FIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("test_vit", SIZE),
    "register, average pool": ("test_vit2", SIZE),
    "attention pool": ("test_vit3", SIZE),
    "q/k norm, residual MLP pool": ("test_vit4", SIZE),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "no head": ("deit_tiny_patch16_224", {**SMALL, "num_classes": 0}),
    "no pooling": ("vit_tiny_patch16_224", {**SMALL, "global_pool": ""}),
    "average and maximum": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avgmax"}),
    "positional pool": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "prr"}),
    "parallel scaling": ("vit_pwee_patch16_reg1_gap_256", SMALL),
    "parallel things": ("vit_small_patch16_18x2_224", SMALL),
    "differential": ("vit_dwee_patch16_reg1_gap_256", SMALL),
    "differential, parallel scaling": ("vit_dpwee_patch16_reg1_gap_256", SMALL),
    "siglip": ("vit_base_patch16_siglip_224", SMALL),
    "norm behind": ("vit_base_patch16_rpn_224", SMALL),
    "swiglu, packed": ("vit_giant_patch14_reg4_dinov2", {**SMALL, "img_size": 56}),
    "norm before": ("vit_base_patch16_clip_224", SMALL),
}
DEIT_S_BAT = {0.7: 3.005, 0.6: 2.583, 0.5: 2.344, 0.4: 2.083, 0.3: 1.823, 0.2: 1.645}


@cache
def build(fixture: str) -> tuple[nn.Module, tuple[int, int, int]]:
    name, arguments = FIXTURES[fixture]
    return timm.create_model(name, **arguments).eval(), (3, arguments["img_size"], arguments["img_size"])


def closed_form(model: nn.Module) -> int:
    return cost.total(predicted_macs(model))


def weightless(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name).eval()


# One block of width 8, 2 heads, an MLP of 16, 3 classes, on 2 x 2 patches of 16 px: 4 image tokens and a class token.
TINY: dict[str, Any] = {"img_size": 32, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "num_classes": 3}
EMBEDDING = 4 * (3 * 16 * 16) * 8
QKV, SCORES, MIXING, PROJECTION = 5 * 8 * 24, 5 * 5 * 8, 5 * 5 * 8, 5 * 8 * 8
MLP_PER_TOKEN = 8 * 16 + 16 * 8
HEAD = 8 * 3
CLASS_ROW = 5 * 8


@pytest.mark.parametrize(
    ("method", "by_hand"),
    [
        (None, EMBEDDING + QKV + SCORES + MIXING + PROJECTION + 5 * MLP_PER_TOKEN + HEAD),
        ("topk", EMBEDDING + QKV + SCORES + MIXING + PROJECTION + CLASS_ROW + 3 * MLP_PER_TOKEN + HEAD),
        ("evit", EMBEDDING + QKV + SCORES + MIXING + PROJECTION + CLASS_ROW + 3 * MLP_PER_TOKEN + HEAD),
        ("random", EMBEDDING + QKV + SCORES + MIXING + PROJECTION + 3 * MLP_PER_TOKEN + HEAD),
    ],
)
def test_a_block_by_hand(method: str | None, by_hand: int) -> None:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **TINY)
    if method is not None:
        model = compress(model, keep=0.5, method=method)
    assert closed_form(model) == by_hand
    assert count_macs(model, (3, 32, 32)).total == by_hand


def test_predict_row_by_row() -> None:
    block = BlockCost(before=Macs(1, 10, 2), after=Macs(per_token=7), class_row=Macs(per_token=3), width=8,
                      key_width=4)  # fmt: skip
    model = ModelCost(embed=100, blocks=(block, block), head=Macs(5, 1), num_prefix_tokens=1, patches=4,
                      head_prefix_tokens=0)  # fmt: skip
    assert cost.predict(model, {}) == (
        BlockRow(0, 4, 4, 100, 0),
        BlockRow(1, 4, 4, (1 + 10 * 5 + 2 * 25) + 7 * 5, 0),
        BlockRow(2, 4, 4, (1 + 10 * 5 + 2 * 25) + 7 * 5, 0),
        BlockRow(-1, 4, 4, 5 + 4, 0),
    )
    own = 1000 + 3 * 5
    reduced = cost.predict(model, {1: StageCost(4, 2, 1000)})
    assert reduced[1:] == (
        BlockRow(1, 4, 2, (1 + 10 * 5 + 2 * 25) + 7 * 3 + own, own),
        BlockRow(2, 2, 2, (1 + 10 * 3 + 2 * 9) + 7 * 3, 0),
        BlockRow(-1, 2, 2, 5 + 2, 0),
    )
    assert cost.predict(model, {1: StageCost(4, 2, 1000, reads_attention=False)})[1].stage_macs == 1000
    assert cost.total(reduced) == sum(row.macs for row in reduced)


def test_polynomials_add_up() -> None:
    assert (Macs(1, 2, 3) + Macs(10, 20, 30)) == Macs(11, 22, 33)
    assert Macs(1, 2, 3).at(4) == 1 + 8 + 48


@pytest.mark.parametrize("fixture", FIXTURES)
def test_dense_closed_form_is_fvcore_to_the_last_digit(fixture: str) -> None:
    model, size = build(fixture)
    count = count_macs(model, size)
    assert (count.total, dict(count.uncounted)) == (closed_form(model), {})


def pairs_of_fixture_and_method() -> list[tuple[str, str]]:
    """Every fixture with a method that reads class attention and one that does not, in turn; one fixture with all.

    What a stage costs in a block depends on the block by its class row, its width and that of its keys, which is
    another one where attention is differential.
    """
    reading = [name for name, method in methods(keeps_grid=False).items() if method().reads_attention()]
    others = [name for name in methods(keeps_grid=False) if name not in reading]
    assert reading and others
    turns = [(fixture, kind[at % len(kind)]) for at, fixture in enumerate(FIXTURES) for kind in (reading, others)]
    return turns + [("differential", name) for name in methods(keeps_grid=False) if ("differential", name) not in turns]


@pytest.mark.parametrize(("fixture", "method"), pairs_of_fixture_and_method())
def test_compressed_closed_form_is_fvcore_to_the_last_digit(fixture: str, method: str) -> None:
    model, size = build(fixture)
    # Between the stages a block that timm runs, on merged tokens.
    compressed = compress(model, keep=0.6, layers=[1, 3], method=method)
    count = count_macs(compressed, size)
    assert (count.total, dict(count.uncounted)) == (closed_form(compressed), {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("bat", {"keep": 0.05}),  # one token left: a single cluster of all
        ("bat", {"keep": 0.9, "layers": "all"}),
        ("bat", {"reduce_by": 3}),
        ("bat", {"keep": 0.5, "method_options": {"pairs": 0.0, "clusters": 1.0}}),
        ("bat", {"keep": 0.5, "method_options": {"pairs": 1.0, "features": "normed", "match_features": "tokens"}}),
        ("bat", {"keep": 0.5, "method_options": {"weights": "product"}}),
        ("dpc", {"keep": 0.5, "method_options": {"weights": "attention", "features": "keys"}}),
        ("kmedoids", {"keep": 0.5, "method_options": {"weights": "attention"}}),
        ("kmedoids", {"keep": 0.5, "method_options": {"iterations": 0}}),
        ("evit", {"keep": 0.5, "method_options": {"extra_token": True, "normalized": True}}),
        ("tome", {"keep": 0.2}),  # several rounds in one stage
        ("tome", {"reduce_by": 8}),
        ("topk", {"keep": 0.5, "prop_attn": True}),
        ("bat", {"keep": 0.5, "prop_attn": False}),
    ],
)
def test_settings_of_methods_are_in_the_closed_form(method: str, arguments: dict[str, Any]) -> None:
    model, size = build("differential")
    compressed = compress(model, method=method, **arguments)
    assert count_macs(compressed, size).total == closed_form(compressed)


@pytest.mark.parametrize("method", methods(keeps_grid=False))
@pytest.mark.parametrize("fixture", ["class token", "attention pool", "distilled"])
def test_second_opinion_of_torchs_own_counter(fixture: str, method: str) -> None:
    model, size = build(fixture)
    compressed = compress(model, keep=0.6, method=method).eval().requires_grad_(False)
    # Attention by plain products: torch has no formula for the fused kernel of the CPU, and would count it as 0.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compressed(torch.zeros(1, *size))
    assert counter.get_total_flops() == 2 * closed_form(compressed)


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [("deit_tiny_patch16_224", 1.254), ("deit_small_patch16_224", 4.599), ("deit_base_patch16_224", 17.564)],
)
def test_dense_gmacs_of_deit(name: str, gmacs: float) -> None:
    model = weightless(name)
    assert closed_form(model) / 1e9 == pytest.approx(gmacs, rel=0.001)
    assert count_macs(model, (3, 224, 224)).total == closed_form(model)


@pytest.mark.parametrize(("keep", "gmacs"), DEIT_S_BAT.items())
def test_gmacs_of_deit_s_are_those_of_bats_logs(keep: float, gmacs: float) -> None:
    compressed = compress(weightless("deit_small_patch16_224"), keep=keep)
    assert closed_form(compressed) / 1e9 == pytest.approx(gmacs, rel=0.03)


def test_deit_s_at_its_own_size_is_fvcore_to_the_last_digit() -> None:
    compressed = compress(weightless("deit_small_patch16_224"), keep=0.7)
    assert count_macs(compressed, (3, 224, 224)).total == closed_form(compressed)


@pytest.mark.slow
def test_a_giant_costs_no_memory() -> None:
    """Counted where there is no weight to multiply with: a forward of it would be 0.9 T multiply-adds."""
    compressed = compress(weightless("vit_giant_patch14_reg4_dinov2"), keep=0.5)
    assert count_macs(compressed, (3, 518, 518)).total == closed_form(compressed) > 9e11


def uneven() -> Any:
    """Three blocks that differ: in the width of the MLP, and in how many heads share the width."""
    model: Any = timm.create_model("test_vit", **SIZE).eval()
    model.blocks[1].mlp = Mlp(64, 96)
    model.blocks[2].attn = Attention(64, num_heads=4, qkv_bias=True)
    return model


@pytest.mark.parametrize("method", ["tome", "dyvit"])
def test_blocks_that_differ_each_count_for_themselves(method: str) -> None:
    model = uneven()
    costs = compress(model).adapter.cost(model).blocks
    assert [(block.after.per_token, block.key_width) for block in costs] == [
        (2 * 64 * 192, 32), (2 * 64 * 96, 32), (2 * 64 * 192, 16),
    ]  # fmt: skip
    assert closed_form(model) == count_macs(model, (3, 64, 64)).total
    compressed = compress(model, keep=0.7, layers="all", method=method)
    assert closed_form(compressed) == count_macs(compressed, (3, 64, 64)).total
