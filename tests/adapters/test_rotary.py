"""Rotations by position: timm's own tables, at its patches and between them, and through training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from given_inputs import centres_of
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, apply_rot_embed_cat
from timm.layers.pos_embed_sincos import RotaryEmbeddingMRope
from torch import Tensor, nn

from tokencut.adapters import adapter_for
from tokencut.adapters.eva import EvaAdapter
from tokencut.adapters.positions import POSITION_RULES, first_patches, grid_positions, patch_shares
from tokencut.adapters.rotary import rotation_table
from tokencut.errors import ModelError
from tokencut.model import CompressedModel, compress

GRID = (3, 5)

ROPES: dict[str, Callable[[], Any]] = {
    "eva": lambda: RotaryEmbeddingCat(16, in_pixels=False, feat_shape=list(GRID), ref_feat_shape=[7, 4]),
    "pixels": lambda: RotaryEmbeddingCat(16, in_pixels=True),
    "columns first": lambda: RotaryEmbeddingCat(
        16, in_pixels=False, grid_indexing="xy", grid_offset=1.0, ref_feat_shape=[7, 4], rotate_half=True
    ),
    "dinov3": lambda: RotaryEmbeddingDinoV3(16, feat_shape=list(GRID)),
    "dinov3, shorter side": lambda: RotaryEmbeddingDinoV3(
        16, normalize_coords="min", grid_offset=0.25, grid_indexing="xy", rotate_half=False
    ),
    "mrope": lambda: RotaryEmbeddingMRope(16, mrope_section=(2, 3, 3)),
    "mixed": lambda: RotaryEmbeddingMixed(48, depth=2, num_heads=3, feat_shape=list(GRID)),
}


@pytest.mark.parametrize("kind", ROPES)
def test_a_table_at_the_patches_is_timms(kind: str) -> None:
    rope = ROPES[kind]()
    theirs = rope.get_embed(shape=list(GRID)).detach()
    for number in (1, 2):
        ours = rotation_table(rope, grid_positions(GRID, torch.device("cpu")).unsqueeze(0), GRID, number).detach()
        expected = theirs[number - 1].unsqueeze(0) if kind == "mixed" else theirs.view(1, 1, 15, -1)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ROPES)
def test_between_patches_two_rotations_make_one(kind: str) -> None:
    """Angles are linear: what lies between two patches is turned by half of what separates them."""
    rope = ROPES[kind]()
    places = torch.tensor([[[0.0, 1.0], [1.0, 3.0], [0.5, 2.0]]])
    table = rotation_table(rope, places, GRID, 1).detach()
    half = table.shape[-1] // 2
    angles = torch.atan2(table[..., :half], table[..., half:])
    wrapped = (angles[..., 2, :] - (angles[..., 0, :] + angles[..., 1, :]) / 2) / torch.pi
    torch.testing.assert_close(wrapped, wrapped.round(), rtol=0, atol=1e-5)


def test_a_table_has_the_dtype_of_timms() -> None:
    kept, made, mixed = (ROPES[kind]().to(torch.bfloat16) for kind in ("eva", "columns first", "mixed"))
    positions = grid_positions(GRID, torch.device("cpu")).unsqueeze(0)
    assert (
        [rotation_table(rope, positions, GRID, 1).dtype for rope in (kept, made, mixed)]
        == [
            kept.get_embed().dtype,
            made.get_embed(shape=list(GRID)).dtype,
            mixed.get_embed().dtype,
        ]
        == [torch.bfloat16, torch.float32, torch.bfloat16]
    )


def eva(**arguments: Any) -> Any:
    torch.manual_seed(0)
    small = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
    model = timm.create_model("vit_small_patch16_dinov3", **{**small, **arguments}).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.4)
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["tome", "bat", "topk"])
def test_tokens_are_where_their_patches_are_on_average(method: str) -> None:
    compressed = compress(eva(), keep=0.5, layers=[1, 2], method=method).eval()
    with torch.no_grad():
        _, traces = compressed.trace(images())
    for trace, count in zip(traces, (8, 4, 4), strict=True):
        tokens = trace.tokens
        assert tokens.source is not None and tokens.positions is not None
        patches = grid_positions((4, 4), torch.device("cpu"))
        torch.testing.assert_close(tokens.positions, centres_of(tokens.source, count, patches))


@pytest.fixture
def adapter() -> Iterator[EvaAdapter]:
    found = adapter_for(eva())
    assert isinstance(found, EvaAdapter)
    yield found
    for name in ("position_rule", "raw_keys", "raw_class_attention"):
        found.__dict__.pop(name, None)


# Patches 0 and 3 of a 2 x 2 grid are one token, 1 is another, 2 was dropped.
SOURCE = torch.tensor([[0, 1, -1, 0]])


def test_what_a_source_map_says_of_patches() -> None:
    assert torch.equal(first_patches(SOURCE, 2), torch.tensor([[0, 1]]))
    assert torch.equal(patch_shares(SOURCE, 2), torch.tensor([[[0.5, 0, 0, 0.5], [0, 1.0, 0, 0]]]))


@pytest.mark.parametrize("rule", POSITION_RULES)
def test_a_rule_says_how_a_token_is_turned(adapter: EvaAdapter, rule: str) -> None:
    adapter.position_rule = rule
    model = eva(img_size=32)
    loop = compress(model, keep=1.0).loop
    tokens = loop.embed(torch.zeros(1, 3, 32, 32))
    assert (tokens.source is not None) == (rule in ("first", "average"))
    own = model.rope.get_embed(shape=[2, 2])
    positions = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    reduced = {**tokens.__dict__, "positions": positions, "source": SOURCE, "shared": None}
    got = adapter.prepare(model, type(tokens)(**{**reduced, "features": tokens.features[:, : 5 + 2]})).shared
    assert got is not None and got.shape == (1, 1, 2, own.shape[1])
    torch.testing.assert_close(got[0, 0, 1], own[1])
    first = {
        "centroid": rotation_table(model.rope, positions, (2, 2), 1)[0, 0, 0],
        "nearest": own[0],  # of the four, all as near, the first by rounding to even
        "first": own[0],
        "average": (own[0] + own[3]) / 2,
    }
    torch.testing.assert_close(got[0, 0, 0], first[rule])


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize("name", ["dinov3", "mixed"])
def test_every_rule_is_the_model_where_tokens_are_patches(adapter: EvaAdapter, rule: str, name: str) -> None:
    adapter.position_rule = rule
    model = eva(**({"rope_type": "mixed", "rope_rotate_half": False} if name == "mixed" else {}))
    compressed = compress(model, keep=0.5, layers=[1], method="topk").eval()
    with torch.no_grad():
        logits, traces = compressed.trace(images())
        index = torch.stack([(row >= 0).nonzero().squeeze(1) for row in traces[0].tokens.source])  # type: ignore[union-attr]
        own = model.rope.get_embed(shape=[4, 4])
        x = adapter.mlp_half(model.blocks[0], traces[0].tokens).features
        for number in (2, 3):
            table = own[number - 1] if name == "mixed" else own.unsqueeze(0)
            x = model.blocks[number - 1](x, rope=table[:, index].transpose(0, 1))
        torch.testing.assert_close(logits, model.forward_head(model.norm(x)), rtol=1e-4, atol=1e-4)


def test_keys_and_class_attention_before_and_behind_the_rotation(adapter: EvaAdapter) -> None:
    model = eva()
    loop = compress(model, keep=1.0).loop
    with torch.no_grad():
        tokens = loop.embed(images())
        qkv = model.blocks[0].attn.qkv(model.blocks[0].norm1(tokens.features)).unflatten(2, (3, 3, 16))
        raw = qkv[:, 5:, 1]
        turned = apply_rot_embed_cat(raw.transpose(1, 2), model.rope.get_embed(shape=[4, 4]), half=True)
        for raw_keys, expected in ((False, turned.mean(1)), (True, raw.mean(2))):
            adapter.raw_keys = raw_keys
            attention = loop.stage_input(1, tokens).attention
            torch.testing.assert_close(attention.keys(), expected)
        rows = attention.class_attention()
        adapter.raw_class_attention = True
        plain = loop.stage_input(1, tokens).attention.class_attention()
        logits = torch.einsum("bhd,bnhd->bhn", qkv[:, 0, 0], qkv[:, :, 1]) * 16**-0.5
    torch.testing.assert_close(plain, logits.softmax(2)[:, :, 5:].mean(1))
    assert not torch.allclose(rows, plain, atol=1e-3)


def in_training(**arguments: Any) -> tuple[CompressedModel, list[Tensor]]:
    """A model in training, and the tables that its blocks were given."""
    model = compress(eva(**arguments), keep=0.5, layers=[1], method="tome").train()
    seen: list[Tensor] = []
    for block in model.model.blocks:
        block.register_forward_pre_hook(lambda _, __, given: seen.append(given["rope"]), with_kwargs=True)
    return model, seen


def test_patches_that_patch_dropout_leaves_keep_their_places(adapter: EvaAdapter) -> None:
    model, seen = in_training(patch_drop_rate=0.5)
    tokens = model.loop.embed(images())
    own, positions = model.model.rope.get_embed(shape=[4, 4]), tokens.positions
    assert positions is not None and positions.shape == (2, 8, 2) and tokens.shared is not None
    torch.testing.assert_close(tokens.shared[:, 0], own[(positions[..., 0] * 4 + positions[..., 1]).long()])
    model(images()).sum().backward()
    assert seen[-1].shape == (2, 1, 4, 32)
    adapter.position_rule = "first"
    with pytest.raises(ModelError, match="position_rule 'first' follows all patches of an image, and some were left"):
        model(images())


def test_positions_shifted_in_training_are_shifted_behind_a_stage_too() -> None:
    model, _ = in_training(rope_shift_coords=0.2, rope_jitter_coords=1.3, rope_rescale_coords=1.5)
    loop = model.loop
    tokens = loop.embed(images())
    patches = grid_positions((4, 4), torch.device("cpu"))
    assert tokens.positions is not None and tokens.shared is not None
    moved = tokens.positions[0] - patches
    assert moved.abs().max() > 1e-3, "nothing was shifted"
    # One affine map an axis, the same for both images: rows stay in line.
    assert torch.equal(tokens.positions[0], tokens.positions[1])
    for axis in (0, 1):
        steps = tokens.positions[0, :, axis].view(4, 4).transpose(0, axis)[:, 0].diff()
        torch.testing.assert_close(steps, steps[:1].expand(3))
    torch.testing.assert_close(tokens.shared, rotation_table(model.model.rope, tokens.positions, (4, 4), 1))
    again = loop.embed(images()).positions
    assert again is not None and not torch.allclose(again, tokens.positions)
    model.eval()
    assert torch.equal(loop.embed(images()).positions, patches.expand(2, -1, -1))  # type: ignore[arg-type]


def test_rotary_positions_of_another_kind_are_refused_by_name() -> None:
    model = eva()
    model.rope.__class__ = type("OddRope", (type(model.rope),), {})
    with pytest.raises(ModelError, match="the rotary positions OddRope are not known to tokencut"):
        compress(model)
