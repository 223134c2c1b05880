"""`forward_intermediates` of a compressed model: timm's to the bit with nothing reduced, else every patch in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerScale
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tokencut.adapters import adapter_for
from tokencut.errors import ModelError, UsageError
from tokencut.features import block_indices
from tokencut.methods import methods
from tokencut.model import CompressedModel, compress
from tokencut.tokens import Tokens

# Six blocks each but the distilled one, which has four; 16 patches. All prefixes: 1 class token; 1 register; 1 register
# and attention pooling; 2; 1 + 4 with LayerScale; none.
NARROW: dict[str, Any] = {"embed_dim": 48, "num_heads": 3, "depth": 4}
FIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "test_vit": ("test_vit", {}),
    "test_vit2": ("test_vit2", {}),
    "test_vit3": ("test_vit3", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", NARROW),
    "registers": ("vit_small_patch14_reg4_dinov2", {**NARROW, "patch_size": 16}),
    "no prefix": ("test_vit2", {"reg_tokens": 0}),
}
PREFIXES = {"test_vit": 1, "test_vit2": 1, "test_vit3": 1, "distilled": 2, "registers": 5, "no prefix": 0}
UNTRAINED = sorted(name for name, method in methods(keeps_grid=False).items() if not method.needs_training)


def small(fixture: str = "test_vit", **options: Any) -> nn.Module:
    """A small model of 64 px with random weights, LayerScale near 1, so that no error hides; the same at each call."""
    name, args = FIXTURES[fixture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **{"img_size": 64, "num_classes": 5, **args, **options}).eval()
        for module in model.modules():
            if isinstance(module, LayerScale):
                nn.init.uniform_(module.gamma, 0.8, 1.2)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
    return model


def pictures(batch: int = 3, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def halved(fixture: str = "test_vit", layers: tuple[int, ...] = (2, 3), method: str = "bat") -> CompressedModel:
    """16 to 8 image tokens in block 2, 8 to 4 in block 3."""
    return compress(small(fixture), keep=0.5, layers=layers, method=method).eval()


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in (value.values() if isinstance(value, dict) else value) for tensor in tensors(part)]


def structure(value: Any) -> Any:
    """A result with its tensors replaced by their shapes."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, dict):
        return {key: structure(part) for key, part in value.items()}
    return type(value)(structure(part) for part in value)


FORMS: list[dict[str, Any]] = [
    {},
    {"indices": 2, "norm": True},
    {"indices": [3, 0, -2], "return_prefix_tokens": True},  # out of order: both give them in the order of blocks
    {"indices": [1], "stop_early": True, "output_fmt": "NLC"},
    {"indices": (0, 2), "intermediates_only": True},
    {"indices": 1, "intermediates_only": True, "return_prefix_tokens": True, "output_fmt": "NLC", "norm": True},
    {"output_dict": True, "return_prefix_tokens": True},
    {"output_dict": True, "intermediates_only": True},
]


@pytest.mark.parametrize("fixture", FIXTURES)
def test_keep_one_is_timms_to_the_bit_and_keep_one_half_has_its_shapes(fixture: str) -> None:
    model, images = small(fixture), pictures(2)
    assert adapter_for(model).num_prefix_tokens(model) == PREFIXES[fixture]
    untouched, reduced = compress(model, keep=1.0).eval(), compress(model, keep=0.5, layers=(2, 3)).eval()
    for form in FORMS:
        with torch.no_grad():
            expected, whole, half = (each.forward_intermediates(images, **form) for each in (model, untouched, reduced))
        assert structure(whole) == structure(half) == structure(expected), form
        assert all(torch.equal(got, wanted) for got, wanted in zip(tensors(whole), tensors(expected), strict=True))
        # Blocks 2 and 3 reduce, so whatever is behind them differs.
        assert not torch.equal(tensors(half)[-1], tensors(expected)[-1]), form


@pytest.mark.parametrize("fixture", FIXTURES)
def test_blocks_before_the_first_stage_are_timms_to_the_bit_by_our_own_loop(fixture: str) -> None:
    model, images = small(fixture), pictures()
    compressed = compress(model, keep=0.5, layers=(4,)).eval()
    with torch.no_grad():
        for norm in (False, True):
            args = {"indices": [0, 1, 2], "norm": norm, "return_prefix_tokens": True, "intermediates_only": True}
            got, wanted = (tensors(each.forward_intermediates(images, **args)) for each in (compressed, model))
            assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
        stopped = compressed.forward_intermediates(images, [2], stop_early=True)[0]
        assert torch.equal(stopped, model.forward_intermediates(images, [2], stop_early=True)[0])


def by_hand(compressed: CompressedModel, images: Tensor, unmerge: str) -> list[Tensor]:
    """Every block's output, each patch placed one by one: `(B, P + patches, D)` a block.

    Hooks see what enters the stages and what later blocks give; the second half of a reducing block is run again.
    """
    model, adapter = compressed.model, compressed.adapter
    prefix = adapter.num_prefix_tokens(model)
    entering, outputs = {}, {}
    handles = [stage.register_forward_pre_hook(lambda _, args, n=int(name): entering.update({n: args[0].tokens}))
               for name, stage in compressed.stages.items()]  # fmt: skip
    handles += [block.register_forward_hook(lambda _, args, out, n=number: outputs.update({n: out}))
                for number, block in enumerate(model.blocks, start=1)]  # fmt: skip
    _, traces = compressed.trace(images)
    for handle in handles:
        handle.remove()
    left = {trace.block: trace.tokens for trace in traces[:-1]}
    full, last, stage, source = [], None, None, torch.arange(16).expand(len(images), -1)
    for number, block in enumerate(model.blocks, start=1):
        if number in left:
            before, behind = entering[number], left[number]
            last = placed(before.features, prefix, source, last, stage)
            if unmerge == "change" and not compressed.method.averages():
                source = follow(before, behind).gather(1, source)
            else:
                source = behind.source
            stage = behind.features if unmerge == "change" else None
            outputs[number] = adapter.mlp_half(block, left[number]).features
        patches = placed(outputs[number], prefix, source, last, stage)
        full.append(torch.cat((outputs[number][:, :prefix], patches), 1))
    return full


def follow(before: Tokens, behind: Tokens) -> Tensor:
    """One by one: what a token became if it is there alone, else the most similar token behind the stage."""
    rows = []
    for image in range(len(before.features)):
        went = dict(zip(before.source[image].tolist(), behind.source[image].tolist(), strict=True))
        became = [went[token] for token in range(before.count)]
        alone = [place >= 0 and became.count(place) == 1 for place in became]
        similar = [(behind.image[image] - row).square().sum(1).argmin() for row in before.image[image]]
        rows.append([place if one else int(other) for place, one, other in zip(became, alone, similar, strict=True)])
    return torch.tensor(rows)


def placed(features: Tensor, prefix: int, source: Tensor, last: Tensor | None, stage: Tensor | None) -> Tensor:
    """One by one: what each patch had last, with what its token changed by since the stage; without one its token's."""
    rows = []
    for image, places in enumerate(source.tolist()):
        for patch, place in enumerate(places):
            row = features[image, prefix + place] if place >= 0 else last[image, patch]  # type: ignore[index]
            if place >= 0 and stage is not None:
                row = last[image, patch] + (row - stage[image, prefix + place])  # type: ignore[index]
            rows.append(row)
    return torch.stack(rows).view(*source.shape, -1)


@pytest.mark.parametrize("unmerge", ["change", "copy"])
@pytest.mark.parametrize(("fixture", "method"), [*(("test_vit", method) for method in methods(keeps_grid=False)),
                                                 *((fixture, method) for fixture in list(FIXTURES)[1:]
                                                   for method in ("bat", "topk", "evit"))])  # fmt: skip
def test_every_patch_has_its_own_features_and_the_change_of_the_token_that_it_went_into(
    fixture: str, method: str, unmerge: str
) -> None:
    compressed, images = halved(fixture, method=method), pictures()
    prefix = PREFIXES[fixture]
    with torch.no_grad():
        expected = by_hand(compressed, images, unmerge)
        args = {"return_prefix_tokens": True, "output_fmt": "NLC", "unmerge": unmerge}
        final, intermediates = compressed.forward_intermediates(images, **args)
        _, traces = compressed.trace(images)
    source = traces[-1].tokens.source
    assert source is not None
    assert bool((source < 0).any()) == (not methods()[method]().merges()), "a method that drops has dropped patches"
    same = {"rtol": 0, "atol": 0} if unmerge == "copy" else {}  # a change is added up in another order by hand
    for number, (one, wanted) in enumerate(zip(intermediates, expected, strict=True), start=1):
        spatial, prefixes = one if prefix else (one, None)
        torch.testing.assert_close(spatial, wanted[:, prefix:], **same, msg=lambda text, n=number: f"block {n}: {text}")
        assert prefixes is None or torch.equal(prefixes, wanted[:, :prefix])
    torch.testing.assert_close(final, compressed.model.norm(expected[-1]), **same)
    # Copied, there are no more different features than tokens are left and were dropped; else each patch has its own.
    left = [4 + int((image < 0).sum()) if unmerge == "copy" else 16 for image in source]
    assert [len(image.unique(dim=0)) for image in spatial] == left


def test_norm_applies_to_what_was_dropped_too() -> None:
    compressed, images = halved(method="topk"), pictures()
    with torch.no_grad():
        raw = compressed.forward_intermediates(images, [2], output_fmt="NLC", intermediates_only=True)[0]
        normed = compressed.forward_intermediates(images, [2], norm=True, output_fmt="NLC", intermediates_only=True)[0]
        torch.testing.assert_close(normed, compressed.model.norm(raw))


def test_rows_and_columns_stand_as_in_the_picture() -> None:
    """A patch that differs from all others is found where it was painted."""
    model = small("test_vit2", depth=1, dynamic_img_size=True)
    for parameter in (model.pos_embed, model.blocks[0].ls1.gamma, model.blocks[0].ls2.gamma):
        nn.init.zeros_(parameter)  # the block changes nothing
    compressed = compress(model, keep=0.75, layers=(1,), method="tome").eval()
    images = torch.zeros(1, 3, 48, 96)  # 3 rows of 6 patches
    images[:, :, 16:32, 64:80] = 5.0  # row 1, column 4
    with torch.no_grad():
        (features,) = compressed.forward_intermediates(images, intermediates_only=True)
    assert features.shape == (1, model.embed_dim, 3, 6)
    odd = (features - features[:, :, :1, :1]).abs().sum(1)[0] > 1e-4
    assert odd.nonzero().tolist() == [[1, 4]]


def test_other_image_sizes_where_the_model_takes_them() -> None:
    model = small("test_vit2", dynamic_img_size=True)
    compressed, images = compress(model, keep=0.5, layers=(2, 3)).eval(), pictures(2, 48, 96)
    with torch.no_grad():
        final, maps = compressed.forward_intermediates(images, 2)
        assert final.shape == (2, 1 + 18, model.embed_dim)
        assert [each.shape for each in maps] == [(2, model.embed_dim, 3, 6)] * 2
        _, traces = compressed.trace(images)
        assert [trace.tokens.count for trace in traces] == [9, 5, 5]


@pytest.mark.parametrize("method", UNTRAINED)
def test_an_image_alone_and_in_a_batch(method: str) -> None:
    compressed, images = halved("test_vit2", method=method), pictures(4)
    with torch.no_grad():
        together = compressed.forward_intermediates(images)[1]
        alone = [compressed.forward_intermediates(image.unsqueeze(0))[1] for image in images]
    for number, each in enumerate(together):
        torch.testing.assert_close(torch.cat([one[number] for one in alone]), each, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unmerge", ["change", "copy"])
@pytest.mark.parametrize("method", ["bat", "topk", "evit"])
@pytest.mark.slow
def test_one_graph_and_the_same_features_compiled(method: str, unmerge: str) -> None:
    compressed, images = compress(small(depth=2), keep=0.5, layers=(1, 2), method=method).eval(), pictures()
    torch._dynamo.reset()
    run: Callable[[Tensor], list[Tensor]] = torch.compile(
        lambda x: compressed.forward_intermediates(x, norm=True, intermediates_only=True, unmerge=unmerge),
        backend="eager", fullgraph=True, dynamic=False,
    )  # fmt: skip
    with torch.no_grad():
        expected = compressed.forward_intermediates(images, norm=True, intermediates_only=True, unmerge=unmerge)
        torch.testing.assert_close(run(images), expected)


def test_which_methods_average_similar_tokens() -> None:
    averaging = {name for name, method in methods(keeps_grid=False).items() if method().averages()}
    assert averaging == {"bat", "dpc", "kmedoids", "tome"}
    assert not methods()["bat"](inattentive="drop", pairs=0.0).averages()


def test_the_models_own_rule_holds_where_none_is_named() -> None:
    compressed, images = halved(), pictures()
    with torch.no_grad():
        maps = {rule: compressed.forward_intermediates(images, 1, unmerge=rule)[0] for rule in ("change", "copy")}
        assert torch.equal(compressed.forward_intermediates(images, 1)[0], maps["change"])
        compressed.unmerge = "copy"
        assert torch.equal(compressed.forward_intermediates(images, 1)[0], maps["copy"])
        assert torch.equal(compressed.forward_intermediates(images, 1, unmerge="change")[0], maps["change"])
        assert not torch.equal(maps["change"], maps["copy"])


def test_a_plain_forward_has_nothing_to_do_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencut.model.Unmerging", lambda *_: pytest.fail("un-merges"))
    monkeypatch.setattr("tokencut.unmerging.unmerge", lambda *_: pytest.fail("un-merges"))
    halved()(pictures())


def test_a_head_on_the_maps_trains_the_whole_model() -> None:
    compressed = halved(method="topk").train()
    (features,) = compressed.forward_intermediates(pictures(), 1, intermediates_only=True)
    features.square().mean().backward()
    for block in compressed.model.blocks:
        assert block.attn.qkv.weight.grad is not None and block.attn.qkv.weight.grad.abs().sum() > 0


def test_a_method_that_hides_tokens_while_training_still_gives_the_grid() -> None:
    compressed = halved(method="dyvit").train()
    torch.manual_seed(0)
    assert [each.shape for each in compressed.forward_intermediates(pictures(), 2)[1]] == [(3, 64, 4, 4)] * 2


@pytest.mark.parametrize("indices", [None, 1, 3, 6, [0], [5, 2], (-1, -6, 3), range(1, 6, 2)])
def test_indices_mean_what_they_mean_to_timm(indices: Any) -> None:
    taken, last = feature_take_indices(6, indices)
    assert (block_indices(6, indices), max(block_indices(6, indices))) == (taken, last)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"indices": 7}, "7 last blocks cannot be taken of 6; give a number from 1 to 6, such as 3, or blocks from 0 "
                         "on, such as [1, 3, 5]"),
        ({"indices": 0}, "0 last blocks cannot be taken of 6; give a number from 1 to 6, such as 3, or blocks from 0 "
                         "on, such as [1, 3, 5]"),
        ({"indices": [2, 6]}, "there is no block 6: this model has blocks 0 to 5 (or -6 to -1, from the end); give "
                              "such as [1, 3, 5]"),
        ({"indices": [-7]}, "there is no block -7: this model has blocks 0 to 5 (or -6 to -1, from the end); give such "
                            "as [1, 3, 5]"),
        ({"indices": []}, "no block is named to take features of; give such as [1, 3, 5], or None for all"),
        ({"output_fmt": "NHWC"}, "output_fmt 'NHWC' is not known; give 'NCHW' or 'NLC'"),
        ({"unmerge": "mean"}, "unmerge 'mean' is not known; give 'change' or 'copy'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_what_does_not_exist_is_refused_in_one_line(args: dict[str, Any], message: str, keep: float) -> None:
    compressed = compress(small(), keep=keep).eval()
    with pytest.raises(UsageError) as caught:
        compressed.forward_intermediates(pictures(), **args)
    assert str(caught.value) == message


def test_patch_dropout_leaves_no_grid() -> None:
    compressed = compress(small(patch_drop_rate=0.25), keep=0.5, layers=(2,)).train()
    with pytest.raises(ModelError) as caught:
        compressed.forward_intermediates(pictures())
    assert str(caught.value) == (
        "patch dropout left 12 of 16 patches, and no full grid; type model.eval(), or build the model with "
        "patch_drop_rate=0"
    )
    compressed.train()(pictures())  # the logits need no grid
    assert compressed.eval().forward_intermediates(pictures())[1][0].shape == (3, 64, 4, 4)
