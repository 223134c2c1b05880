"""Every architecture of timm's `vision_transformer` and `deit`: the two halves of each block are timm's whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, LayerScale, Mlp
from torch import nn

from tokencut.adapters import adapter_for, counted_macs
from tokencut.adapters.vit_blocks import feed_forward
from tokencut.attention import attention_bias
from tokencut.errors import ModelError
from tokencut.model import CompressedModel, compress
from tokencut.tokens import Tokens

NAMES = timm.list_models(module=["vision_transformer", "deit"])

# One small model for each kind of block, attention, prefix and pooling among the 179.
SMALL: dict[str, dict[str, Any]] = {
    "test_vit": {},
    "test_vit2": {},
    "test_vit3": {},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 3},
    "vit_base_patch16_xp_224": {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_pwee_patch16_reg1_gap_256": {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_dpwee_patch16_reg1_gap_256": {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_dlittle_patch16_reg1_gap_256": {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_base_patch16_18x2_224": {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_base_patch16_rpn_224": {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_base_patch16_siglip_gap_224": {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_base_patch16_clip_224": {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 56, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "aimv2_large_patch14_224": {"img_size": 56, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_so150m_patch16_reg4_map_256": {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "beit3_base_patch16_224": {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3},
}


def small_model(name: str) -> nn.Module:
    """A small model with random weights, wider than timm starts them and LayerScale near 1, so that no error hides."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **SMALL[name]).eval()
    for module in model.modules():
        if isinstance(module, LayerScale):
            nn.init.uniform_(module.gamma, 0.8, 1.2)
    for name_, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
            elif "gamma" not in name_ and "lambda" not in name_:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def weighed(tokens: Tokens, proportional: bool) -> Tokens:
    return replace(tokens, bias=attention_bias(tokens, proportional))


def test_all_names_are_there() -> None:
    assert len(NAMES) >= 179 and len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_compresses_and_runs(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, depth=2)
    compressed = compress(model, keep=0.5)
    shape = (1, 3, *model.patch_embed.img_size)
    logits, traces = compressed.eval().trace(torch.empty(shape, device="meta"))
    patches = model.patch_embed.num_patches
    assert [trace.tokens.count for trace in traces][-1] == compressed.recipe.stages[-1].tokens_out < patches
    assert logits.shape[1] == (model.num_classes or model.num_features)


@pytest.mark.parametrize("name", SMALL)
def test_keep_one_is_timm_bit_for_bit(name: str) -> None:
    model = small_model(name)
    with torch.no_grad():
        assert torch.equal(compress(model, keep=1.0).eval()(images(model)), model(images(model)))


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_the_reducing_path_with_nothing_removed_is_the_whole_block(name: str, proportional: bool) -> None:
    model = small_model(name)
    adapter = adapter_for(model)
    with torch.no_grad():
        embedded = adapter.embed(model, images(model))
        sizes = torch.rand(2, embedded.count, generator=torch.Generator().manual_seed(2)) + 1
        bias = attention_bias(replace(embedded, sizes=sizes), proportional)
        whole, halves = embedded.features, replace(embedded, sizes=sizes, bias=bias)
        for number, block in enumerate(model.blocks, start=1):
            whole = block(whole) if bias is None else block(whole, attn_mask=bias)
            halves, attention = adapter.attention_half(model, block, halves, adapter.context(model, number, halves))
            row = attention.class_attention()
            halves = adapter.mlp_half(block, halves)
        assert row.shape == sizes.shape and (row >= 0).all() and (row.sum(1) > 0).all()
        assert attention.keys().shape[:2] == sizes.shape
        torch.testing.assert_close(halves.features, whole, rtol=1e-5, atol=1e-5)
        assert (whole - embedded.features).abs().mean() > 0.05, "the blocks do too little for a test"


@pytest.mark.parametrize("name", SMALL)
def test_the_head_with_every_token_once_is_timms(name: str) -> None:
    model = small_model(name)
    adapter = adapter_for(model)
    with torch.no_grad():
        tokens = adapter.embed(model, images(model))
        features = tokens.features
        for block in model.blocks:
            features = block(features)
        ones = Tokens(features, tokens.num_prefix_tokens, torch.ones(2, tokens.count))
        for proportional in (False, True):
            got = adapter.head(model, weighed(ones, proportional))
            torch.testing.assert_close(got, model.forward_head(model.norm(features)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_the_classifier_makes_the_logits_of_the_pooled_tokens(name: str) -> None:
    model = small_model(name)
    adapter, given = adapter_for(model), []
    hook = adapter.classifier(model).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad():
        two = adapter.separate_heads(model, apart=False)
        logits = model(images(model))
        hook.remove()
        found = adapter.classifier(model)(given[0])
    assert two == (name == "deit_tiny_distilled_patch16_224")
    assert given[0].shape == (2, model.embed_dim)
    assert torch.equal(found, logits) != two


def test_two_heads_give_their_logits_or_the_mean() -> None:
    model = small_model("deit_tiny_distilled_patch16_224").train()
    adapter, pixels = adapter_for(model), images(model)
    with torch.no_grad():
        assert adapter.separate_heads(model, apart=True)
        apart = model(pixels)
        assert adapter.separate_heads(model, apart=False)
        torch.testing.assert_close(model(pixels), (apart[0] + apart[1]) / 2)


def test_convolutions_are_counted_behind_the_back_of_the_models_hooks() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(6, 5))
    seen: list[object] = []
    layers[0].register_forward_hook(lambda *_: seen.append(_))
    # 8 x 8 places of 8 filters of 27; 6 x 6 of 8 filters of 9; 8 x 6 rows of 6 by 5.
    assert counted_macs(layers, (3, 16, 16)) == 64 * 8 * 27 + 36 * 8 * 9 + 8 * 6 * 6 * 5
    assert not seen


def test_sizes_in_pixels() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), patch_size=(8, 16), depth=1)
    adapter = adapter_for(model)
    assert (adapter.input_size(model), adapter.patch_size(model)) == ((64, 96), (8, 16))
    assert adapter.grid(model, 64, 96) == (8, 6)


@pytest.mark.parametrize("pool", ["avg", "avgmax"])
@pytest.mark.parametrize("include_prefix", [False, True])
def test_average_pooling_counts_a_token_as_often_as_it_holds_patches(pool: str, include_prefix: bool) -> None:
    model = timm.create_model("test_vit2", global_pool=pool, pool_include_prefix=include_prefix, num_classes=10).eval()
    adapter, prefix = adapter_for(model), 1
    generator = torch.Generator().manual_seed(0)
    merged = torch.randn(1, prefix + 3, model.embed_dim, generator=generator)
    # Sizes 1, 2 and 3: the same features repeated so often, pooled by timm.
    repeated = merged[:, [0, 1, 2, 2, 3, 3, 3]]
    with torch.no_grad():
        got = adapter.head(model, Tokens(merged, prefix, torch.tensor([[1.0, 2.0, 3.0]])))
        torch.testing.assert_close(got, model.forward_head(model.norm(repeated)), rtol=1e-5, atol=1e-5)


def test_attention_pooling_under_proportional_attention_sees_every_patch() -> None:
    model = timm.create_model("test_vit3", num_classes=10).eval()
    adapter, prefix = adapter_for(model), 1
    merged = torch.randn(1, prefix + 3, model.embed_dim, generator=torch.Generator().manual_seed(0))
    repeated = merged[:, [0, 1, 2, 2, 3, 3, 3]]
    tokens = Tokens(merged, prefix, torch.tensor([[1.0, 2.0, 3.0]]))
    with torch.no_grad():
        got = adapter.head(model, weighed(tokens, True))
        torch.testing.assert_close(got, model.forward_head(model.norm(repeated)), rtol=1e-5, atol=1e-5)


def test_proportional_attention_is_attention_to_every_patch() -> None:
    model = small_model("test_vit")
    adapter, block = adapter_for(model), model.blocks[0]
    merged = torch.randn(1, 4, model.embed_dim, generator=torch.Generator().manual_seed(0))
    repeated = merged[:, [0, 1, 2, 2, 3, 3, 3]]
    tokens = weighed(Tokens(merged, 1, torch.tensor([[1.0, 2.0, 3.0]])), True)
    with torch.no_grad():
        got = adapter.run(block, tokens, adapter.context(model, 1, tokens)).features
        torch.testing.assert_close(got, block(repeated)[:, [0, 1, 2, 4]], rtol=1e-5, atol=1e-5)


def test_an_unsupported_family_is_named_with_those_that_are() -> None:
    with pytest.raises(ModelError) as caught:
        compress(timm.create_model("test_resnet"))
    assert str(caught.value).startswith("ResNet models are not supported; supported are: ")
    assert "ViT / DeiT" in str(caught.value)
    assert str(caught.value).endswith("; 'tokencut models' lists the names")


@pytest.mark.parametrize(
    ("part", "message"),
    [("block", "the block Odd is not known: no stage can stand in it; tokencut knows Block, ResPostBlock"),
     ("attention", "the attention layer Odd is not known"),
     ("pool", "the attention pooling Odd is not known")],
)  # fmt: skip
def test_unknown_parts_are_refused_by_name(part: str, message: str) -> None:
    model = timm.create_model("test_vit3")
    odd = type("Odd", (nn.Module,), {})()
    if part == "block":
        model.blocks[1] = odd
    elif part == "attention":
        model.blocks[1].attn = odd
    else:
        model.attn_pool = odd
    with pytest.raises(ModelError, match=message):
        CompressedModel(model, compress(timm.create_model("test_vit3")).recipe)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["test_vit", "vit_base_patch16_clip_224"])
def test_patches_as_one_product_are_timms_embedding(name: str) -> None:
    model = small_model(name).to("cuda", torch.bfloat16)
    pictures = images(model).to("cuda", torch.bfloat16)
    with torch.no_grad():
        whole = model.norm_pre(model._pos_embed(model.patch_embed(pictures)))
        torch.testing.assert_close(adapter_for(model).embed(model, pictures).features, whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("training", [False, True])
def test_an_mlp_by_its_parts_is_the_mlp(training: bool) -> None:
    mlp = Mlp(8, 12, norm_layer=torch.nn.LayerNorm, drop=0.5).train(training)
    x, found = torch.randn(2, 5, 8), []
    for run in (mlp, lambda x: feed_forward(mlp, x)):
        torch.manual_seed(0)
        found.append(run(x))
    assert torch.equal(*found)


def test_an_mlp_that_is_not_known_or_was_changed_runs_as_it_is() -> None:
    x, gated = torch.randn(2, 5, 8), GluMlp(8, 12)
    assert torch.equal(feed_forward(gated, x), gated(x))
    hooked, grown, compiled = (Mlp(8, 12) for _ in range(3))
    hooked.register_forward_hook(lambda *_: x + 1)
    assert torch.equal(feed_forward(hooked, x), x + 1)
    grown.gate = torch.nn.Identity()  # a part that a later timm may have
    grown.forward = lambda x: x + 2
    compiled._compiled_call_impl = lambda x: x + 3  # as Mlp.compile() leaves it
    assert torch.equal(feed_forward(grown, x), x + 2) and torch.equal(feed_forward(compiled, x), x + 3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit", "vit_base_patch16_rpn_224", "vit_base_patch16_xp_224"])
def test_where_a_gpu_waits_for_its_host_blocks_run_in_halves_unless_something_is_around_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit as timm runs them."""
    dense = timm.create_model(name, **SMALL[name]).eval()
    model = compress(dense, keep=0.5, layers=[2], method="topk")
    pixels, whole = torch.randn(2, 3, *dense.patch_embed.img_size), []
    monkeypatch.setattr(type(model.model.blocks[0]), "forward", noting(whole, type(model.model.blocks[0]).forward))
    expected = model(pixels)
    assert len(whole) == len(dense.blocks) - 1
    monkeypatch.setattr("tokencut.adapters.columnar._hurried", lambda features: True)
    whole.clear()
    assert torch.equal(model(pixels), expected)
    assert not whole
    first, last = model.model.blocks[0], model.model.blocks[-1]
    first.register_forward_hook(lambda *_: None)
    last.forward = last.forward
    assert torch.equal(model(pixels), expected)
    assert whole == [first, last]
    model.model.blocks[0] = nn.Identity()  # what is not known runs as it is
    model(pixels)
    assert whole == [first, last, last]


def noting(seen: list[Any], forward: Any) -> Any:
    """A forward that notes whose it is."""
    return lambda block, *args, **kwargs: seen.append(block) or forward(block, *args, **kwargs)
