"""Weights as training programs and other libraries leave them: each opens, or is named for what it is."""

from __future__ import annotations

import argparse
import collections
import functools
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from model_files import Payload, shaken, write_transformers_folder
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tokencut.errors import ModelError
from tokencut.model import compress
from tokencut.models.loading import Loaded, load_model

SIZES: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
NAME = "vit_base_patch16_224"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made()


def made(name: str = NAME, **args: Any) -> Any:
    return shaken(timm.create_model(name, **{**SIZES, **args}))


def load(path: Path, name: str = NAME, *, args: Mapping[str, Any] | None = None, **options: Any) -> Loaded:
    """With the sizes of the tests' models."""
    return load_model(name, checkpoint=path, model_kwargs={**SIZES, **(args or {})}, **options)


def pixels(channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(loaded: Loaded, model: Any) -> None:
    torch.testing.assert_close(loaded.model(pixels()), model(pixels()), atol=1e-5, rtol=1e-5)


def refusal(path: Path, name: str = NAME, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(path, name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Settings(dict[str, Any]):
    """As Lightning's AttributeDict."""


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def lightning(tensors: dict[str, Tensor]) -> Any:
    settings = Settings(root=Path("/data"), args=argparse.Namespace(lr=0.1), pick=functools.partial(max, 1))
    return {
        "epoch": 3, "pytorch-lightning_version": "2.5", "hyper_parameters": settings, "best": np.float64(0.5),
        "state_dict": {**under("model.", tensors), "criterion.weight": torch.ones(5)},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1}]}], "loops": collections.deque([1]),
    }  # fmt: skip


TAKEN = "has the model under '{}', which is taken off"
CONTENTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "lightning": (lightning, TAKEN.format("model.")),
    "compiled": (lambda t: under("_orig_mod.", t), ""),
    "compiled in parallel": (lambda t: {"model": under("module._orig_mod.", t), "optimizer": {"state": {}}}, ""),
    "fsdp, compiled inside": (
        lambda t: {"state_dict": {f"_fsdp_wrapped_module.{k.replace('blocks.1.', 'blocks.1._orig_mod.')}": v
                                  for k, v in t.items()}}, ""),
    "average": (lambda t: {"state_dict": {}, "state_dict_ema": under("module.", t)}, ""),
    "swa": (lambda t: {**under("module.", t), "n_averaged": torch.tensor(3)}, ""),
    "teacher": (
        lambda t: {"student": under("module.backbone.", {k: 0 * v for k, v in t.items()}),
                   "teacher": {**under("backbone.", t), "dino_head.mlp.0.weight": torch.ones(2)}, "epoch": 9},
        "taking 'teacher' of {}, which holds student too"),
    "moco": (lambda t: {**under("encoder_q.", t), **under("encoder_k.", {k: 0 * v for k, v in t.items()})},
             TAKEN.format("encoder_q.")),
    "an average beside": (lambda t: {**under("net.", {k: 0 * v for k, v in t.items()}), **under("net_ema.", t)},
                          TAKEN.format("net_ema.")),
    "whole": (lambda t: whole(t), ""),
    "a list of settings beside": (lambda t: {"weights": dict(t), "classes": ["a", "b"], "step": torch.tensor(1)}, ""),
    "one name of its own": (lambda t: {"my_vit": dict(t), "note": "x"}, ""),
    "nested": (lambda t: {"checkpoint": {"model": dict(t)}}, ""),
}  # fmt: skip


def whole(tensors: dict[str, Tensor]) -> nn.Module:
    model = made()
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("kind", CONTENTS)
def test_whatever_a_training_program_wrote(kind: str, model: nn.Module, tmp_path: Path) -> None:
    content, note = CONTENTS[kind]
    torch.save(content(dict(model.state_dict())), tmp_path / "run.ckpt")
    loaded = load(tmp_path / "run.ckpt")
    assert_same(loaded, model)
    assert not note or any(note.format(tmp_path / "run.ckpt") in text for text in loaded.notes), loaded.notes


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model.", "net.backbone."])
def test_prefixes_in_every_format(prefix: str, model: nn.Module, tmp_path: Path) -> None:
    tensors = under(prefix, model.state_dict())
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pth", "old.pth"):
        assert_same(load(tmp_path / name), model)


@pytest.mark.parametrize("method", ["bat", "dyvit"])
def test_a_compressed_models_own_state_dict(method: str, model: nn.Module, tmp_path: Path) -> None:
    torch.save(compress(model, keep=0.5, layers=[2], method=method).state_dict(), tmp_path / "mine.pth")
    loaded = load(tmp_path / "mine.pth")
    assert_same(loaded, model)
    assert any(TAKEN.format("model.") in text for text in loaded.notes)
    assert any("tensors beside the model, stages.2.learned" in text for text in loaded.notes) == (method == "dyvit")


def test_nothing_of_a_file_is_run(model: nn.Module, tmp_path: Path) -> None:
    content = {"state_dict": model.state_dict(), "hook": Payload(tmp_path / "ran")}
    for protocol in (2, 4):
        torch.save(content, tmp_path / "a.pth", pickle_protocol=protocol)
        assert_same(load(tmp_path / "a.pth"), model)
    assert not (tmp_path / "ran").exists()


class Setting:
    """Tries to set an attribute of what reads it."""

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (), (None, {"__defaults__": (1,)})


def test_nothing_of_the_reader_is_changed(tmp_path: Path) -> None:
    torch.save({"a.b": torch.ones(1), "x": Setting()}, tmp_path / "a.pth")
    assert "is not a file of weights that can be read without running code from it" in refusal(tmp_path / "a.pth")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)


def test_another_size_of_image(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth", args={"img_size": 64})
    assert "positions are resized from 5 to 17" in loaded.notes
    expected = resample_abs_pos_embed(model.pos_embed.detach(), (4, 4), num_prefix_tokens=1)
    torch.testing.assert_close(loaded.model.pos_embed.detach(), expected)
    smaller = load(tmp_path / "a.pth", args={"patch_size": 8, "img_size": 16})
    assert "the patch embedding is resized from 16 to 8 px" in smaller.notes


def test_other_channels(model: nn.Module, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", args={"in_chans": 1})
    assert "patch_embed.proj.weight is adapted from 3 channels to 1" in loaded.notes
    weight = model.patch_embed.proj.weight.detach().sum(1, keepdim=True)
    torch.testing.assert_close(loaded.model.patch_embed.proj.weight.detach(), weight)
    assert load(tmp_path / "a.safetensors", args={"in_chans": 4}).model(pixels(4)).shape == (2, 5)


def test_heads(model: nn.Module, tmp_path: Path) -> None:
    path, bare = tmp_path / "a.safetensors", tmp_path / "bare.safetensors"
    tensors = dict(model.state_dict())
    save_file(tensors, path)
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("head")}, bare)
    assert refusal(path, args={"num_classes": 7}).endswith("its head has 5 classes: type `num_classes=5`")
    assert refusal(bare).endswith(
        "2 missing: head.weight, head.bias; it has no head: type `num_classes=0`, or train one "
        "(`epochs=5`, `train_data='DIR'`)"
    )
    for file in (path, bare):
        loaded = load(file, args={"num_classes": 7}, to_be_trained=True)
        assert loaded.new_head and loaded.model(pixels()).shape == (2, 7)
        assert "the head of 7 classes is new: its weights are random until it is trained" in loaded.notes
        assert load(file, args={"num_classes": 0}).model(pixels()).shape == (2, 24)
    same = load(path, to_be_trained=True)
    assert not same.new_head
    assert_same(same, model)


def dinov2(tensors: Mapping[str, Tensor], registers: bool) -> dict[str, Tensor]:
    """As Facebook's files have them: register tokens before the positions, a mask token, blocks in chunks."""
    found = {}
    for name, tensor in tensors.items():
        number = name.split(".")[1] if name.startswith("blocks.") else ""
        found[name.replace(f"blocks.{number}.", f"blocks.{int(number) // 2}.{number}.") if number else name] = tensor
    if registers:
        found["register_tokens"] = found.pop("reg_token")
        found["pos_embed"] = torch.cat((torch.ones(1, 1, 24), found["pos_embed"]), 1)
        found["cls_token"] = found["cls_token"] - 1
    return {**found, "mask_token": torch.zeros(1, 24)}


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2s_originals(registers: bool, tmp_path: Path) -> None:
    name = "vit_base_patch14_reg4_dinov2" if registers else "vit_base_patch14_dinov2"
    args = {"num_classes": 0, "img_size": 28}
    source = made(name, **args)
    content = {"teacher": under("backbone.", dinov2(source.state_dict(), registers))}
    torch.save(content, tmp_path / "teacher.pth")
    loaded = load(tmp_path / "teacher.pth", name, args=args)
    with torch.no_grad():
        images = pixels(size=28)
        torch.testing.assert_close(loaded.model(images), source(images), atol=1e-5, rtol=1e-5)


def test_mae_with_its_decoder(tmp_path: Path) -> None:
    source = made(num_classes=0)
    decoder = {"decoder_embed.weight": torch.ones(2, 2), "decoder_blocks.0.norm1.weight": torch.ones(2),
               "mask_token": torch.ones(1, 1, 2), "decoder_pos_embed": torch.ones(1, 5, 2)}  # fmt: skip
    torch.save({"model": {**source.state_dict(), **decoder}}, tmp_path / "mae.pth")
    loaded = load(tmp_path / "mae.pth", args={"num_classes": 0})
    assert_same(loaded, source)
    assert f"left out of {tmp_path / 'mae.pth'}: the decoder (3 tensors)" in loaded.notes


def test_mae_fine_tuned(tmp_path: Path) -> None:
    source = made(global_pool="avg")
    torch.save({"model": source.state_dict(), "optimizer": {}, "args": argparse.Namespace()}, tmp_path / "mae.pth")
    loaded = load(tmp_path / "mae.pth")
    assert_same(loaded, source)
    assert any(text.endswith("taking global_pool=avg") for text in loaded.notes)
    assert "1 unexpected: fc_norm" not in refusal(tmp_path / "mae.pth", args={"global_pool": "token"})


def open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP image tower's names, out of timm's."""
    swaps = (("patch_embed.proj.", "conv1."), ("norm_pre.", "ln_pre."), ("attn.qkv.", "attn.in_proj_"), (
        "attn.proj.", "attn.out_proj."), ("blocks.", "transformer.resblocks."), (".norm", ".ln_"),
        ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."))  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in swaps:
            name = name.replace(ours, theirs)
        found["ln_post." + name.removeprefix("norm.") if name.startswith("norm.") else name] = tensor
    found["class_embedding"] = found.pop("cls_token")[0, 0]
    found["positional_embedding"] = found.pop("pos_embed")[0]
    found["proj"] = found.pop("head.weight").T
    del found["head.bias"]
    return found


@pytest.mark.parametrize("prefix", ["", "visual.", "module.visual.", "model.visual."])
def test_open_clip(prefix: str, tmp_path: Path) -> None:
    name = "vit_base_patch32_clip_quickgelu_224"
    source = made(name, patch_size=16)
    nn.init.zeros_(source.head.bias)
    tensors = under(prefix, open_clip(source.state_dict()))
    if prefix:
        before = prefix.removesuffix("visual.")
        tensors |= {
            f"{before}logit_scale": torch.ones(()),
            f"{before}transformer.resblocks.0.ln_1.weight": torch.ones(3),
        }
    torch.save({"state_dict": tensors}, tmp_path / "clip.pt")
    assert_same(load(tmp_path / "clip.pt", name, args={"patch_size": 16}), source)


def test_torchvision(tmp_path: Path) -> None:
    from torchvision.models import VisionTransformer

    source = shaken(VisionTransformer(image_size=32, patch_size=16, num_layers=3, num_heads=3, hidden_dim=24,
                                      mlp_dim=96, num_classes=5))  # fmt: skip
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    torch.save({"model": under("model.", source.state_dict())}, tmp_path / "trained.pth")
    for name in ("vit.pth", "trained.pth"):
        assert_same(load(tmp_path / name), source)


def mmpretrain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A classifier's names, out of timm's."""
    swaps = (("head.", "head.layers.head."), ("norm.", "backbone.ln1."), (".norm", ".ln"), (".mlp.fc1.",
             ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."), ("patch_embed.proj.", "patch_embed.projection."),
             ("blocks.", "layers."))  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in swaps:
            name = name.replace(ours, theirs) if not name.startswith("backbone.") else name
        found[name if name.startswith(("head.", "backbone.")) else f"backbone.{name}"] = tensor
    return found


def test_mmpretrain(model: nn.Module, tmp_path: Path) -> None:
    tensors = mmpretrain(model.state_dict())
    assert "backbone.layers.0.ffn.layers.0.0.weight" in tensors and "head.layers.head.bias" in tensors
    torch.save({"meta": {}, "state_dict": tensors}, tmp_path / "vit.pth")
    assert_same(load(tmp_path / "vit.pth"), model)


def jax(model: Any) -> dict[str, Any]:
    """Names and shapes of Google's files."""
    found: dict[str, Any] = {}

    def put(name: str, tensor: Tensor, turned: bool = True) -> None:
        found[name] = (tensor.T if turned and tensor.ndim == 2 else tensor).detach().numpy()

    put("embedding/kernel", model.patch_embed.proj.weight.permute(2, 3, 1, 0))
    put("embedding/bias", model.patch_embed.proj.bias)
    put("cls", model.cls_token)
    put("Transformer/posembed_input/pos_embedding", model.pos_embed)
    for name, norm in (("encoder_norm", model.norm), *((f"encoderblock_{i}/LayerNorm_{n}", part) for i, block in
                       enumerate(model.blocks) for n, part in ((0, block.norm1), (2, block.norm2)))):  # fmt: skip
        put(f"Transformer/{name}/scale", norm.weight)
        put(f"Transformer/{name}/bias", norm.bias)
    for i, block in enumerate(model.blocks):
        at = f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1"
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            put(f"{at}/{name}/kernel", weight.T.reshape(24, 3, 8), turned=False)
            put(f"{at}/{name}/bias", bias.reshape(3, 8), turned=False)
        put(f"{at}/out/kernel", block.attn.proj.weight.T.reshape(3, 8, 24), turned=False)
        put(f"{at}/out/bias", block.attn.proj.bias)
        for number, part in enumerate((block.mlp.fc1, block.mlp.fc2)):
            put(f"Transformer/encoderblock_{i}/MlpBlock_3/Dense_{number}/kernel", part.weight)
            put(f"Transformer/encoderblock_{i}/MlpBlock_3/Dense_{number}/bias", part.bias)
    put("head/kernel", model.head.weight)
    put("head/bias", model.head.bias)
    return found


def test_jax(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "vit.npz"
    np.savez(path, **jax(model))
    assert_same(load(path), model)
    assert load(path, args={"img_size": 64}).model(pixels(size=64)).shape == (2, 5)
    assert load(path, args={"num_classes": 0}).model(pixels()).shape == (2, 24)
    assert refusal(path, args={"num_classes": 7}).endswith("type `num_classes=5`")
    new = load(path, args={"num_classes": 7}, to_be_trained=True)
    assert new.new_head and torch.equal(new.model.norm.weight, model.norm.weight)
    assert "it has 3 blocks, and the model 2; name" in refusal(path, args={"depth": 2})
    np.savez(path, **{name: value for name, value in jax(model).items() if "fc1" not in name and "Dense_0" not in name})
    assert "does not fit this model (" in refusal(path)


@pytest.mark.parametrize("beside", [True, False])
def test_transformers_names(beside: bool, tmp_path: Path) -> None:
    """With the config beside it as with the folder; without, by what transformers has for the type."""
    source, config = write_transformers_folder(tmp_path)
    args = {"depth": 2, "num_classes": 3}
    file = tmp_path / "model.safetensors"
    if not beside:
        (tmp_path / "config.json").unlink()
        torch.save({"state_dict": under("net.", load_file(file))}, tmp_path / "run.ckpt")
        file = tmp_path / "run.ckpt"
    loaded = load(file, args=args)
    assert_same(loaded, source)
    assert loaded.origin.kind == "checkpoint" and loaded.origin.name == (
        "transformers ViTForImageClassification" if beside else "transformers vit"
    )
    assert (
        any("has transformers' names and no config.json beside it: taking" in text for text in loaded.notes) != beside
    )
    message = refusal(file, args={"depth": 3})
    assert f"{tmp_path} holds a " in message
    assert "of width 24, 2 blocks, 3 heads, and vit_base_patch16_224 has width 24, 3 blocks, 3 heads; name" in message
    assert load(tmp_path if beside else file, args=args).model.num_classes == 3


def torchscript(path: Path, model: nn.Module) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(path))


OTHERS: dict[str, tuple[Any, str]] = {
    "optimizer.pt": ({"state": {}, "param_groups": []}, "is the state of an optimizer; give the file of weights that"),
    "lora.pth": ({"blocks.0.attn.qkv.lora_A.weight": torch.ones(2), "b.lora_B.x": torch.ones(2)},
                 "holds adapters (LoRA), such as blocks.0.attn.qkv.lora_A.weight; load them with the model"),
    "peft.pth": ({"blocks.0.attn.qkv.parametrizations.weight.original0": torch.ones(2)}, "remove_parametrizations"),
    "q.pth": ({"a.weight": torch.ones(2), "a.weight.absmax": torch.ones(2)}, "holds quantised weights, such as a.weig"),
    "flat.pth": ({"a._flat_param": torch.ones(2)}, "holds a part of an FSDP model, such as a._flat_param; save a full"),
    "bert.bin": ({"bert.embeddings.word_embeddings.weight": torch.ones(2)}, "holds a model of text, such as bert.emb"),
    "llama.bin": ({"model.embed_tokens.weight": torch.ones(2)}, "holds a model of text"),
    "zero.pt": ({"optimizer_state_dict": {"base_optimizer_state": []}, "ds_config": {}},
                "is a part of a DeepSpeed checkpoint without weights; make one file of all of them with the zero_to_"),
    "two.pth": ({"first": {"a.b": torch.ones(1)}, "second": {"a.b": torch.ones(1)}},
                "holds weights under several names, first, second; save one of them alone"),
    "resnet.pth": ({f"layer1.{i}.conv1.weight": torch.ones(1) for i in range(9)},
                   "its names are those of another kind of model, and no conversion from it is known; name the model"),
    "list.pth": ([1, 2], "holds no weights, but a list; give a file whose content is a model's state_dict"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is a file of Keras or TensorFlow, which holds no tensors of a"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch", "is an exported model, which profile and eval run where its"),
    "model.pt2": (b"PK\x03\x04", "is an exported model, which profile and eval run where its runtime is installed"),
    "flax.msgpack": (b"\x81\xa6params", "is a file of Flax, whose names are no timm model's; give weights of"),
    "model.gguf": (b"GGUF\x03", "is a quantised model for llama.cpp"),
    "script.pt": (torchscript, "is a TorchScript archive, whose content is code; save the model's state_dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_what_cannot_be_taken_is_named(name: str, model: nn.Module, tmp_path: Path) -> None:
    content, message = OTHERS[name]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif callable(content):
        content(path, model)
    else:
        torch.save(content, path)
    assert f"{path} {message}" in (found := refusal(path)) or message in found


def test_keras_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({}))
        archive.writestr("model.weights.h5", b"x")
    assert "is a file of Keras or TensorFlow" in refusal(tmp_path / "model.keras")


def test_advice_about_the_head_is_given_where_only_the_head_is_missing(model: nn.Module, tmp_path: Path) -> None:
    """It used to be told to whoever's names were others, and led to the next error."""
    torch.save({f"trunk_{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "a.pth")
    assert "num_classes" not in refusal(tmp_path / "a.pth")
