"""How large a number may get that enters a linear layer: nothing is ever larger, and the bound says something."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokencut
from tokencut.model import compress
from tokencut.models.quantized_linear import QuantizedLinear
from tokencut.models.token_bounds import largest_entering

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def model(name: str, **args: Any) -> Any:
    torch.manual_seed(0)
    made = timm.create_model(name, img_size=64, num_classes=5, **args).eval()
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.normal_(1, 0.5)
                part.bias.normal_(0, 0.5)
            if isinstance(part, nn.Linear) and part.bias is not None:
                part.bias.normal_()
    return made


@pytest.mark.parametrize(
    ("name", "args"),
    [("test_vit", {}), ("test_vit", {"qkv_bias": False}), ("vit_small_patch14_dinov2", {"depth": 3, "embed_dim": 48,
      "num_heads": 3}), ("vit_base_patch16_clip_quickgelu_224", {"depth": 3, "embed_dim": 48, "num_heads": 3})],
)  # fmt: skip
@torch.no_grad()
def test_nothing_that_enters_is_larger(name: str, args: dict[str, Any]) -> None:
    dense = model(name, **args)
    reduced = compress(dense, keep=0.5, layers=[2]).eval()
    found: dict[nn.Module, float] = {}

    def seen(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[layer] = max(found.get(layer, 0.0), float(given[0].abs().max()))

    for block in dense.blocks:
        for layer in LAYERS:
            block.get_submodule(layer).register_forward_pre_hook(seen)
    for scale in (1, 1000):  # whatever the image
        generator = torch.Generator().manual_seed(scale)
        reduced.model(scale * torch.randn(4, 3, 64, 64, generator=generator))
        dense(scale * torch.randn(4, 3, 64, 64, generator=generator))
    for block in dense.blocks:
        for name in LAYERS:
            layer = block.get_submodule(name)
            bound = largest_entering(block, layer)
            assert bound is not None
            assert found[layer] <= bound < 40 * found[layer], name


def test_a_token_as_long_as_its_norm_leaves_it_reaches_the_bound() -> None:
    dense = model("test_vit")
    block, width = dense.blocks[0], dense.embed_dim
    with torch.no_grad():
        weight, bias = block.norm2.weight, block.norm2.bias
        token = torch.full((width,), -1e4)
        token[3] = 1e7
        entering = block.norm2(token)
        assert entering[3] == pytest.approx(float(weight[3] * width**0.5 + bias[3]), rel=0.02)
        assert float(entering.abs().max()) <= largest_entering(block, block.mlp.fc1) / 1.09  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "args", "untold"),
    [
        ("vit_small_patch14_dinov2", {"mlp_layer": timm.layers.SwiGLU, "depth": 2, "embed_dim": 48, "num_heads": 3},
         {"mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"}),
        ("test_vit", {"scale_attn_norm": True}, {"attn.proj"}),
        ("test_vit", {"scale_mlp_norm": True}, {"mlp.fc2"}),
        ("test_vit", {"act_layer": nn.Tanhshrink}, {"mlp.fc2"}),
        ("eva02_tiny_patch14_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}, {*LAYERS}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_where_weights_do_not_tell_each_token_has_a_scale_of_its_own(
    name: str, args: dict[str, Any], untold: set[str]
) -> None:
    dense = model(name, **args)
    quantized = tokencut.quantize(compress(dense, keep=0.5, layers=[1]), "fp8")
    for before, block in zip(dense.blocks, quantized.model.blocks, strict=True):
        for path, layer in block.named_modules():
            if isinstance(layer, QuantizedLinear):
                assert (layer.token_scale is None) == (path in untold)
                assert (largest_entering(before, before.get_submodule(path)) is None) == (path in untold)
                assert layer.scale.shape == (len(layer.numbers) if path in untold else 1, 1)
    images = torch.randn(2, 3, 64, 64)
    wanted, found = compress(dense, keep=0.5, layers=[1]).eval()(images), quantized(images)
    assert 0 < float((wanted - found).abs().max()) < 0.3 * float(wanted.std())
