"""Clips: how they are cut into tubelets, where these stand in time and space, and what a model says of other shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch

from tokencut.adapters.space_time import sines
from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import ModelError
from tokencut.model import compress
from tokencut.visualization.regions import Grid, parts_of
from tokencut.visualization.stage_views import side_by_side

SIZES: dict[str, Any] = {"img_size": (24, 32), "patch_size": 8, "num_frames": 6, "embed_dim": 16, "depth": 2,
                         "num_heads": 2, "num_classes": 5}  # fmt: skip


def videomae(**more: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("videomae_small_patch16_224", **{**SIZES, **more}).eval()


def vivit(**more: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vivit_base_patch16x2_224", **{**SIZES, **more}).eval()


def test_tokens_go_by_frames_then_rows_then_columns() -> None:
    model = videomae()
    embed, clips = model.patch_embed, torch.randn(2, 3, 6, 24, 32)
    assert embed.grid_size == (3, 3, 4) and embed.num_patches == 36
    tokens = embed(clips)
    frame, row, column = 2, 1, 3
    tubelet = clips[1, :, 2 * frame : 2 * frame + 2, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    expected = embed.proj.weight.flatten(1) @ tubelet.flatten() + embed.proj.bias
    torch.testing.assert_close(tokens[1, (frame * 3 + row) * 4 + column], expected, rtol=1e-4, atol=1e-5)
    product = embed.cut(clips) @ embed.proj.weight.flatten(1).T + embed.proj.bias
    torch.testing.assert_close(product, tokens, rtol=1e-4, atol=1e-5)


def test_the_table_of_sines() -> None:
    table = sines(40, 6)[0]
    for token, number in ((0, 0), (7, 0), (7, 1), (39, 4), (39, 5)):
        angle = token / 10000 ** (2 * (number // 2) / 6)
        assert table[token, number] == pytest.approx(math.cos(angle) if number % 2 else math.sin(angle), abs=1e-6)
    model = videomae()
    assert torch.equal(model.pos_embed, sines(36, 16)) and not model.pos_embed.requires_grad
    model.init_weights()
    assert torch.equal(model.pos_embed, sines(36, 16))
    assert vivit().pos_embed.requires_grad


@pytest.mark.parametrize("make", [videomae, vivit])
def test_frames_of_another_size(make: Any) -> None:
    model = make()
    compressed = compress(model, keep=0.5, layers=[1])
    compressed.set_input_size(img_size=(32, 16))
    assert compressed.recipe.tokens == 3 * 4 * 2 and compressed.recipe.stages[0].tokens_out == 12
    assert compressed(torch.randn(1, 3, 6, 32, 16)).shape == (1, 5)
    built = make(img_size=(32, 16))
    assert compressed.model.pos_embed.shape == built.pos_embed.shape
    if make is videomae:
        assert torch.equal(compressed.model.pos_embed, built.pos_embed)
    else:
        same = make()
        same.set_input_size((24, 32))
        torch.testing.assert_close(same.pos_embed, model.pos_embed)
    with pytest.raises(ModelError, match="cannot be resampled to 4"):
        model.set_input_size(patch_size=4)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((2, 6, 3, 24, 32), r"takes clips \(B, 3, 6, 24, 32\).*transpose\(1, 2\) makes them"),
        ((2, 3, 24, 32), r"these are \(2, 3, 24, 32\)"),
        ((2, 3, 8, 24, 32), "channels, frames, height and width are what the model is built for"),
    ],
)
def test_other_shapes_are_refused(shape: tuple[int, ...], told: str) -> None:
    model = videomae()
    for each in (model, compress(model, keep=0.5, layers=[1])):
        with pytest.raises(ModelError, match=told):
            each(torch.zeros(shape))


def test_features_keep_frames_apart() -> None:
    model, clips = vivit(), torch.randn(2, 3, 6, 24, 32)
    final, [(features, prefix)] = model.forward_intermediates(clips, [1], return_prefix_tokens=True)
    assert features.shape == (2, 16, 3, 3, 4) and prefix.shape == (2, 1, 16) and final.shape == (2, 37, 16)
    torch.testing.assert_close(model.norm(features[:, :, 1, 2, 3]), final[:, 1 + (1 * 3 + 2) * 4 + 3])
    named = model.forward_intermediates(clips, 1, output_fmt="NLC", output_dict=True, stop_early=True)
    torch.testing.assert_close(named["image_intermediates"][0].unflatten(1, (3, 3, 4)).movedim(-1, 1), features)
    compressed = compress(model, keep=0.5, layers=[1], method="tome").eval()
    _, traces = compressed.trace(clips)
    [maps] = compressed.forward_intermediates(clips, [1], intermediates_only=True, unmerge="copy")
    token = int(traces[0].tokens.source[0, (1 * 3 + 2) * 4 + 3])
    torch.testing.assert_close(maps[0, :, 1, 2, 3], traces[-1].tokens.image[0, token])


def test_normalising_keeps_channels_where_they_are() -> None:
    prepared = preprocessing_of(videomae())
    assert prepared.input_shape == (3, 6, 24, 32)
    clips = torch.randint(0, 256, (1, 3, 6, 4, 4), dtype=torch.uint8)
    expected = (clips[0, 1, 5].float() / 255 - 0.456) / 0.224
    torch.testing.assert_close(prepared.normalise(clips, torch.device("cpu"))[0, 1, 5], expected)


def test_a_strip_of_frames() -> None:
    """Two frames of 2 x 3: in the picture they stand side by side, and do not touch."""
    grid = Grid(2, 6, 8, 8, frames=2)
    order = side_by_side(np.arange(12)[None], grid)[0].reshape(2, 6)
    assert order.tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    parts = parts_of(np.zeros(12, np.int64), grid).reshape(2, 6)
    assert (parts[:, :3] == 0).all() and (parts[:, 3:] == 3).all()
