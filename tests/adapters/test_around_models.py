"""What people do to a model and around it: hooks, patched forwards, wrappers, derived classes, at every keep rate."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_families
import timm
import torch
from test_vit import SMALL, images, small_model
from timm.layers import Attention, set_fused_attn
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel

from tokencut.adapters import columnar
from tokencut.cost import total
from tokencut.errors import ModelError
from tokencut.model import CompressedModel, compress, predicted_macs
from tokencut.profiling.counting import count_macs


def vit(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SIZES, **arguments}).eval()


SIZES = {"img_size": 64, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def called(model: CompressedModel, run: Callable[[Tensor], Tensor], pixels: Tensor) -> list[str]:
    """The modules of timm's model that a forward calls, by name, each as often as it is called."""
    names = {id(part): name for name, part in model.model.named_modules()}
    seen: list[str] = []
    hook = register_module_forward_hook(lambda part, *_: seen.append(names.get(id(part), "")) or None)
    try:
        with torch.no_grad():
            run(pixels)
    finally:
        hook.remove()
    return sorted(name for name in seen if name)


OTHERS = (
    "eva02_base_patch14_224",
    "vit_small_patch16_dinov3_qkvb",
    "beitv2_base_patch16_224",
    "vit_srelpos_small_patch16_224",
    "convit_tiny",
    "cait_xxs24_224",
    "naflexvit_base_patch16_map",
    "vit_tiny_r_s16_p8_224",
)


@pytest.mark.parametrize("name", [*SMALL, *OTHERS])
def test_a_compressed_model_calls_the_modules_that_timm_calls(name: str) -> None:
    """So a hook on any of them runs: merged tokens, and so masks, in the blocks behind the stage included."""
    model = small_model(name) if name in SMALL else test_families.small_model(name)
    compressed = compress(model, keep=0.5, layers=[2], method="tome").eval()
    pixels = images(model) if name in SMALL else test_families.images(model)
    dense = called(compressed, compressed.model, pixels)
    assert called(compressed, compressed, pixels) == dense
    assert called(compressed, lambda pixels: compressed.trace(pixels)[0], pixels) == dense
    assert "blocks.1" in dense and ("blocks" in dense or name in OTHERS)


@pytest.mark.parametrize("name", ["test_vit", "vit_base_patch16_18x2_224", "eva02_base_patch14_224"])
def test_blocks_behind_a_stage_call_them_too_where_a_kernel_takes_the_bias(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU in half precision, where whole blocks run in halves."""
    monkeypatch.setattr(columnar, "has_biased_kernel", lambda bias, *tensors: True)
    model = small_model(name) if name in SMALL else test_families.small_model(name)
    compressed = compress(model, keep=0.5, layers=[1], method="tome").eval()
    pixels = images(model) if name in SMALL else test_families.images(model)
    assert called(compressed, compressed, pixels) == called(compressed, compressed.model, pixels)


def test_hooks_on_an_encoder_that_runs_in_parts_are_refused() -> None:
    model = test_families.small_model("qwen3_vit_88m")
    compress(model, keep=0.5)
    model.encoder.register_forward_hook(lambda module, args, output: output)
    for keep in (0.5, 1.0):
        with pytest.raises(ModelError, match="encoder has a hook .* put it on the model itself"):
            compress(model, keep=keep)


INSIDE = ("blocks.1.attn", "blocks.1.mlp", "blocks.1.norm1", "patch_embed")
WHOLE = ("", "blocks", "blocks.1", "blocks.2", "norm")  # where all that an image is passes


@pytest.mark.parametrize("place", INSIDE + WHOLE)
def test_a_hook_that_zeroes_an_output_acts_at_every_keep_rate(place: str) -> None:
    for keep in (1.0, 0.5):
        compressed = compress(vit(), keep=keep, layers=[2]).eval()
        before = compressed(PIXELS)
        compressed.model.get_submodule(place).register_forward_hook(lambda module, args, output: output * 0)
        zeroed = compressed(PIXELS)
        assert (zeroed - before).abs().max() > 1e-3
        hooked = copy.deepcopy(compressed.model)
        if place in WHOLE:  # the same for any image, whatever was kept
            torch.testing.assert_close(zeroed, hooked(PIXELS), rtol=1e-5, atol=1e-5)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's, about gloo
@pytest.mark.usefixtures("one_process")
def test_fsdp_shards_blocks_and_the_compressed_model() -> None:
    plain = compress(vit(), keep=0.5, layers=[2], method="tome").train()
    sharded = copy.deepcopy(plain)
    for part in (sharded.model.blocks[1].attn, *sharded.model.blocks, sharded):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    assert type(sharded.model.blocks[1]).__name__ == "FSDPBlock" and isinstance(sharded, CompressedModel)
    for one, other in zip(gradients(sharded), gradients(plain), strict=True):
        torch.testing.assert_close(one.full_tensor(), other)
    with pytest.raises(ModelError, match="blocks.0 is sharded by fully_shard.*before fully_shard"):
        compress(sharded.model)


@pytest.mark.usefixtures("one_process")
def test_a_model_inside_ddp_is_taken() -> None:
    plain = vit()
    around = DistributedDataParallel(copy.deepcopy(plain))
    assert torch.equal(compress(around, keep=0.5).eval()(PIXELS), compress(plain, keep=0.5).eval()(PIXELS))


def test_hooks_travel_with_the_model_and_see_gradients() -> None:
    model, seen = vit(), []
    model.blocks[1].register_full_backward_hook(lambda module, into, out: seen.append((into[0].shape, out[0].shape)))
    compressed = compress(model, keep=0.5, layers=[2]).train()
    compressed(PIXELS).sum().backward()
    assert seen == [((2, 17, 24), (2, 9, 24))]


def test_hooks_on_attention_weights_see_them_where_attention_is_not_fused() -> None:
    """As timm's AttentionExtract takes them: `set_fused_attn(False)`, and hooks on `attn_drop`."""
    shapes, compressed = [], None
    for name in ("vit_tiny_patch16_224", "vit_dlittle_patch16_reg1_gap_256", "vit_pwee_patch16_reg1_gap_256"):
        set_fused_attn(False)
        try:
            torch.manual_seed(0)
            model = timm.create_model(name, **{**SIZES, "embed_dim": 48}).eval()
        finally:
            set_fused_attn(True)
        compressed = compress(model, keep=0.5, layers=[2], method="tome").eval()
        unseen = compressed(PIXELS)
        for block in compressed.model.blocks:
            layer = getattr(block, "attn", block)
            layer.attn_drop.register_forward_hook(lambda module, args, output: shapes.append(output.shape[-2:]) or None)
        torch.testing.assert_close(compressed(PIXELS), unseen, rtol=1e-5, atol=1e-6)
        assert [rows[0] - model.num_prefix_tokens for rows in shapes] == [16, 16, 8], name
        shapes.clear()


def scaled(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return 2 * type(self).forward(self, x, *args, **kwargs)


@pytest.mark.parametrize("place", ["", "blocks.1", "blocks.1.attn"])
def test_a_patched_forward_is_refused_at_every_keep_rate(place: str) -> None:
    for keep in (1.0, 0.5):
        model = vit()
        compressed = compress(model, keep=keep, layers=[2])
        for patched in (model, compressed.model):
            part = patched.get_submodule(place)
            part.forward = types.MethodType(scaled, part)  # type: ignore[method-assign]
        wanted = (place or "the model") + r" has a forward of its own.*register_forward_hook"
        with pytest.raises(ModelError, match=wanted) as error:
            compress(model, keep=keep, layers=[2])
        assert ("give `layers` without 2" in str(error.value)) == bool(place)
        for run in (compressed, compressed.trace, compressed.forward_intermediates):
            with pytest.raises(ModelError, match=wanted):
                run(PIXELS)


@pytest.mark.parametrize("place", ["blocks.0", "blocks.2.attn", "blocks.1.mlp", "blocks.1.attn.qkv", "head"])
def test_a_patched_forward_runs_where_no_stage_takes_its_place(place: str) -> None:
    compressed = compress(vit(), keep=0.5, layers=[2]).eval()
    before = compressed(PIXELS)
    part = compressed.model.get_submodule(place)
    part.forward = types.MethodType(scaled, part)  # type: ignore[method-assign]
    assert (compressed(PIXELS) - before).abs().max() > 1e-3


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    model(PIXELS).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", CheckpointImpl)
@pytest.mark.parametrize("method", ["bat", "dyvit"])
def test_checkpointed_blocks_have_the_gradients_of_plain_ones(kind: CheckpointImpl, method: str) -> None:
    plain = compress(vit(), keep=0.5, layers=[2], method=method).train()
    wrapped = copy.deepcopy(plain)
    apply_activation_checkpointing(
        wrapped,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, checkpoint_impl=kind),
        check_fn=lambda module: isinstance(module, Block),
    )
    runs = []
    wrapped.model.blocks[1].attn.qkv.register_forward_hook(lambda *_: runs.append(1) and None)
    torch.manual_seed(0)
    expected = gradients(plain)
    torch.manual_seed(0)
    if (method, kind) == ("dyvit", CheckpointImpl.REENTRANT):
        with pytest.raises(ModelError, match="block 2 is checkpointed in torch's reentrant way"):
            gradients(wrapped)
        return
    got = gradients(wrapped)
    assert len(runs) == 2, "the block that reduces is not computed again"
    assert len(got) == len(expected) == len(list(plain.parameters()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_and_models_are_taken() -> None:
    model = vit()
    plain = compress(model, keep=0.5, layers=[2]).eval()
    compiled = compress(torch.compile(model, backend="eager"), keep=0.5, layers=[2]).eval()
    assert torch.equal(compiled(PIXELS), plain(PIXELS)) and type(compiled.model) is VisionTransformer
    assert torch.equal(compress(nn.DataParallel(model), keep=0.5, layers=[2]).eval()(PIXELS), plain(PIXELS))
    assert predicted_macs(torch.compile(plain, backend="eager")) == predicted_macs(plain)
    for number, block in enumerate(plain.model.blocks):
        compiled.model.blocks[number] = torch.compile(block, backend="eager")
    torch.testing.assert_close(compiled(PIXELS), plain(PIXELS))


@pytest.mark.slow
@torch.no_grad()
def test_a_hooked_model_of_derived_classes_compiles_as_a_whole() -> None:
    compressed = compress(Named(**DERIVED), keep=0.5, layers=[2]).eval()
    for place in ("", "blocks.1", "blocks.1.attn"):
        compressed.model.get_submodule(place).register_forward_hook(lambda module, args, output: output * 1.5)
    torch.testing.assert_close(torch.compile(compressed, backend="eager", fullgraph=True)(PIXELS), compressed(PIXELS))


class Named(VisionTransformer):
    """A derived class of the harmless kind: other beginnings, other helpers, the same forward."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.note = "mine"

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def describe(self) -> str:
        return self.note


class OtherPool(Named):
    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x.mean(1)


class NamedBlock(Block):
    pass


class NamedAttention(Attention):
    def describe(self) -> str:
        return "mine"


DERIVED = {**SIZES, "patch_size": 16, "block_fn": NamedBlock, "attn_layer": NamedAttention}


class OtherBlock(Block):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return x


class OtherAttention(Attention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return x


def test_a_derived_class_that_runs_as_timms_is_taken() -> None:
    torch.manual_seed(0)
    mine = Named(**DERIVED).eval()
    theirs = VisionTransformer(patch_size=16, **SIZES).eval()
    theirs.load_state_dict(mine.state_dict())
    compressed = compress(mine, keep=0.5, layers=[2]).eval()
    with torch.no_grad():
        expected = compress(theirs, keep=0.5, layers=[2]).eval()(PIXELS)
        assert torch.equal(compressed(PIXELS), expected)
    assert compressed.model.describe() == "mine" and predicted_macs(mine) == predicted_macs(theirs)


@pytest.mark.parametrize(
    ("kind", "parts", "why"),
    [
        (OtherPool, {}, "OtherPool is derived from VisionTransformer, but has its own pool"),
        (VisionTransformer, {"block_fn": OtherBlock}, "OtherBlock is derived from Block, but has its own forward"),
        (
            VisionTransformer,
            {"attn_layer": OtherAttention},
            "OtherAttention is derived from Attention, but has its own",
        ),
    ],
)
def test_a_derived_class_that_runs_otherwise_is_refused_with_the_reason(
    kind: type[nn.Module], parts: dict[str, Any], why: str
) -> None:
    with pytest.raises(ModelError, match=why):
        compress(kind(patch_size=16, **SIZES, **parts))


class Classifier(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: Classifier(vit()), r"Classifier is something around a model; pass that, `model.encoder`"),
        (lambda: nn.Sequential(nn.Identity(), vit()), r"pass that, `model.get_submodule\('1'\)`"),
        (lambda: torch.optim.swa_utils.AveragedModel(vit()), "pass that, `model.module`"),
        (lambda: Classifier(nn.DataParallel(vit())), "pass that, `model.encoder`"),
        (lambda: timm.create_model("vit_tiny_patch16_224", features_only=True, **NO_HEAD), "tokencut.features_only"),
        (lambda: torch.export.export(vit(), (PIXELS,)).module(), "pass the model that it was made from"),
    ],
)
def test_what_is_around_a_model_is_named_with_what_to_pass(make: Callable[[], nn.Module], wanted: str) -> None:
    with pytest.raises(ModelError, match=wanted):
        compress(make())


NO_HEAD = {name: value for name, value in SIZES.items() if name != "num_classes"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_models_of_peft_are_named_and_what_comes_of_them_is_taken() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], init_lora_weights=False)
    around = peft.get_peft_model(vit(), settings).eval()
    expected = around(PIXELS)
    with pytest.raises(ModelError, match=r"this PeftModel is a model of peft; pass `model.merge_and_unload\(\)`"):
        compress(around)
    compressed = compress(around.merge_and_unload(), keep=1.0).eval()
    torch.testing.assert_close(compressed(PIXELS), expected)
    # The other way round: what compress returns is a module like any other to peft.
    tuned = peft.get_peft_model(compress(vit(), keep=0.5, layers=[2]), settings).train()
    tuned(PIXELS).square().sum().backward()
    learning = {name: weight for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert len(learning) == 3 * 2 * 2 and all(weight.grad.abs().sum() > 0 for weight in learning.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_models_of_transformers_are_named() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, intermediate_size=24))
    with pytest.raises(ModelError, match=r"a model of transformers; write it by `model.save_pretrained\('FOLDER'\)`"):
        compress(theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_closed_form_counts_loras_adapters_as_the_trace_does() -> None:
    peft = pytest.importorskip("peft")
    first = peft.LoraConfig(r=2, target_modules=["qkv", "proj", "fc1", "head"])  # the patch embedding's `proj` as well
    around = peft.get_peft_model(vit(), first)
    inside = around.base_model.model

    def both() -> int:
        for model in (inside, compress(inside, keep=0.5, layers=[2])):
            closed, traced = total(predicted_macs(model)), count_macs(model, (3, 64, 64)).total
            assert closed == traced
        return total(predicted_macs(inside))

    plain = total(predicted_macs(vit()))
    with_first = both()
    around.add_adapter("second", peft.LoraConfig(r=3, target_modules=["fc2"]))
    assert both() == with_first  # not active
    around.set_adapter("second")
    assert plain < both() != with_first
    around.merge_adapter()
    assert both() == plain


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_accelerate_puts_on_a_model_comes_off_as_the_refusal_says() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(vit())
    with pytest.raises(ModelError, match=r"accelerator.unwrap_model\(model, keep_fp32_wrapper=False\)"):
        compress(prepared)
    compressed = compress(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False), keep=0.5).eval()
    assert accelerator.prepare(compressed)(PIXELS).dtype == torch.float32  # what is prepared after compressing runs
    accelerate.hooks.add_hook_to_module(compressed.model.blocks[1].attn, accelerate.hooks.ModelHook())
    with pytest.raises(ModelError, match=r"accelerate.hooks.remove_hook_from_module\(model, recurse=True\)"):
        compressed(PIXELS)
    accelerate.hooks.remove_hook_from_module(compressed.model, recurse=True)
    compressed(PIXELS)
