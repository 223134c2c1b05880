"""Hierarchical models: one stage on a smaller grid, all else as timm runs it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
from hierarchies import SMALL, images, small
from torch import nn

import tokencut
from tokencut.adapters import adapter_for
from tokencut.errors import ModelError, UsageError
from tokencut.model import compress, predicted_gmacs, predicted_macs
from tokencut.profiling.counting import count_macs

EVERY = pytest.mark.parametrize("case", SMALL)
FORMS: list[dict[str, Any]] = [
    {},
    {"reconstruct": "softmax", "rounds": 0},
    {"reconstruct": "copy"},
    {"clustering": "pool"},
    {"clustering": "pool", "reconstruct": "copy"},
]


@EVERY
def test_keep_one_is_timm_bit_for_bit(case: str) -> None:
    model = small(case)
    with torch.no_grad():
        assert torch.equal(compress(model, keep=1.0).eval()(images(model)), model(images(model)))


@EVERY
def test_an_image_has_the_same_logits_alone_and_in_any_batch(case: str) -> None:
    model, pixels = small(case), images(small(case))
    with torch.no_grad():
        dense = model(pixels)
        for form in FORMS:
            compressed = compress(model, keep=0.5, method_options=form).eval()
            logits = compressed(pixels)
            assert (logits - dense).abs().max() > 1e-3, "nothing was reduced"
            torch.testing.assert_close(compressed(pixels.flip(0)).flip(0), logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(compressed(pixels[1:2]), logits[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@EVERY
def test_the_closed_form_is_what_fvcore_counts(case: str) -> None:
    model = small(case)
    ways = [compress(model, keep=0.6), compress(model, keep=0.2, method_options=FORMS[list(SMALL).index(case) % 5])]
    assert all(compressed.recipe.stages for compressed in ways)
    for each in (model, *ways):
        counted = count_macs(each, (3, *images(model, 1).shape[2:]))
        assert sum(row.macs for row in predicted_macs(each)) == counted.total
        assert not counted.uncounted


@EVERY
def test_the_loop_is_the_forward(case: str) -> None:
    model = small(case)
    compressed, pixels = compress(model, keep=0.5).eval(), images(model)
    loop = compressed.loop
    with torch.no_grad():
        tokens = loop.run(loop.embed(pixels), compressed.recipe.stages)
        assert torch.equal(loop.head(tokens), compressed(pixels))
        assert torch.equal(compressed.forward_head(compressed.forward_features(pixels)), compressed(pixels))


@EVERY
def test_maps_have_timms_shapes_and_change_from_the_third_on(case: str) -> None:
    model = small(case)
    compressed, pixels = compress(model, keep=0.5).eval(), images(model)
    with torch.no_grad():
        ours, theirs = (each.forward_intermediates(pixels, intermediates_only=True) for each in (compressed, model))
        assert [each.shape for each in ours] == [each.shape for each in theirs]
        assert [torch.equal(*pair) for pair in zip(ours, theirs, strict=True)] == [True, True, False, False]
        maps = tokencut.features_only(compressed, out_indices=(1, 2))(pixels)
        assert all(torch.equal(*pair) for pair in zip(maps, ours[1:3], strict=True))
        early = tokencut.features_only(compressed, out_indices=(0, 1))(pixels)
        assert all(torch.equal(*pair) for pair in zip(early, theirs[:2], strict=True))


@EVERY
def test_a_training_step_reaches_every_weight(case: str) -> None:
    model = small(case).train()
    model(images(model)).square().sum().backward()
    reached = {label for label, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    compressed = compress(model, keep=0.5).train()
    gradients = []
    for checkpoints in (False, True):
        compressed.zero_grad()
        compressed.set_grad_checkpointing(checkpoints)
        compressed(images(model)).square().sum().backward()
        gradients.append({label: weight.grad for label, weight in compressed.model.named_parameters()})
    assert {label for label, gradient in gradients[0].items() if gradient is not None and gradient.any()} == reached
    for label, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][label], gradient)


def test_the_scale_of_features_changes_no_cluster() -> None:
    model = small("swin")
    compressed, pixels = compress(model, keep=0.5).eval(), images(model)
    loop = compressed.loop
    with torch.no_grad():
        tokens = loop.embed(pixels)
        found = [
            loop.stages[2](loop.stage_input(2, tokens.with_features(scale * tokens.features)), 36)
            for scale in (1.0, 1000.0, 1e-3)
        ]
    for other in found[1:]:
        torch.testing.assert_close(other.clustered.clusters.average, found[0].clustered.clusters.average)
        torch.testing.assert_close(other.clustered.clusters.spread, found[0].clustered.clusters.spread)


def test_hooks_see_what_they_see_of_timms_model() -> None:
    model = small("swin")
    compressed, pixels = compress(model, keep=0.5).eval(), images(model)
    names = ("layers", "layers.1", "layers.2", "layers.2.blocks", "layers.2.blocks.3", "layers.2.blocks.3.attn", "norm")
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
    for name in names:
        part = compressed.model.get_submodule(name)

        def note(module: nn.Module, _: Any, output: Any, name: str = name, part: nn.Module = part) -> None:
            assert module is part
            seen[name].append(tuple(output.shape))

        part.register_forward_hook(note)
    with torch.no_grad():
        compressed(pixels)
        reduced = {name: list(found) for name, found in seen.items()}
        compressed.model(pixels)
    assert all(len(found) == 1 for found in reduced.values())
    assert [name for name in names if reduced[name] != seen[name][1:]] == [
        "layers.2.blocks.3",
        "layers.2.blocks.3.attn",
    ]


def test_other_sizes_and_their_own_keep() -> None:
    model = small("swin any size")
    dense, compressed = compress(model, keep=1.0).eval(), compress(model, keep=0.5).eval()
    with torch.no_grad():
        for height, width in ((96, 96), (112, 64), (160, 100)):
            pixels = torch.randn(2, 3, height, width)
            assert torch.equal(dense(pixels), model(pixels))
            assert (compressed(pixels) - model(pixels)).abs().max() > 1e-3
    other = compress(small("swin"), keep=0.5)
    with warnings.catch_warnings():  # of torch, about how timm resizes its tables
        warnings.simplefilter("ignore")
        other.set_input_size(img_size=96)
    assert (other.recipe.tokens, [plan.tokens_out for plan in other.recipe.stages]) == (36, [16])
    assert other.eval()(torch.randn(1, 3, 96, 96)).isfinite().all()


def test_a_file_keeps_it(tmp_path: Any) -> None:
    model = small("swin padded")
    compressed, pixels = compress(model, keep=0.5, method_options={"reach": 1}).eval(), images(model)
    tokencut.save(compressed, tmp_path / "out.safetensors")
    loaded = tokencut.load(tmp_path / "out.safetensors")
    assert loaded.recipe == compressed.recipe
    name, args = SMALL["swin padded"]
    plain = timm.create_model(name, checkpoint_path=str(tmp_path / "out.safetensors"), **args).eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixels), compressed(pixels))
        assert torch.equal(plain(pixels), model(pixels))


@pytest.mark.parametrize(
    ("name", "keep", "layer", "saved"),
    [("swin_small_patch4_window7_224", 0.75, 2, 18.1), ("swin_small_patch4_window7_224", 0.5, 3, 31.8),
     ("swin_base_patch4_window12_384", 0.5, 5, 31.4), ("swin_tiny_patch4_window7_224", 0.5, 2, 18.9)],
)  # fmt: skip
def test_what_is_saved(name: str, keep: float, layer: int, saved: float) -> None:
    """As worked out before any of it was written: clustering and giving back counted."""
    with torch.device("meta"):
        model = timm.create_model(name)
    found = 100 * (1 - predicted_gmacs(compress(model, keep=keep, layers=[layer])) / predicted_gmacs(model))
    assert found == pytest.approx(saved, abs=0.1)


def test_the_nearest_window_is_taken() -> None:
    model = small("swin")  # 8 x 8 tokens in windows of 4 x 4: 1, 4 or 9 of 16 stay
    stages = [compress(model, keep=keep).recipe.stages for keep in (0.8, 0.7, 0.39, 0.1)]
    assert [sum(plan.tokens_out for plan in plans) for plans in stages] == [0, 36, 16, 4]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"method": "bat"}, "method bat leaves tokens in no grid, and Swin needs one between its stages; type "
                            "`method='window'`, or leave it out"),
        ({"reduce_by": 8}, "Swin keeps a regular grid, from which not any 8 tokens can go; type a share that stays, "
                           "such as `keep=0.5`, instead of `reduce_by`"),
        ({"layers": "all"}, "layers 'all' are several, and Swin is reduced once; type the block of its third stage "
                            "where that begins, such as `layers=[2]`"),
        ({"layers": [2, 3]}, "layers 2,3 are several, and Swin is reduced once; type the block of its third stage "
                             "where that begins, such as `layers=[2]`"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        compress(small("swin"), **arguments)
    assert str(refused.value) == told


def test_windows_are_for_hierarchies_alone() -> None:
    with pytest.raises(UsageError) as refused:
        compress(timm.create_model("test_vit"), method="window")
    assert str(refused.value) == (
        "method window makes a grid smaller inside windows, for hierarchical models, and ViT / DeiT is none; type "
        "another, such as `method='bat'`"
    )
    short = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 1), num_heads=(1, 1))
    with pytest.raises(ModelError, match="has 2 stages with blocks, and it is the third"):
        adapter_for(short)
    with pytest.raises(UsageError, match="whose stage gives each token back"):
        compress(small("swin")).forward_intermediates(torch.zeros(1, 3, 128, 128), unmerge="copy")
