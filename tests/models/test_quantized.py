"""Weights of eight bits: what they are, that a file keeps them to the bit, and what cannot be done with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from model_files import metadata_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokencut
from tokencut.errors import ArtifactError, ModelError, UsageError
from tokencut.model import CompressedModel, compress
from tokencut.models import artifact
from tokencut.models.finite import not_finite_in
from tokencut.models.quantized import KINDS
from tokencut.models.quantized_linear import QuantizedLinear
from tokencut.runtime.devices import inference_state
from tokencut.runtime.resume import weights_digest

LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def compressed(name: str = "test_vit", **args: Any) -> CompressedModel:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **{"img_size": 64, "num_classes": 5, **args}).eval()
    return compress(model, keep=0.5, layers=[2])


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_the_linear_layers_of_blocks_are_quantised_and_nothing_else(kind: str) -> None:
    model = compressed()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    quantized = tokencut.quantize(model, kind)
    layers = {name: part for name, part in quantized.named_modules() if isinstance(part, QuantizedLinear)}
    assert set(layers) == {f"model.blocks.{block}.{layer}" for block in range(6) for layer in LINEAR}
    for name, weight in quantized.named_parameters():
        assert name.endswith(".numbers") or torch.equal(weight, before[name])
    for name, layer in layers.items():
        numbers, scale, wanted = layer.numbers.float(), layer.scale, before[f"{name}.weight"]
        assert layer.numbers.dtype == KINDS[kind] and scale.shape == (wanted.shape[0] if kind == "int8" else 1, 1)
        assert torch.equal(layer.weight, numbers * scale)
        # int8: off by half a step at most. e4m3 has three bits behind the leading one: off by a sixteenth, or half its
        # smallest step, 2^-9.
        off, step = (numbers * scale - wanted).abs(), scale * (1 if kind == "int8" else 2**-9)
        assert bool((off <= torch.maximum(step / 2, wanted.abs() / 16 if kind == "fp8" else step / 2) * 1.01).all())
        assert bool((numbers.abs().amax(1) == 127).all()) if kind == "int8" else float(numbers.abs().max()) == 448
        assert not layer.numbers.requires_grad
    # The model that was given is as it was, and the other computes nearly the same.
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    wanted, found = model(images()), quantized(images())
    assert 0 < float((wanted - found).abs().max()) < 0.15 * float(wanted.std())
    assert quantized.recipe == model.recipe


@torch.no_grad()
def test_a_file_holds_them_to_the_bit(kind: str, tmp_path: Path) -> None:
    model, path = tokencut.quantize(compressed(), kind), tmp_path / "q.safetensors"
    written = tokencut.save(model, path, measured={"top1": 50.0})
    assert (written.quantized, written.dtype) == (kind, "+".join(sorted(("fp32", kind))))
    assert artifact.read_info(path) == written
    loaded = tokencut.load(path)
    assert torch.equal(loaded(images()), model(images()))
    again = tmp_path / "again.safetensors"
    tokencut.save(loaded, again, measured={"top1": 50.0})
    assert again.read_bytes() == path.read_bytes()
    plain = tmp_path / "plain.safetensors"
    tokencut.save(compressed(), plain)
    assert path.stat().st_size < 0.45 * plain.stat().st_size  # patches and positions are a third of so small a model
    names = set(load_file(path))
    assert {name for name in names if not name.startswith("tokencut.")} < set(load_file(plain))
    assert f"tokencut.quantized.blocks.0.{LINEAR[0]}.weight" in names
    assert not_finite_in(path) == []


def test_timm_takes_no_such_file_for_another_model(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "q.safetensors"
    info = tokencut.save(tokencut.quantize(compressed(), kind), path)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"blocks\.0\.attn\.qkv\.weight\""):
        timm.create_model(info.architecture, checkpoint_path=path, **info.model_args)


def flip(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return damage


def refused(damage: Callable[[dict[str, Tensor]], Any], kind: str, path: Path) -> str:
    """What is said of a file that was damaged, in one line."""
    tokencut.save(tokencut.quantize(compressed(), kind), path)
    tensors, metadata = load_file(path), metadata_of(path)
    damage(tensors)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ArtifactError) as caught:
        tokencut.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NUMBERS, SCALE = (f"tokencut.{part}.blocks.0.attn.qkv.weight" for part in ("quantized", "scale"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip(NUMBERS, lambda t: t.float()), "of another type: blocks.0.attn.qkv.weight"),
        (flip(SCALE, lambda t: t.half()), "of another type: blocks.0.attn.qkv.weight"),
        (flip(SCALE, lambda t: t[:, 0]), "1 of another shape: " + SCALE),
        (flip(NUMBERS, lambda t: t[1:]), "1 of another shape: " + NUMBERS),
        (flip(SCALE, lambda t: t * float("nan")), "1 with numbers that are not finite: blocks.0.attn.qkv.weight"),
        (lambda tensors: tensors.pop(SCALE), "1 missing: " + SCALE),
        (lambda tensors: tensors.pop(NUMBERS), "1 missing: blocks.0.attn.qkv.weight; 1 unexpected: " + SCALE),
        (
            lambda tensors: tensors.update({"tokencut.quantized.pos_embed": tensors.pop("pos_embed")}),
            "1 missing: pos_embed; 1 unexpected: tokencut.quantized.pos_embed",
        ),
    ],
)
def test_damaged_numbers_are_refused(damage: Callable[[dict[str, Tensor]], Any], says: str, tmp_path: Path) -> None:
    assert says in refused(damage, "int8", tmp_path / "q.safetensors")


@pytest.mark.parametrize(("said", "says"), [('"fp8"', "where its description says fp8"), ('"int4"', "int8 or fp8")])
def test_a_description_of_other_weights_is_refused(said: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    tokencut.save(tokencut.quantize(compressed(), "int8"), path)
    metadata = metadata_of(path)
    save_file(
        load_file(path),
        path,
        metadata={"tokencut": metadata["tokencut"].replace('"quantized":"int8"', f'"quantized":{said}')},
    )
    with pytest.raises(ArtifactError, match=says):
        tokencut.load(path)


def test_a_number_of_eight_bits_that_is_none_is_found(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    tokencut.save(tokencut.quantize(compressed(), "fp8"), path)
    tensors, metadata = load_file(path), metadata_of(path)
    bits = tensors[NUMBERS].view(torch.uint8)
    bits[0, 0], bits[1, 1] = 0xFF, 0x7E  # a NaN, and the largest number there is, 448
    save_file(tensors, path, metadata=metadata)
    assert not_finite_in(path) == [NUMBERS]
    with pytest.raises(ArtifactError, match="not finite: blocks.0.attn.qkv.weight"):
        tokencut.load(path)


@pytest.mark.slow
@torch.no_grad()
def test_a_model_is_left_as_it_was_and_may_be_cast_copied_and_counted(kind: str) -> None:
    plain = compressed()
    model = tokencut.quantize(plain, kind)
    before, digest = model(images()), weights_digest(model)
    with inference_state(model, torch.device("cpu"), torch.bfloat16):
        assert model(images().bfloat16()).dtype == torch.bfloat16
    assert torch.equal(model(images()), before)
    assert torch.equal(copy.deepcopy(model)(images()), before)
    assert weights_digest(model) == digest != weights_digest(plain)
    counted, expected = tokencut.profile(model, latency=False), tokencut.profile(plain, latency=False)
    assert (counted.compressed, counted.dense, counted.notes) == (expected.compressed, expected.dense, expected.notes)
    assert torch.equal(compress(model.model, keep=0.5, layers=[2])(images()), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_and_of_next_to_nothing_are_numbers(kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(3))
    weight[3], weight[5] = 0, weight[5] * 1e-8
    layer = nn.Linear(16, 32, dtype=torch.float32)
    layer.weight.data = weight
    model = compressed()
    model.model.blocks[0].attn.proj = layer
    quantized = tokencut.quantize(model, kind).model.blocks[0].attn.proj
    tokens = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))
    tokens[1, 2] = 0
    found = quantized.to(dtype)(tokens.to(dtype)).detach().float()
    wanted = layer(tokens).detach()
    assert float((found - wanted).abs().max()) < 0.1 * float(wanted.std()) * (4 if kind == "fp8" else 1)
    assert float((found[..., 3] - layer.bias.detach()[3]).abs().max()) < 1e-2
    assert torch.equal(found[1, 2], layer.bias.detach().to(dtype).float())


@torch.no_grad()
def test_a_bias_given_by_name_counts(kind: str) -> None:
    model = compressed("beit_base_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3)
    bias = model.model.blocks[0].attn.v_bias
    bias.normal_()
    quantized = tokencut.quantize(model, kind)
    attention, plain = quantized.model.blocks[0].attn, model.model.blocks[0].attn
    assert isinstance(attention.qkv, QuantizedLinear)
    tokens = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(2))
    wanted, found = plain(tokens), attention(tokens)
    bias.zero_()
    lost = plain(tokens)
    assert float((found - wanted).abs().mean()) < 0.2 * float((lost - wanted).abs().mean())


def test_others_quantisation_is_stored_if_it_is_of_the_same_kind(tmp_path: Path) -> None:
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import (
        Float8Tensor,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    whole, path = compressed(), tmp_path / "theirs.safetensors"
    quantize_(
        whole,
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        filter_fn=lambda part, name: isinstance(part, nn.Linear) and ".blocks." in name,
    )
    # What torchao's configuration for fp8 makes, which asks for a GPU.
    rows, config = PerRow(), Float8MMConfig(use_fast_accum=True)
    by_rows = compressed()
    for name, part in by_rows.named_modules():
        if isinstance(part, nn.Linear) and ".blocks." in name:
            weight = Float8Tensor.from_hp(
                part.weight.detach(), granularity=rows, mm_config=config,
                act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=rows),
            )  # fmt: skip
            part.weight = nn.Parameter(weight, requires_grad=False)
    for theirs, kind in ((whole, "int8"), (by_rows, "fp8")):
        assert tokencut.save(theirs, path, force=True).quantized == kind
        loaded = tokencut.load(path)
        layers = [part for part in loaded.modules() if isinstance(part, QuantizedLinear)]
        assert len(layers) == 24 and all(part.token_scale is None for part in layers)
        weight = theirs.model.blocks[1].mlp.fc1.weight
        assert torch.equal(loaded.model.blocks[1].mlp.fc1.numbers.float(), weight.qdata.float())
        torch.testing.assert_close(loaded.model.blocks[1].mlp.fc1.weight, weight.dequantize(), rtol=1e-6, atol=0)
        with torch.no_grad():
            wanted, found, exact = theirs(images()), loaded(images()), compressed()(images())
        assert float((found - wanted).abs().max()) < 2 * float((wanted - exact).abs().max())

    other = compressed()
    quantize_(other, Int8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(ArtifactError) as caught:
        tokencut.save(other, tmp_path / "other.safetensors")
    assert str(caught.value) == (
        "no file can hold blocks.0.attn.qkv.weight, which is of class Int8Tensor; quantise the model that it was made "
        "from by `tokencut.quantize(model, 'int8')` or 'fp8', or save that"
    )
    with pytest.raises(ModelError, match="only plain ones can be exported; do that with the model"):
        tokencut.export_model(other, tmp_path / "other.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.safetensors"]


TOKEN_SCALE = "tokencut.token_scale.blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda tensors: tensors.pop(TOKEN_SCALE), "1 of another shape: " + SCALE),
        (flip(TOKEN_SCALE, lambda t: t[None]), "1 of another shape: " + TOKEN_SCALE),
        (flip(TOKEN_SCALE, lambda t: t.half()), "of another type: blocks.0.attn.qkv.weight"),
        (flip(TOKEN_SCALE, lambda t: 0 * t), TOKEN_SCALE + " is 0, and nothing can be divided by that"),
        (flip(TOKEN_SCALE, lambda t: t * float("nan")), TOKEN_SCALE + " is nan, and nothing can be divided by that"),
    ],
)
def test_a_damaged_scale_of_tokens_is_refused(
    damage: Callable[[dict[str, Tensor]], Any], says: str, tmp_path: Path
) -> None:
    assert says in refused(damage, "fp8", tmp_path / "q.safetensors")


@torch.no_grad()
def test_numbers_of_eight_bits_are_the_same_whatever_the_scale_of_a_model() -> None:
    plain, scaled = compressed(), compressed()
    for block in scaled.model.blocks:
        block.norm1.weight *= 64
        block.norm1.bias *= 64
        block.attn.qkv.weight /= 64
    first, second = (tokencut.quantize(model, "fp8").model.blocks[0].attn.qkv for model in (plain, scaled))
    assert torch.equal(first.numbers.float(), second.numbers.float())
    assert float(second.token_scale) == 64 * float(first.token_scale)
    assert float(second.scale) == float(first.scale) / 64


@torch.no_grad()
def test_hooks_and_bias_of_a_layer_stay(kind: str) -> None:
    model, seen = compressed(), []
    model.model.blocks[1].mlp.fc1.register_forward_hook(lambda layer, given, out: seen.append(type(layer)))
    quantized = tokencut.quantize(model, kind)
    quantized(images())
    assert seen == [QuantizedLinear]
    assert torch.equal(quantized.model.blocks[1].mlp.fc1.bias, model.model.blocks[1].mlp.fc1.bias)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_computes_the_same(kind: str) -> None:
    model = tokencut.quantize(compressed(), kind)
    eager, exact = model(images()), compressed()(images())
    found = torch.compile(model, fullgraph=True, dynamic=False)(images())
    # What is fused is rounded less often, and a number at the edge falls to the other side.
    assert float((found - eager).abs().max()) < float((eager - exact).abs().max())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_packed_weights_of_torch_are_refused_too(tmp_path: Path) -> None:
    packed = torch.ao.quantization.quantize_dynamic(compressed(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ArtifactError, match="no file can hold blocks.0.attn.qkv._packed_params.dtype"):
        tokencut.save(packed, tmp_path / "packed.safetensors")
    with pytest.raises(ModelError, match="blocks.0.attn.qkv is of class Linear"):
        tokencut.export_model(packed, tmp_path / "packed.onnx")


def test_what_cannot_be_done_is_said() -> None:
    model = compressed()
    with pytest.raises(UsageError, match="unknown kind of quantised weights 'int4', expected int8 or fp8"):
        tokencut.quantize(model, "int4")
    with pytest.raises(UsageError, match=r"tokencut.compress\(model, keep=0.7\)"):
        tokencut.quantize(model.model, "int8")
    with pytest.raises(ModelError, match="sizes that are multiples of 16"):
        tokencut.quantize(compressed(embed_dim=40, num_heads=2, mlp_ratio=1), "int8")
    quantized = tokencut.quantize(model, "int8")
    with pytest.raises(ModelError, match="is of class QuantizedLinear.*only plain ones can be quantised again"):
        tokencut.quantize(quantized, "fp8")
    with pytest.raises(ModelError, match="only plain ones can be trained"):
        tokencut.finetune(quantized, "digits")
