"""A model written with other scales inside computes the same, and so gets the same tokens.

Three rewritings that leave a ViT's function as it is. `dpc` and the published presets are left out: their density
depends on the scale of the features, as published.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from given_inputs import GivenAttention
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokencut import compress
from tokencut.methods import StageInput, make_method
from tokencut.ops import density_peaks
from tokencut.ops.density_peaks import PeakRule
from tokencut.ops.grouping import Grouping, Selection, group_sum
from tokencut.tokens import Tokens, apply_decision

FACTORS = [1 / 16, 1 / 3, 5.0, 16.0]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("bat", {}),
    ("bat", {"features": "normed", "keep_norm": False}),
    ("bat", {"features": "tokens", "neighbours": 5}),
    ("bat", {"features": "keys", "clusters": 0.5, "pairs": 0.3, "weights": "attention"}),
    ("bat", {"inattentive": "drop"}),
    ("evit", {}),
    ("kmedoids", {}),
    ("random", {}),
    ("tome", {}),
    ("topk", {}),
    ("dyvit", {}),
]
# Rounding may turn a near-tie, of all the tokens of all images: 0.1 % of them.
NEAR_TIES = 0.001


def vit() -> VisionTransformer:
    """A ViT of 64 image tokens whose weights are shaken, so that every part of it counts."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, num_heads=3, depth=4, num_classes=5
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if weight.ndim > 1 and "embed" not in name else 0.1
            weight.add_(scale * torch.randn_like(weight) / (weight.shape[-1] ** 0.5 if weight.ndim == 2 else 1))
    return model.eval()


def gains(model: VisionTransformer, k: float) -> None:
    """Gains of `norm2` times k, `fc1` divided by k."""
    for block in model.blocks:
        block.norm2.weight.mul_(k)
        block.norm2.bias.mul_(k)
        block.mlp.fc1.weight.div_(k)


def uneven_gains(model: VisionTransformer, k: float) -> None:
    """The same with another factor for each channel, up to k."""
    for block in model.blocks:
        factors = torch.logspace(0, 1, block.norm2.weight.numel(), base=k)[torch.randperm(block.norm2.weight.numel())]
        block.norm2.weight.mul_(factors)
        block.norm2.bias.mul_(factors)
        block.mlp.fc1.weight.div_(factors)


def keys(model: VisionTransformer, k: float) -> None:
    """Keys times k, queries divided by k."""
    for block in model.blocks:
        for part in (block.attn.qkv.weight, block.attn.qkv.bias):
            query, key, _ = part.chunk(3)
            query.div_(k)
            key.mul_(k)


def stream(model: VisionTransformer, k: float) -> None:
    """The whole residual stream times k."""
    written = [model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.pos_embed, model.cls_token]
    for block in model.blocks:
        written += [block.attn.proj.weight, block.attn.proj.bias, block.mlp.fc2.weight, block.mlp.fc2.bias]
        block.norm1.eps *= k * k
        block.norm2.eps *= k * k
    model.norm.eps *= k * k
    for weight in written:
        weight.mul_(k)


# What the norm sees is compared as it sees it: an uneven gain counts there.
REWRITTEN = [
    (method, options, rewriting)
    for method, options in CASES
    for rewriting in (gains, uneven_gains, keys, stream)
    if rewriting is not uneven_gains or "normed" not in options.values()
]


def decisions(model: VisionTransformer, method: str, options: dict[str, Any], images: Tensor) -> list[Tensor]:
    """For each stage the token that each patch went into."""
    compressed = compress(model, keep=0.6, layers=[1, 2, 3], method=method, method_options=options).eval()
    with torch.no_grad():
        traces = compressed.trace(images)[1]
    return [trace.tokens.source for trace in traces if trace.tokens.source is not None]


@pytest.mark.slow
@pytest.mark.parametrize("k", FACTORS)
@pytest.mark.parametrize(
    ("method", "options", "rewriting"), REWRITTEN, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_the_same_tokens_in_another_scale(method: str, options: dict[str, Any], rewriting: Any, k: float) -> None:
    model, images = vit(), torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rewritten = copy.deepcopy(model)
    with torch.no_grad():
        rewriting(rewritten, k)
        torch.testing.assert_close(rewritten(images), model(images), rtol=1e-3, atol=1e-4)
    expected, got = (decisions(each, method, options, images) for each in (model, rewritten))
    apart = sum(int((one != other).sum()) for one, other in zip(expected, got, strict=True))
    patches = sum(one.numel() for one in expected)
    assert apart <= NEAR_TIES * patches, f"{apart} of {patches} patches went elsewhere"


@pytest.mark.parametrize("method", ["bat", "dpc"])
def test_the_published_density_depends_on_the_scale(method: str) -> None:
    """What the docs say of it; with it this file's question is not empty."""
    options = {"preset": "paper"} if method == "bat" else {}
    model, images = vit(), torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rewritten = copy.deepcopy(model)
    with torch.no_grad():
        stream(rewritten, 16.0)
    expected, got = (decisions(each, method, options, images)[0] for each in (model, rewritten))
    assert (expected != got).float().mean() > 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("window", "k"), [*((24, k) for k in FACTORS), (132, 1 / 3), (132, 16.0)])
def test_kernels_decide_the_same_in_another_scale(window: int, k: float) -> None:
    pytest.importorskip("triton")
    from tokencut.ops.kernels import clusters

    device = "cuda" if torch.cuda.is_available() else "cpu"
    points = torch.randn(1, 2 * window, 16, generator=torch.Generator().manual_seed(2)).to(device)
    ones, rule = torch.ones(1, 2 * window, device=device), PeakRule(3, 0.125, 0.5, cosine=True)
    arguments = (ones, ones, window, 2, *density_peaks._kernel_rule(rule), True)
    group, coefficients, _ = clusters.density_average(points, *arguments)
    scaled, others, _ = clusters.density_average(k * points, *arguments)
    assert torch.equal(group, scaled)
    torch.testing.assert_close(coefficients, others)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """What the stage of block 7 of a fine-tuned DINOv2 ViT-S/14 sees of two images (tests/record_stage.py)."""
    file = Path(__file__).parents[1] / "stage_inputs" / "dinov2_small_block7.safetensors"
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def input_from(recorded: dict[str, Tensor], k: float = 1.0) -> StageInput:
    """The stage's input with the stream, the keys and the norm's gains times k."""
    tokens = Tokens(k * recorded["tokens"], 1)
    attention = GivenAttention((), 1, (0,), attention=recorded["class_attention"], points=k * recorded["keys"])
    gain, bias, width = k * recorded["norm.weight"], k * recorded["norm.bias"], recorded["norm.weight"].numel()

    def norm(features: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(features, (width,), gain, bias, eps=1e-6 * k * k)

    return StageInput(tokens, attention, norm)


@pytest.mark.parametrize(("method", "options"), [case for case in CASES if case[0] != "dyvit"], ids=str)
def test_the_same_tokens_of_a_real_model(method: str, options: dict[str, Any], recorded: dict[str, Tensor]) -> None:
    built = make_method(method, options)
    expected = built.decide(input_from(recorded), 128)
    for k in FACTORS:
        got = built.decide(input_from(recorded, k), 128)
        if isinstance(expected, Selection):
            assert isinstance(got, Selection)
            assert torch.equal(got.index, expected.index)
        else:
            assert isinstance(got, Grouping)
            assert (got.group != expected.group).float().mean() <= NEAR_TIES


def spread(recorded: dict[str, Tensor], options: dict[str, Any]) -> float:
    """What clusters lose: the mean squared distance of unit tokens from the direction of their cluster's token."""
    stage_input = input_from(recorded)
    decision = make_method("bat", options).decide(stage_input, 128)
    assert isinstance(decision, Grouping)
    left = torch.nn.functional.normalize(apply_decision(stage_input.tokens, decision).image, dim=2)
    index = decision.group.unsqueeze(2).expand(-1, -1, left.shape[2])
    return float((stage_input.features("unit") - left.gather(1, index)).square().sum(2).mean())


def test_on_a_real_model_density_does_not_drown_separation(recorded: dict[str, Tensor]) -> None:
    """The gains of this model's norm are near 2: what was the default put all centres in the background."""
    drowned = spread(recorded, {"features": "normed", "density": "published", "keep_norm": False})
    assert spread(recorded, {}) < 0.7 * drowned


def test_every_cluster_of_a_real_model_has_a_member(recorded: dict[str, Tensor]) -> None:
    decision = make_method("bat").decide(input_from(recorded), 77)
    assert isinstance(decision, Grouping)
    assert (group_sum(decision.group, torch.ones_like(decision.weight), 77) >= 1).all()
