"""What transformers' configs come to in timm's words; transformers itself is not needed for it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from model_files import write_transformers_folder
from safetensors.torch import load_file

from tokencut.errors import ModelError, UsageError
from tokencut.models.huggingface import convert
from tokencut.models.huggingface.architectures import _SIZES
from tokencut.models.huggingface.preprocessing import preprocessing_from
from tokencut.models.loading import load_model
from tokencut.models.names import architectures

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}


@pytest.mark.parametrize(
    ("config", "name", "args"),
    [
        ({"model_type": "vit"}, "vit_base_patch16_224", {"num_classes": 0}),
        ({"model_type": "vit", **LARGE, "image_size": 384}, "vit_large_patch16_384", {"num_classes": 0}),
        ({"model_type": "vit", **LARGE, "image_size": 256}, "vit_large_patch16_224",
         {"num_classes": 0, "img_size": 256}),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"], "patch_size": 32, "image_size": 384,
          "num_labels": 1000}, "vit_base_patch32_384", {}),
        ({"model_type": "vit", "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24},
         "vit_base_patch16_224", {"embed_dim": 1536, "depth": 40, "num_heads": 24, "patch_size": 16, "mlp_ratio": 2.0,
                                  "num_classes": 0}),
        ({"model_type": "deit", "architectures": ["DeiTForImageClassification"]}, "deit_base_patch16_224",
         {"reg_tokens": 1, "num_classes": 2}),
        ({"model_type": "deit", "architectures": ["DeiTForImageClassificationWithTeacher"], "image_size": 384,
          "num_labels": 1000}, "deit_base_distilled_patch16_384", {}),
        ({"model_type": "dinov2", **LARGE, "image_size": 518}, "vit_large_patch14_dinov2", {}),
        ({"model_type": "dinov2", **GIANT, "image_size": 518}, "vit_giant_patch14_dinov2", {}),
        ({"model_type": "dinov2_with_registers", "patch_size": 14, "image_size": 518}, "vit_base_patch14_reg4_dinov2",
         {}),
        ({"model_type": "dinov3_vit", "num_register_tokens": 4, "image_size": 256}, "vit_small_patch16_dinov3_qkvb",
         {"global_pool": "token"}),
        ({"model_type": "dinov3_vit", "num_register_tokens": 4, "hidden_size": 1280, "num_hidden_layers": 32,
          "num_attention_heads": 20, "intermediate_size": 5120, "use_gated_mlp": True, "hidden_act": "silu",
          "image_size": 256}, "vit_huge_plus_patch16_dinov3_qkvb", {"global_pool": "token"}),
        ({"model_type": "dinov3_vit", "num_register_tokens": 4, "hidden_size": 4096, "num_hidden_layers": 40,
          "num_attention_heads": 32, "intermediate_size": 8192, "use_gated_mlp": True, "query_bias": False,
          "value_bias": False, "image_size": 256}, "vit_7b_patch16_dinov3", {"global_pool": "token"}),
        ({"model_type": "beit", "use_relative_position_bias": True, "architectures": ["BeitForImageClassification"],
          "num_labels": 1000, **LARGE, "image_size": 512}, "beit_large_patch16_512", {}),
        ({"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 512},
         "vit_base_patch32_clip_quickgelu_224", {}),
        ({"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 768, "vision_config": {
          **LARGE, "patch_size": 14, "image_size": 336}}, "vit_large_patch14_clip_quickgelu_336", {}),
        ({"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 768, "vision_config": {},
          "vision_config_dict": {**LARGE, "patch_size": 14, "hidden_act": "gelu"}}, "vit_large_patch14_clip_224",
         {"num_classes": 768}),
        ({"model_type": "siglip", "vision_config": {**SO400M, "patch_size": 14, "image_size": 384}},
         "vit_so400m_patch14_siglip_384", {"act_layer": "gelu_tanh", "mlp_ratio": pytest.approx(3.7361, abs=1e-4)}),
        ({"model_type": "siglip2", "vision_config": {"num_patches": 256}}, "vit_base_patch16_siglip_256",
         {"act_layer": "gelu_tanh"}),
        ({"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224.augreg_in21k", "num_classes": 7,
          "architectures": ["TimmWrapperForImageClassification"]}, "vit_tiny_patch16_224", {"num_classes": 7}),
    ],
)  # fmt: skip
def test_names_and_arguments(config: dict[str, Any], name: str, args: dict[str, Any]) -> None:
    found = convert(config, None)
    assert (found.name, found.args) == (name, args)


@pytest.mark.slow
def test_the_words_for_sizes_are_timms() -> None:
    """A name that has a size's word has its width, depth and heads: no shape would tell of the heads."""
    checked = 0
    for (width, depth, heads), word in _SIZES.items():
        pattern = re.compile(rf"(vit|deit|beit)_{word}_(distilled_)?patch\d+_(224|dinov[23]|clip_224|siglip_256)")
        for name in filter(pattern.fullmatch, architectures()):
            if word == "giant" and "dinov2" not in name:
                continue  # another giant, which no config of these types is
            with torch.device("meta"):
                model = timm.create_model(name, img_size=256 if "siglip" in name else 224)
            assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (width, depth, heads), name
            checked += 1
    assert checked > 20


def test_a_vit_by_hand(tmp_path: Path) -> None:
    """The names that transformers' files have, spelt out, without transformers."""
    model, config = write_transformers_folder(tmp_path)
    loaded = load_model(str(tmp_path))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))
    assert loaded.model.pretrained_cfg["label_names"] == ("cat", "dog", "hen")
    assert loaded.origin.licence is None
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\nlicense: apache-2.0\n---\nlicense: mine\n")
    assert load_model(str(tmp_path)).origin.licence == "apache-2.0"
    config["id2label"] = {"0": "cat", "1": "dog"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path))
    assert "config.json names 2 classes and the head has 3: the names are left out" in loaded.notes
    config["id2label"] = {str(index): f"LABEL_{index}" for index in range(3)}
    assert convert(config, load_file(tmp_path / "model.safetensors")).label_names is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"size": 224}, {"crop_mode": "squash", "crop_pct": 1.0}),
        ({"size": 256, "crop_size": 224, "do_center_crop": True}, {"crop_mode": "squash", "crop_pct": 0.875}),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
         {"crop_mode": "center", "crop_pct": 0.875}),
        ({"resample": 0, "image_mean": [0.1] * 3}, {"interpolation": "nearest", "mean": (0.1,) * 3}),
        ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
         {"mean": (0.5,) * 3, "std": (0.5,) * 3}),
    ],
)  # fmt: skip
def test_preprocessing(given: dict[str, Any], expected: dict[str, Any]) -> None:
    usual = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "size": None, "resample": 2}
    found = preprocessing_from(given, usual, (224, 224), resizes=False)
    assert {name: found[name] for name in expected} == expected
    assert found["input_size"] == (224, 224)


def test_a_number_alone_is_the_shorter_side_where_the_type_has_it_so() -> None:
    found = convert({"model_type": "clip"}, None, {"size": 256, "crop_size": 224, "do_center_crop": True})
    assert (found.preprocessing["crop_mode"], found.preprocessing["crop_pct"]) == ("center", 0.875)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "vocab_size": 9, "architectures": ["BertModel"]},
         "it holds a BertModel of transformers' type 'bert', which is a model of text; supported are the types vit, "),
        ({"model_type": "convnext"}, "it holds a convnext of transformers' type 'convnext', which is not supported;"),
        ({"model_type": "vit", "hidden_size": "x"}, "its config.json says hidden_size 'x', which is not a whole"),
        ({"model_type": "vit", "image_size": [224]}, "image_size [224], which is not a number of pixels; save the"),
        ({"model_type": "vit", "hidden_act": "sin"}, "hidden_act 'sin', which is not one of gelu, gelu_python, "),
        ({"model_type": "dinov3_vit", "key_bias": True}, "key_bias True, which is not false, as timm has it"),
        ({"model_type": "vit", "layer_norm_eps": 0}, "layer_norm_eps 0, which is not a positive number"),
        ({"model_type": "vit", "num_hidden_layers": 1001}, "depth"),
        ({"model_type": "timm_wrapper", "architecture": "test_vit", "model_args": {"checkpoint_path": "/x.pth"}},
         "checkpoint_path is not an argument of the architecture; use `checkpoint='FILE'`"),
        ({"model_type": "timm_wrapper", "architecture": "test_vit", "model_args": {"embed_dim": 1e9}}, "which is not"),
        ({"model_type": "timm_wrapper"}, "its config.json says architecture None, which is not a timm name; save"),
        ({"model_type": "timm_wrapper", "architecture": "resnet18"}, "resnet18 is of timm's family resnet, which is"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path), weights_needed=False)
    assert str(caught.value).startswith(f"{tmp_path} cannot be taken: ")
    assert message in str(caught.value)


def test_a_size_that_no_memory_holds_is_refused_before_positions_are_made() -> None:
    config = {"model_type": "dinov2", "image_size": 28}
    tensors = {"embeddings.position_embeddings": torch.zeros(1, 5, 768)}
    with pytest.raises(UsageError, match="img_size"):
        convert(config, tensors, {"size": {"shortest_edge": 60_000}, "crop_size": 60_000, "do_center_crop": True})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resample": "bicubic"}, "its preprocessor_config.json says resample 'bicubic', which is not a number from"),
        ({"image_mean": ["x"]}, "image_mean ['x'], which is not a number for each channel; correct it, or take the"),
        ({"image_std": [0.0]}, "image_std [0.0], which is not"),
        ({"size": {"height": -1}}, "says size (-1, None), which is not a number of pixels"),
        ({"rescale_factor": -1}, "rescale_factor -1, which is not a positive number"),
    ],
)
def test_preprocessing_that_is_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        convert({"model_type": "vit"}, None, given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "it holds adapter_model.safetensors, an adapter alone (LoRA), for the weights"),
        ("mp_rank_00_model_states.pt", "a checkpoint of DeepSpeed, in shards; the zero_to_fp32.py beside it makes one"),
        ("__0_0.distcp", "a checkpoint of torch.distributed; make one file of it with python -m torch.distributed."),
        ("tf_model.h5", "weights of TensorFlow or Keras; load them with from_pretrained(FOLDER, from_tf=True), in a"),
        ("flax_model.msgpack", "weights of Flax; load them with"),
        ("model.onnx", "an exported model, which profile and eval run"),
    ],
)  # fmt: skip
def test_folders_of_other_kinds(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(Exception, match="has no config.json: it holds") as caught:
        load_model(str(tmp_path))
    assert message in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError) as refused:
        load_model(str(tmp_path))
    assert message in str(refused.value)


def test_a_folder_of_open_clip(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        load_model(str(tmp_path))
    assert f"{tmp_path} is open_clip's, whose config names no timm architecture; name that, such as" in str(
        caught.value
    )


def test_an_index_that_leads_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ('{"weight_map": {"a": "../a.safetensors"}}', "names '../a.safetensors', which is not a file beside it"),
        ('{"weight_map": {"a": "b.safetensors"}}', "names 1 files, and b.safetensors is missing; copy all of them"),
        ('{"weight_map": []}', "is not an index of files with weights; save the model again"),
        ("{", "is not an index of files with weights; save the model again"),
    ):
        index.write_text(text)
        with pytest.raises(ModelError) as caught:
            load_model(str(tmp_path))
        assert message in str(caught.value)
