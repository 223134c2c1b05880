"""What holds for every family: a row in `FAMILIES` puts a new one through all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from timm.layers import LayerScale
from torch import Tensor, nn

import tokencut
from tokencut.adapters import adapter_for, supported_modules
from tokencut.attention import attention_bias
from tokencut.blocks import BlockLoop
from tokencut.data.preprocessing import preprocessing_of
from tokencut.export.run import export_model
from tokencut.model import CompressedModel, compress, predicted_macs
from tokencut.profiling.counting import count_macs
from tokencut.search.latency_table import latency_table
from tokencut.search.probe import Probe
from tokencut.search.timing import Bench
from tokencut.tokens import Tokens
from tokencut.visualization.drawing import draw


@dataclass(frozen=True)
class Family:
    """A row.

    Attributes:
        modules: timm's modules.
        names: How many names timm 1.0.31 has in them.
        small: Arguments that make small models, one for each kind of block, attention, position and pooling.
        checkpoints: Whether timm can compute activations again in backward.
        arguments: What makes any of the names shallow enough to be built on the meta device.
        slow: Whether its small models are too large for the quick loop.
    """

    modules: tuple[str, ...]
    names: int
    small: Mapping[str, Mapping[str, Any]]
    checkpoints: bool = True
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"depth": 2})
    slow: bool = False


TINY = {"depth": 3, "embed_dim": 48, "num_heads": 3}

FAMILIES = {
    "eva": Family(
        ("eva",),
        65,
        {
            "eva02_tiny_patch14_224": {"img_size": 56, **TINY},
            "eva02_base_patch14_224": {"img_size": 42, **TINY},
            "eva02_enormous_patch14_clip_224": {"img_size": 42, **TINY},
            "vit_small_patch16_rope_mixed_ape_224": {"img_size": 64, **TINY},
            "vit_small_patch16_rope_224": {"img_size": (48, 64), **TINY},
            "vit_pe_core_tiny_patch16_384": {"img_size": 64, **TINY},
            "vit_small_patch16_dinov3_qkvb": {"img_size": (48, 64), **TINY},
            "vit_huge_patch16_sapiens2": {
                "img_size": (64, 48),
                "depth": 3,
                "embed_dim": 64,
                "num_heads": 4,
                "num_kv_heads": (4, 2, 2),
            },
        },
    ),
    "beit": Family(
        ("beit",),
        7,
        {
            "beit_base_patch16_224": {"img_size": 64, **TINY},
            "beitv2_base_patch16_224": {"img_size": (48, 64), "use_shared_rel_pos_bias": True, **TINY},
            "beit_large_patch16_224": {
                "img_size": 64,
                "use_rel_pos_bias": False,
                "use_shared_rel_pos_bias": True,
                "global_pool": "token",
                **TINY,
            },
        },
    ),
    "relpos": Family(
        ("vision_transformer_relpos",),
        14,
        {
            "vit_relpos_base_patch16_cls_224": {"img_size": 64, **TINY},
            "vit_relpos_base_patch16_rpn_224": {"img_size": (48, 64), "rel_pos_type": "bias", **TINY},
            "vit_relpos_small_patch16_224": {"img_size": 64, "rel_pos_type": "mlp_swin", **TINY},
            "vit_srelpos_small_patch16_224": {"img_size": 64, "qk_norm": True, **TINY},
        },
    ),
    "convit": Family(
        ("convit",),
        3,
        {
            "convit_tiny": {"img_size": 64, "depth": 4, "embed_dim": 8, "num_heads": 4, "local_up_to_layer": 2},
            "convit_small": {
                "img_size": 64,
                "depth": 3,
                "embed_dim": 8,
                "num_heads": 4,
                "local_up_to_layer": 2,
                "global_pool": "avg",
            },
        },
        arguments={"depth": 2, "local_up_to_layer": 1},
        checkpoints=False,
    ),
    "cait": Family(
        ("cait",),
        10,
        {
            "cait_xxs24_224": {"img_size": 64, **TINY},
            "cait_s24_224": {"img_size": (48, 64), "global_pool": "avg", **TINY},
        },
    ),
    "deepseek": Family(
        ("deepseek_vit",),
        3,
        {
            "deepseek_vit_412m": {"img_size": 56, **TINY},
            "deepseek_vit_412m_align": {"img_size": (56, 70), "out_features": 32, **TINY},
            "deepseek_vit_412m_enc": {"img_size": 56, "out_features": 32, **TINY},
        },
    ),
    "qwen3": Family(
        ("qwen3_vit",),
        9,
        {
            "qwen3_vit_88m": {"img_size": 64, "pos_embed_grid_size": 4, **TINY},
            "qwen3_vit_88m_merge": {"img_size": 64, "pos_embed_grid_size": 3, **TINY},
            "qwen3_vit_88m_enc": {"img_size": (64, 96), "pos_embed_grid_size": 3, "out_features": 32, **TINY},
        },
    ),
    "gemma4": Family(
        ("gemma4_vit",),
        4,
        {
            "gemma4_vit_167m": {
                "img_size": 64,
                "position_embedding_size": 8,
                "head_dim": 16,
                "intermediate_size": 64,
                **TINY,
            },
            "gemma4_vit_570m": {
                "img_size": (48, 96),
                "position_embedding_size": 8,
                "head_dim": 16,
                "num_kv_heads": 1,
                "intermediate_size": 64,
                "encoder_pool": "soft",
                "use_clipped_linears": True,
                **TINY,
            },
            "gemma4_vit_570m_enc": {
                "img_size": (96, 48),
                "position_embedding_size": 8,
                "head_dim": 16,
                "intermediate_size": 64,
                **TINY,
            },
        },
        arguments={"depth": 2, "img_size": 96, "position_embedding_size": 64},
    ),
    "naflex": Family(
        ("naflexvit",),
        14,
        {
            "naflexvit_base_patch16_gap": {"img_size": 64, **TINY},
            "naflexvit_base_patch16_map": {
                "img_size": (48, 64),
                "rope_type": "mixed",
                "pos_embed": "factorized",
                **TINY,
            },
            "naflexvit_base_patch16_siglip": {
                "img_size": 64,
                "rope_type": "axial",
                "class_token": True,
                "global_pool": "token",
                **TINY,
            },
        },
    ),
    "hiera": Family(
        ("hiera",),
        8,
        {
            "hiera_tiny_224": {"img_size": 64, "embed_dim": 16, "stages": (1, 1, 4, 2)},
            "hiera_base_abswin_256": {"img_size": (64, 96), "embed_dim": 16, "stages": (1, 2, 4, 1)},
        },
        arguments={"stages": (1, 1, 4, 1)},
    ),
    "hybrid": Family(
        ("vision_transformer_hybrid",),
        14,
        {"vit_tiny_r_s16_p8_224": {"img_size": 128, "depth": 3, "embed_dim": 48, "num_heads": 3}},
    ),
    "video": Family(
        ("space_time",),
        5,
        {
            "videomae_small_patch16_224": {"img_size": (48, 64), "num_frames": 6, **TINY},
            "vivit_base_patch16x2_224": {"img_size": 32, "num_frames": 8, **TINY},
        },
    ),
    "vitamin": Family(("vitamin",), 13, {"vitamin_small_224": {"img_size": 64, "depth": 2, "mlp_ratio": 1}}, slow=True),
}
SMALL = {name: (family, args) for family in FAMILIES.values() for name, args in family.small.items()}
# An export takes seconds: those that differ in what they make of positions, and one or two of each other family. Of
# Gemma 4 torch's exporter (2.14) writes no valid ONNX, dense or reduced.
TABLES = ("vit_small_patch16_rope_mixed_ape_224", "vit_small_patch16_dinov3_qkvb")
CAPTURED = (*TABLES, "eva02_tiny_patch14_224", "beitv2_base_patch16_224", "vit_relpos_small_patch16_224", "convit_tiny",
            "cait_xxs24_224", "deepseek_vit_412m_align", "qwen3_vit_88m_merge", "naflexvit_base_patch16_siglip",
            "vit_tiny_r_s16_p8_224", "hiera_tiny_224")  # fmt: skip
# What follows the blocks, or what they share, is another in each of these.
SEARCHED = ("vit_small_patch16_rope_mixed_ape_224", "beitv2_base_patch16_224", "convit_tiny", "cait_xxs24_224",
            "qwen3_vit_88m_merge", "gemma4_vit_570m")  # fmt: skip
EVERY_SMALL = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if row.slow else []) for name, (row, _) in SMALL.items()]
)
SOME_QUICKLY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SEARCHED else [pytest.mark.slow]) for name in SMALL]
)
NAMES = {name: family for family in FAMILIES.values() for name in timm.list_models(module=list(family.modules))}


def arguments(name: str) -> dict[str, Any]:
    """What makes a small model; an encoder alone has no classes."""
    return {**({} if name.endswith("_enc") else {"num_classes": 10}), **SMALL[name][1]}


def small_model(name: str) -> Any:
    """A small model whose every part does something, whatever timm starts it from, so that no error hides."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments(name)).eval()
    scales = {id(module.gamma) for module in model.modules() if isinstance(module, LayerScale)}
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if id(parameter) in scales or label.rpartition(".")[2] in ("gamma_1", "gamma_2"):
                nn.init.uniform_(parameter, 0.8, 1.2)
            elif label.endswith("weight") and parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            elif "rope" not in label:
                parameter.normal_(std=0.5)
    return model


def images(model: Any, batch: int = 3) -> Tensor:
    shape = preprocessing_of(model).input_shape
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))


def reducing(model: nn.Module, method: str = "bat", keep: float = 0.6) -> CompressedModel:
    """Every block but the last reduces."""
    return compress(model, keep=keep, layers=range(1, len(adapter_for(model).blocks(model))), method=method)


def in_halves(loop: BlockLoop, number: int, tokens: Tokens) -> Tokens:
    """A block by the reducing path, with nothing removed, and what travels made anew behind it."""
    tokens = loop.adapter.entering(loop.model, number, tokens)
    half = loop.stage_input(number, replace(loop.weighed(tokens), bias=tokens.bias))
    row = half.attention.class_attention()
    assert row.shape == (len(row), tokens.count) and (row >= 0).all() and (row.sum(1) > 0).all()
    assert half.attention.keys().shape[:2] == row.shape
    return loop.mlp_half(number, half.tokens)


def test_all_names_are_there() -> None:
    for family in FAMILIES.values():
        assert set(family.modules) <= {module for modules in supported_modules().values() for module in modules}
        assert len(timm.list_models(module=list(family.modules))) >= family.names


@EVERY_SMALL
def test_keep_one_is_timm_bit_for_bit(name: str) -> None:
    model = small_model(name)
    with torch.no_grad():
        assert torch.equal(compress(model, keep=1.0).eval()(images(model)), model(images(model)))


@EVERY_SMALL
def test_the_loop_with_nothing_removed_is_the_model(name: str) -> None:
    model = small_model(name)
    loop, pixels = compress(model, keep=1.0).loop, images(model)
    with torch.no_grad():
        tokens = loop.embed(pixels)
        whole = loop.run(tokens, ())
        torch.testing.assert_close(loop.head(whole), model(pixels), rtol=1e-5, atol=1e-5)
        halves = tokens
        for number in range(1, loop.depth + 1):
            halves = in_halves(loop, number, halves)
        halves = loop.adapter.leaving(model, halves)
        scale = float(whole.features.abs().max())
        torch.testing.assert_close(halves.features / scale, whole.features / scale, rtol=0, atol=1e-5)
    assert (whole.image - tokens.image).abs().mean() > 0.05, "the blocks do too little for a test"


@EVERY_SMALL
def test_every_block_in_halves_is_the_block(name: str) -> None:
    model = small_model(name)
    loop = compress(model, keep=1.0).loop
    with torch.no_grad():
        tokens = loop.embed(images(model))
        sizes = torch.rand(3, tokens.count, generator=torch.Generator().manual_seed(2)) + 1
        tokens = replace(tokens, sizes=sizes, bias=attention_bias(replace(tokens, sizes=sizes), True))
        for number in range(1, loop.depth + 1):
            whole = loop.step(number, tokens)
            scale = float(whole.features.abs().max())
            halves = in_halves(loop, number, tokens).features
            torch.testing.assert_close(halves / scale, whole.features / scale, rtol=0, atol=1e-5)
            tokens = whole


@EVERY_SMALL
def test_the_head_with_every_token_once_is_timms(name: str) -> None:
    model = small_model(name)
    loop, pixels = compress(model, keep=1.0).loop, images(model)
    with torch.no_grad():
        tokens = loop.run(loop.embed(pixels), ())
        ones = loop.weighed(replace(tokens, sizes=torch.ones(3, tokens.count)))
        torch.testing.assert_close(loop.head(ones), model(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["bat", "tome"])
@EVERY_SMALL
def test_an_image_has_the_same_logits_alone_and_in_any_batch(name: str, method: str) -> None:
    model = small_model(name)
    compressed, pixels = reducing(model, method).eval(), images(model)
    with torch.no_grad():
        logits = compressed(pixels)
        assert (logits - model(pixels)).abs().max() > 1e-3, "nothing was reduced"
        torch.testing.assert_close(compressed(pixels.flip(0)).flip(0), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compressed(pixels[1:2]), logits[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@EVERY_SMALL
def test_the_closed_form_is_what_fvcore_counts(name: str) -> None:
    model = small_model(name)
    for compressed in (reducing(model, "tome"), model):
        counted = count_macs(compressed, preprocessing_of(model).input_shape)
        assert sum(row.macs for row in predicted_macs(compressed)) == counted.total
        assert not counted.uncounted


@SOME_QUICKLY
def test_features_and_pictures(name: str) -> None:
    model = small_model(name)
    compressed, pixels = reducing(model).eval(), images(model)
    grid = compressed.adapter.grid_of(model, pixels)
    with torch.no_grad():
        maps = tokencut.features_only(compressed, out_indices=2)(pixels)
        dense = tokencut.features_only(compress(model, keep=1.0), out_indices=2)(pixels)
        expected = model.forward_intermediates(pixels, indices=2, intermediates_only=True)
    assert [each.shape for each in maps] == [each.shape for each in expected]
    if not compressed.adapter.runs_inside:  # which has a map for each stage of blocks
        width = compressed.adapter.cost(model).blocks[0].width
        assert [tuple(each.shape) for each in maps] == [(3, width, *grid)] * 2
    assert all(torch.equal(one, other) for one, other in zip(dense, expected, strict=True))
    assert draw(compressed, pixels.clamp(0, 1).mul(255).byte(), device="cpu").views


@EVERY_SMALL
def test_a_training_step_reaches_every_weight(name: str) -> None:
    """Every weight that it reaches in timm's model, with activations kept or not."""
    model = small_model(name).train()
    model(images(model)).square().sum().backward()
    reached = {label for label, weight in model.named_parameters() if _has_gradient(weight)}
    compressed = reducing(model).train()
    compressed.zero_grad()
    if SMALL[name][0].checkpoints:
        compressed.set_grad_checkpointing()
    assert compressed.grad_checkpointing == SMALL[name][0].checkpoints
    compressed(images(model)).square().sum().backward()
    assert len(reached) > 20
    assert not reached - {label for label, weight in compressed.model.named_parameters() if _has_gradient(weight)}


def _has_gradient(weight: nn.Parameter) -> bool:
    return weight.grad is not None and bool(weight.grad.abs().sum() > 0) and bool(weight.grad.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_measures_schedules_and_times_parts(name: str) -> None:
    model = small_model(name)
    compressed, pixels = reducing(model, "tome").eval(), images(model)
    tokens, left = compressed.recipe.tokens, {plan.block: plan.tokens_out for plan in compressed.recipe.stages}
    counts = tuple(tokens := left.get(number, tokens) for number in range(1, compressed.loop.depth + 1))
    outcome = Probe(compressed, [pixels], None).measure(counts)
    with torch.no_grad():
        dense, reduced = (each(pixels).log_softmax(1).double() for each in (model, compressed))
    expected = (dense.exp() * (dense - reduced)).sum(1)
    assert outcome is not None and expected.min() > 1e-6
    torch.testing.assert_close(outcome.divergence, expected, rtol=1e-3, atol=1e-6)
    table = latency_table(compressed, Bench(compressed, batch_size=2, device=torch.device("cpu")), rounds=3,
                          max_seconds=0.01)  # fmt: skip
    assert len(table.blocks) == compressed.loop.depth


@SOME_QUICKLY
def test_a_file_holds_all_of_it(name: str, tmp_path: Path) -> None:
    model = small_model(name)
    compressed, path = reducing(model).eval(), tmp_path / "m.safetensors"
    tokencut.save(compressed, path)
    with torch.no_grad():
        assert torch.equal(tokencut.load(path)(images(model)), compressed(images(model)))
        again = timm.create_model(name, checkpoint_path=str(path), **arguments(name)).eval()
        assert torch.equal(again(images(model)), model(images(model)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTURED)
def test_it_is_captured_in_one_graph(name: str, tmp_path: Path) -> None:
    """By torch.compile without a break, and by torch.export and ONNX for any batch, without a branch."""
    model = small_model(name)
    compressed, pixels = reducing(model, "tome").eval(), images(model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(compressed, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(pixels), compressed(pixels), rtol=1e-4, atol=1e-4)
    report = export_model(compressed, tmp_path / "m.onnx", limit=3)
    assert report.info.batch_size is None and report.agreement.to_dict()["images"] == 3
    graph = onnx.load(report.output).graph
    assert not {node.op_type for node in graph.node} & {"If", "Loop", "Range"}
    if name not in TABLES:
        return
    # A table that does not depend on images is a constant; taking it apart is all that is left of it.
    depends = {value.name for value in graph.input}
    for node in graph.node:
        if depends.intersection(node.input):
            depends.update(node.output)
        else:
            assert node.op_type in ("Split", "Slice"), f"{node.op_type} works on constants"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_name_compresses_and_runs(name: str) -> None:
    arguments = dict(NAMES[name].arguments)
    with torch.device("meta"):
        if "sapiens2" in name:  # which has one number a block
            arguments["num_kv_heads"] = 4
        model = timm.create_model(name, pretrained=False, **arguments)
    compressed = compress(model, keep=0.5).eval()
    pixels = torch.empty(2, *preprocessing_of(model).input_shape, device="meta")
    logits, traces = compressed.trace(pixels)
    assert traces[-2].tokens.count == compressed.recipe.stages[-1].tokens_out < compressed.recipe.tokens
    assert logits.shape == model(pixels).shape
