"""Encoders of language models: what their projectors get where tokens were merged or dropped."""

from __future__ import annotations

import pytest
import timm
import torch

from tokencut.adapters.projected import on_grid
from tokencut.errors import ModelError
from tokencut.model import compress, predicted_macs
from tokencut.profiling.counting import count_macs
from tokencut.tokens import Tokens


def test_tokens_are_spread_over_their_patches_and_dropped_ones_take_the_nearest() -> None:
    features = torch.tensor([[[1.0], [2.0]]])
    # Patches 0 and 1 are the first token, 5 is the second; 2, 3 and 4 of the 2 x 3 grid were dropped.
    source = torch.tensor([[0, 0, -1, -1, -1, 1]])
    tokens = Tokens(features, 0, source=source, positions=torch.tensor([[[0.0, 0.5], [1.0, 2.0]]]), grid=(2, 3))
    assert torch.equal(on_grid(tokens), torch.tensor([[[[1.0], [1.0], [2.0]], [[1.0], [2.0], [2.0]]]]))


@pytest.mark.parametrize("name", ["qwen3_vit_88m_enc", "deepseek_vit_412m_enc"])
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_a_projector_gives_as_many_tokens_as_ever(name: str, method: str) -> None:
    small = {"img_size": 4 * (16 if "qwen" in name else 14), "depth": 3, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model(name, out_features=8, **small).eval()
    pixels = torch.randn(2, 3, small["img_size"], small["img_size"])
    compressed = compress(model, keep=0.5, layers=[1, 2], method=method).eval()
    with torch.no_grad():
        assert compressed(pixels).shape == model(pixels).shape == (2, 4, 8)
        features = compressed.forward_features(pixels)
        assert features.shape == (2, 4, 48)
        with pytest.raises(ModelError, match="the features don't tell where their tokens are; call the model"):
            compressed.forward_head(features)


@pytest.mark.parametrize(("name", "size", "side"), [("qwen3_vit_88m_enc", 112, 2), ("gemma4_vit_167m_enc", 112, 3)])
def test_images_that_do_not_come_out_even_are_refused_with_a_size_that_does(name: str, size: int, side: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, img_size=size, depth=1)
        even = timm.create_model(name, img_size=16 * side * 2, depth=1)
    near = {2: 128, 3: 96}[side]
    with pytest.raises(ModelError) as caught:
        compress(model)
    assert str(caught.value) == (
        f"its projector takes squares of {side} x {side} patches, and images of 112 x 112 px have 7 x 7; give such as "
        f"`img_size=({near}, {near})`"
    )
    compress(even)


def test_multiply_adds_are_counted_although_the_counter_hooks_every_part() -> None:
    """A user's hook on an encoder that runs in parts is refused; those of the tracer that counts are not."""
    model = timm.create_model("qwen3_vit_88m", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=3).eval()
    compressed = compress(model, keep=0.5, layers=[1], method="tome").eval()
    assert count_macs(compressed, (3, 64, 64)).total == sum(row.macs for row in predicted_macs(compressed))
    compressed.model.encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="^encoder has a hook or a forward of its own"):
        compressed(torch.zeros(1, 3, 64, 64))
