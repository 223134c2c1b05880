"""NaFlexViT: patch dropout, and batches that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from tokencut.errors import ModelError
from tokencut.model import compress

SMALL = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


def made(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("naflexvit_base_patch16_gap", **SMALL, **arguments)


def test_naflex_batches_are_refused_with_the_reason() -> None:
    batch = {"patches": torch.zeros(1, 4, 768), "patch_coord": torch.zeros(1, 4, 2), "patch_valid": torch.ones(1, 4)}
    for keep in (0.5, 1.0):
        with pytest.raises(ModelError, match="^NaFlex batches, in which each image has a grid and padding of its own"):
            compress(made(), keep=keep)(batch)


@pytest.mark.parametrize("rope_type", ["mixed", "axial"])
def test_patches_that_patch_dropout_leaves_keep_their_places(rope_type: str) -> None:
    compressed = compress(made(rope_type=rope_type, patch_drop_rate=0.5), keep=0.5, layers=[2], method="topk").train()
    model, seen = compressed.model, []
    model.blocks[0].register_forward_pre_hook(lambda _, __, given: seen.append(given["rope"]), with_kwargs=True)
    pixels = torch.randn(2, 3, 64, 64)
    tokens = compressed.loop.embed(pixels)
    compressed.loop.step(1, tokens)
    positions = tokens.positions
    assert positions is not None and positions.shape == (2, 8, 2)
    place = (positions[..., 0] * 4 + positions[..., 1]).long()
    own = model.rope.get_embed(shape=[4, 4])
    expected = own[0][:, place].transpose(0, 1) if rope_type == "mixed" else own[place].unsqueeze(1)
    torch.testing.assert_close(seen[0], expected)
    compressed(pixels).sum().backward()
