"""CaiT and ConViT: a class token that joins on the way, and weights that are no plain softmax, see how many patches a
token holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tokencut.adapters import adapter_for
from tokencut.attention import attention_bias
from tokencut.blocks import BlockLoop
from tokencut.errors import ModelError
from tokencut.model import compress
from tokencut.tokens import Tokens

# Sizes 1, 2 and 3: the same tokens repeated so often.
SIZES, REPEATED = torch.tensor([[1.0, 2.0, 3.0]]), [0, 1, 1, 2, 2, 2]


def made(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, num_classes=10, num_heads=4, depth=3, **arguments).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.4)
    return model


def tokens_of(model: Any, positions: torch.Tensor) -> tuple[BlockLoop, Tokens, Tokens]:
    """Three tokens that hold 1, 2 and 3 patches, and the six of one patch that they stand for."""
    loop = compress(model, keep=1.0).loop
    image = torch.randn(1, 3, model.embed_dim, generator=torch.Generator().manual_seed(1))
    merged = replace(Tokens(image, 0, SIZES), positions=positions, grid=(4, 4))
    merged = loop.adapter.prepare(model, replace(merged, bias=attention_bias(merged, True)))
    alone = replace(Tokens(image[:, REPEATED], 0), positions=positions[:, REPEATED], grid=(4, 4))
    return loop, merged, loop.adapter.prepare(model, alone)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("cait_xxs24_224", {"embed_dim": 32}), ("convit_tiny", {"embed_dim": 8, "local_up_to_layer": 2})],
)
def test_proportional_attention_is_attention_to_every_patch(name: str, arguments: dict[str, Any]) -> None:
    model = made(name, **arguments)
    loop, merged, alone = tokens_of(model, torch.tensor([[[0.0, 1.0], [2.5, 0.5], [1.0, 3.0]]]))
    with torch.no_grad():
        for number in (1, 2, 3):
            rows = loop.stage_input(number, alone).attention.class_attention()
            row = loop.stage_input(number, merged).attention.class_attention()
            merged, alone = loop.step(number, merged), loop.step(number, alone)
            torch.testing.assert_close(merged.image[:, REPEATED], alone.image, rtol=1e-4, atol=1e-4)
            if merged.num_prefix_tokens and number == 3 and name == "convit_tiny":  # the class token's own row
                shares = torch.stack((rows[:, 0], rows[:, 1:3].sum(1), rows[:, 3:].sum(1)), 1)
                torch.testing.assert_close(row, shares)
        torch.testing.assert_close(loop.head(merged), loop.head(alone), rtol=1e-4, atol=1e-4)


def test_a_class_token_joins_on_the_way_and_features_are_without_it() -> None:
    model = made("convit_tiny", embed_dim=8, local_up_to_layer=2)
    compressed = compress(model, keep=0.5, layers=[1, 3], method="tome").eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        final, maps = compressed.forward_intermediates(pixels, output_fmt="NLC", return_prefix_tokens=True)
        _, traces = compressed.trace(pixels)
    assert [trace.tokens.num_prefix_tokens for trace in traces] == [0, 1, 1]
    assert final.shape == (2, 17, 32)
    assert [(image.shape[1], prefix.shape[1]) for image, prefix in maps] == [(16, 0), (16, 0), (16, 1)]
    assert adapter_for(model).num_prefix_tokens(model) == 1


def test_convit_knows_square_grids_only() -> None:
    model = timm.create_model("convit_tiny", img_size=(32, 64), depth=1, local_up_to_layer=1)
    with pytest.raises(ModelError, match="^ConViT knows square grids of patches only, and this is 2 x 4; give"):
        compress(model)


def test_another_class_attention_is_refused_by_name() -> None:
    model = made("cait_xxs24_224", embed_dim=32)
    odd = model.blocks_token_only[1]
    odd.__class__ = type("OddLayer", (type(odd),), {"forward": lambda self, x, x_cls: x_cls})
    with pytest.raises(ModelError, match="the class-attention layer OddLayer is not known to tokencut"):
        compress(model)
