"""Folders that transformers wrote: the logits are transformers' own, for every type that is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import shaken
from torch import Tensor, nn

from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import ModelError
from tokencut.model import compress
from tokencut.models import artifact
from tokencut.models.checkpoints import sha256
from tokencut.models.loading import Loaded, load_model

pytestmark = pytest.mark.slow  # transformers alone takes four seconds to import

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 24,
    "patch_size": 8,
}
# Unlike any default, so that one that is not read shows.
ODD: dict[str, Any] = {**SIZES, "layer_norm_eps": 1e-3}
LABELS = {index: f"animal {index}" for index in range(5)}
TEXT: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
}  # fmt: skip

Output = Callable[[Any, Tensor], Tensor]


def logits(model: Any, images: Tensor) -> Tensor:
    return model(images).logits


def class_token(model: Any, images: Tensor) -> Tensor:
    return model(images).last_hidden_state[:, 0]


def pooled(model: Any, images: Tensor) -> Tensor:
    return model(images).pooler_output


def vit(name: str = "ViTForImageClassification", config: str = "ViTConfig", **fields: Any) -> Any:
    """A model of one tower, such as ViT's."""
    made = getattr(transformers, config)(**{**ODD, "id2label": LABELS, **fields})
    return shaken(getattr(transformers, name)(made))


def tower(name: str, kind: str, **fields: Any) -> Any:
    """CLIP's or SigLIP's image tower, alone or with the text model beside it."""
    vision = {**ODD, **fields}
    if "VisionModel" in name:
        made = getattr(transformers, f"{kind}VisionConfig")(**vision)
    else:
        # Of text and images, CLIP wants the size of what they have in common told three times.
        more = {"projection_dim": 12} if kind == "CLIP" else {}
        config = getattr(transformers, f"{kind}Config")
        made = config(text_config={**TEXT, **more}, vision_config={**vision, **more}, id2label=LABELS, **more)
    return shaken(getattr(transformers, name)(made))


def video(name: str, config: str, **fields: Any) -> Any:
    """A model of clips, of 6 frames in tubelets of 2."""
    sizes = {**ODD, "num_frames": 6, "tubelet_size": [2, 8, 8] if config == "VivitConfig" else 2}
    return vit(name, config, **{**sizes, **fields})


def clip_logits(model: Any, clips: Tensor) -> Tensor:
    return model(clips.transpose(1, 2)).logits


def clip_features(model: Any, clips: Tensor) -> Tensor:
    """As timm's head makes them: the first token of ViViT, the mean of VideoMAE's."""
    features = getattr(model, "videomae", model)(clips.transpose(1, 2)).last_hidden_state
    return features.mean(1) if "VideoMAE" in type(model).__name__ else features[:, 0]


def clip_image(model: Any, images: Tensor) -> Tensor:
    return model.visual_projection(model.vision_model(images).pooler_output)


def siglip2(name: str) -> Any:
    fields = {key: value for key, value in ODD.items() if key != "image_size"}
    made = transformers.Siglip2VisionConfig(num_patches=9, **fields)
    return shaken(getattr(transformers, name)(made))


def siglip2_image(model: Any, images: Tensor) -> Tensor:
    patches = images.unflatten(3, (3, 8)).unflatten(2, (3, 8)).permute(0, 2, 4, 3, 5, 1).reshape(len(images), 9, -1)
    shapes = torch.tensor([[3, 3]] * len(images))
    return model(patches, torch.ones(len(images), 9, dtype=torch.long), shapes).pooler_output


CASES: dict[str, tuple[Callable[[], Any], Output, str]] = {
    "vit": (vit, logits, "vit_base_patch16_224"),
    "vit, not square, tanh, no bias": (
        lambda: vit(image_size=[24, 40], hidden_act="gelu_new", qkv_bias=False), logits, "vit_base_patch16_224"),
    "vit, relu, one channel": (lambda: vit(hidden_act="relu", num_channels=1), logits, "vit_base_patch16_224"),
    "vit without a head": (lambda: vit("ViTModel"), class_token, "vit_base_patch16_224"),
    "vit msn": (lambda: vit("ViTMSNForImageClassification", "ViTMSNConfig"), logits, "vit_base_patch16_224"),
    "deit": (lambda: vit("DeiTForImageClassification", "DeiTConfig"), logits, "deit_base_patch16_224"),
    "deit with teacher": (
        lambda: vit("DeiTForImageClassificationWithTeacher", "DeiTConfig"), logits, "deit_base_distilled_patch16_224"),
    "dinov2": (lambda: vit("Dinov2ForImageClassification", "Dinov2Config"), logits, "vit_base_patch14_dinov2"),
    "dinov2 backbone": (lambda: vit("Dinov2Model", "Dinov2Config"), class_token, "vit_base_patch14_dinov2"),
    "dinov2 swiglu": (
        lambda: vit("Dinov2ForImageClassification", "Dinov2Config", use_swiglu_ffn=True), logits,
        "vit_giant_patch14_dinov2"),
    "dinov2 with registers": (
        lambda: vit("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", num_register_tokens=3),
        logits, "vit_base_patch14_reg4_dinov2"),
    "dinov3": (
        lambda: vit("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4), pooled,
        "vit_base_patch16_dinov3_qkvb"),
    "dinov3, gated, no biases": (
        lambda: vit("DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True, hidden_act="silu", num_register_tokens=3,
                    query_bias=False, value_bias=False, rope_theta=50.0), pooled, "vit_small_plus_patch16_dinov3"),
    "dinov3, one bias": (lambda: vit("DINOv3ViTModel", "DINOv3ViTConfig", value_bias=False, num_register_tokens=1),
                         pooled, "vit_base_patch16_dinov3_qkvb"),
    "beit": (lambda: vit("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True), logits,
             "beit_base_patch16_224"),
    "beit without a head, one bias for all blocks": (
        lambda: vit("BeitModel", "BeitConfig", use_shared_relative_position_bias=True), pooled,
        "beit_base_patch16_224"),
    "beit, class token, no scale": (
        lambda: vit("BeitForImageClassification", "BeitConfig", use_mean_pooling=False, layer_scale_init_value=0.0,
                    use_absolute_position_embeddings=True, use_relative_position_bias=True), logits,
        "beit_base_patch16_224"),
    "data2vec": (lambda: vit("Data2VecVisionForImageClassification", "Data2VecVisionConfig",
                             use_relative_position_bias=True), logits, "beit_base_patch16_224"),
    "clip": (lambda: tower("CLIPModel", "CLIP"), clip_image, "vit_base_patch32_clip_quickgelu_224"),
    "clip's tower": (
        lambda: tower("CLIPVisionModelWithProjection", "CLIP", projection_dim=12, hidden_act="gelu"),
        lambda model, images: model(images).image_embeds, "vit_base_patch32_clip_224"),
    "clip's tower, no projection": (
        lambda: tower("CLIPVisionModel", "CLIP"), pooled, "vit_base_patch32_clip_quickgelu_224"),
    "clip classifier": (
        lambda: tower("CLIPForImageClassification", "CLIP"), logits, "vit_base_patch32_clip_quickgelu_224"),
    "metaclip 2's tower": (
        lambda: tower("MetaClip2VisionModelWithProjection", "MetaClip2", projection_dim=12),
        lambda model, images: model(images).image_embeds, "vit_base_patch32_clip_quickgelu_224"),
    "siglip": (
        lambda: tower("SiglipModel", "Siglip"), lambda model, images: pooled(model.vision_model, images),
        "vit_base_patch16_siglip_224"),
    "siglip's tower": (lambda: tower("SiglipVisionModel", "Siglip"), pooled, "vit_base_patch16_siglip_224"),
    "siglip classifier": (
        lambda: tower("SiglipForImageClassification", "Siglip"), logits, "vit_base_patch16_siglip_gap_224"),
    "videomae": (lambda: video("VideoMAEForVideoClassification", "VideoMAEConfig"), clip_logits,
                 "videomae_base_patch16_224"),
    "videomae, not square, no bias, long tubelets": (
        lambda: video("VideoMAEForVideoClassification", "VideoMAEConfig", image_size=[24, 40], qv_bias=False,
                      tubelet_size=3), clip_logits, "videomae_base_patch16_224"),
    "videomae without a head": (
        lambda: video("VideoMAEModel", "VideoMAEConfig"), clip_features, "videomae_base_patch16_224"),
    "videomae without a head, normed": (
        lambda: video("VideoMAEModel", "VideoMAEConfig", use_mean_pooling=False), clip_features,
        "videomae_base_patch16_224"),
    "vivit": (lambda: video("VivitForVideoClassification", "VivitConfig"), clip_logits, "vivit_base_patch16x2_224"),
    "vivit without a head, gelu": (lambda: video("VivitModel", "VivitConfig", hidden_act="gelu"), clip_features,
                                   "vivit_base_patch16x2_224"),
    "siglip2's tower": (lambda: siglip2("Siglip2VisionModel"), siglip2_image, "vit_base_patch16_siglip_224"),
}  # fmt: skip


def noise(model: nn.Module) -> Tensor:
    return torch.randn(3, *preprocessing_of(model).input_shape, generator=torch.Generator().manual_seed(1))


def written(source: Any, folder: Path, **options: Any) -> Path:
    source.save_pretrained(folder, **options)
    return folder


def through_a_file(loaded: Loaded, folder: Path) -> nn.Module:
    """The dense model, out of a tokencut file of it."""
    artifact.save(compress(loaded.model, keep=1.0), folder / "out.safetensors")
    return artifact.load(folder / "out.safetensors").model


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_source(case: str, tmp_path: Path) -> None:
    make, output, name = CASES[case]
    source = make()
    loaded = load_model(str(written(source, tmp_path / "saved")))
    assert loaded.model.pretrained_cfg["architecture"] == name
    images = noise(loaded.model)
    with torch.no_grad():
        expected = output(source, images)
        assert expected.std() > 0.1
        for model in (loaded.model, through_a_file(loaded, tmp_path)):
            torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
            again = compress(model, keep=1.0).loop
            torch.testing.assert_close(again.head(again.run(again.embed(images), ())), expected, atol=1e-5, rtol=1e-5)


WITHOUT_CONFIG = (
    "vit", "deit", "dinov2 swiglu", "dinov3", "beit", "beit without a head, one bias for all blocks",
    "beit, class token, no scale", "clip", "clip's tower", "siglip classifier",
)  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_CONFIG)
def test_tensors_without_their_config(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what transformers has for the type, and by the architecture that is named."""
    usual = {"clip": 1e-5, "dinov2": 1e-6, "dinov3": 1e-5, "siglip": 1e-6}
    monkeypatch.setitem(ODD, "layer_norm_eps", next((usual[kind] for kind in usual if case.startswith(kind)), 1e-12))
    make, output, name = CASES[case]
    source = make()
    torch.save({"state_dict": {f"net.{key}": value for key, value in source.state_dict().items()}}, tmp_path / "a.ckpt")
    like = load_model(str(written(source, tmp_path / "saved"))).model
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    loaded = load_model(name, checkpoint=tmp_path / "a.ckpt", num_classes=like.num_classes, model_kwargs=sizes)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(noise(like)), output(source, noise(like)), atol=1e-5, rtol=1e-5)


def test_the_encoder_of_a_masked_autoencoder(tmp_path: Path) -> None:
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    fields = {f"decoder_{name}": value for name, value in decoder.items()}
    source = vit("ViTMAEForPreTraining", "ViTMAEConfig", mask_ratio=0.0, **fields)
    loaded = load_model(str(written(source, tmp_path / "saved")))
    assert "the decoder of ViTMAEForPreTraining is left out" in loaded.notes
    images = noise(loaded.model)
    with torch.no_grad():  # which shuffles the patches, so that sums are in another order
        expected = source.vit(images).last_hidden_state[:, 0]
        torch.testing.assert_close(loaded.model(images), expected, atol=1e-4, rtol=1e-4)


def test_the_encoder_of_a_masked_video_autoencoder(tmp_path: Path) -> None:
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    fields = {f"decoder_{name}": value for name, value in decoder.items()}
    source = video("VideoMAEForPreTraining", "VideoMAEConfig", **fields)
    loaded = load_model(str(written(source, tmp_path / "saved")))
    assert "the decoder and the mask token of VideoMAEForPreTraining are left out" in loaded.notes
    with torch.no_grad():
        expected = clip_features(source, noise(loaded.model))
        torch.testing.assert_close(loaded.model(noise(loaded.model)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["VideoMAE", "Vivit"])
def test_clips_of_another_size(name: str, tmp_path: Path) -> None:
    source = video(f"{name}ForVideoClassification", f"{name}Config")
    loaded = load_model(str(written(source, tmp_path / "saved")), img_size=40)
    assert loaded.model.patch_embed.grid_size == (3, 5, 5)
    resized = "positions are resized from 24x24 px, frame by frame"
    assert (resized in loaded.notes) == (name == "Vivit")
    if name == "VideoMAE":  # whose table transformers makes for any size that a config has
        larger = video(f"{name}ForVideoClassification", f"{name}Config", image_size=40)
        larger.load_state_dict(source.state_dict())
        with torch.no_grad():
            expected = clip_logits(larger, noise(loaded.model))
            torch.testing.assert_close(loaded.model(noise(loaded.model)), expected, atol=1e-5, rtol=1e-5)


def test_names_of_videomae_before_version_five(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = video("VideoMAEForVideoClassification", "VideoMAEConfig")
    folder = written(source, tmp_path / "saved")
    old = {name.replace("attention.query.bias", "attention.q_bias").replace("attention.value.bias", "attention.v_bias"):
           tensor for name, tensor in load_file(folder / "model.safetensors").items()}  # fmt: skip
    assert any(name.endswith("attention.attention.q_bias") for name in old)
    save_file(old, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["qkv_bias"] = config.pop("qv_bias")
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(folder))
    with torch.no_grad():
        expected = clip_logits(source, noise(loaded.model))
        torch.testing.assert_close(loaded.model(noise(loaded.model)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("VideoMAE", {"use_mean_pooling": False}, "use_mean_pooling False, which is not what a model without a class"),
        ("Vivit", {"num_frames": 1}, "num_frames 1, which is not one of its tubelets, of 2 frames"),
        ("VideoMAE", {"tubelet_size": 0}, "tubelet_size 0, which is not a number of frames"),
    ],
)
def test_clips_that_cannot_be_taken(name: str, fields: dict[str, Any], told: str, tmp_path: Path) -> None:
    folder = written(video(f"{name}ForVideoClassification", f"{name}Config"), tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ModelError, match=told):
        load_model(str(folder))


@pytest.mark.parametrize("how", ["bin", "sharded", "sharded bin", "half", "new names"])
def test_every_form_of_the_files(how: str, tmp_path: Path) -> None:
    source = vit("Dinov2ForImageClassification", "Dinov2Config", use_swiglu_ffn=True)
    if how == "half":
        source = source.bfloat16()
    options: dict[str, Any] = {"save_original_format": how != "new names"}
    if "sharded" in how:
        options["max_shard_size"] = "20KB"
    folder = written(source, tmp_path / "saved", **options)
    if "bin" in how:
        _as_pickles(folder)
    assert ("sharded" in how) == (len(list(folder.glob("*-of-*"))) > 1)
    loaded = load_model(str(folder))
    images = noise(loaded.model)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), source.float()(images).logits, atol=1e-5, rtol=1e-5)
    weights = next(path for path in folder.iterdir() if path.name.startswith(("model.safetensors", "pytorch_model")))
    if "sharded" not in how:
        assert loaded.origin.sha256 == sha256(weights)


def _as_pickles(folder: Path) -> None:
    """What older versions of transformers wrote."""
    from safetensors.torch import load_file

    for path in list(folder.glob("*.safetensors")):
        torch.save(load_file(path), folder / path.name.replace("model", "pytorch_model").replace("safetensors", "bin"))
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


ANY_SIZE = {"interpolate_pos_encoding": True}


@pytest.mark.parametrize(
    ("make", "output", "told"),
    [
        (lambda: vit("Dinov2ForImageClassification", "Dinov2Config"), logits, True),
        (lambda: vit("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"), logits, True),
        (vit, lambda model, images: model(images, **ANY_SIZE).logits, True),
        (lambda: vit("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True),
         lambda model, images: model(images, **ANY_SIZE).logits, True),
        (lambda: vit("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4), pooled, False),
    ],
)  # fmt: skip
def test_images_of_another_size(make: Callable[[], Any], output: Output, told: bool, tmp_path: Path) -> None:
    source = make()
    loaded = load_model(str(written(source, tmp_path / "saved")), img_size=40)
    assert ("positions are resized from 24x24 px, as transformers does it" in loaded.notes) == told
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        expected = output(source, images)
        torch.testing.assert_close(loaded.model(images), expected, atol=1e-5, rtol=1e-5)
        model = through_a_file(loaded, tmp_path)
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_takes_any_size_has_that_of_its_preprocessing(tmp_path: Path) -> None:
    source = vit("Dinov2ForImageClassification", "Dinov2Config")
    folder = written(source, tmp_path / "saved")
    made = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size=32, image_mean=[0.1, 0.2, 0.3])
    made.save_pretrained(folder)
    loaded = load_model(str(folder))
    cfg = loaded.model.pretrained_cfg
    assert (cfg["input_size"], cfg["crop_pct"], cfg["crop_mode"]) == ((3, 32, 32), 0.8, "center")
    assert cfg["mean"] == (0.1, 0.2, 0.3)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), source(images).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "processor",
    [
        lambda: transformers.ViTImageProcessor(size={"height": 24, "width": 24}, image_std=[0.2, 0.3, 0.4]),
        lambda: transformers.DeiTImageProcessor(size={"height": 32, "width": 32}, crop_size=24),
        lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 29}, crop_size=24, resample=2),
        lambda: transformers.ViTImageProcessor(size={"height": 24, "width": 24}, do_normalize=False),
        lambda: transformers.ViTImageProcessor(size={"height": 24, "width": 24}, rescale_factor=1 / 127.5),
    ],
)
def test_images_are_prepared_as_transformers_does(processor: Callable[[], Any], tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    from tokencut.data.preprocessing import preprocessing_of

    folder = written(vit(), tmp_path / "saved")
    made = processor()
    made.save_pretrained(folder)
    prepared = preprocessing_of(load_model(str(folder)).model)
    smooth = np.linspace(0, 255, 48 * 60 * 3).reshape(48, 60, 3).astype(np.uint8)
    image = Image.fromarray(smooth)
    expected = made(image, return_tensors="pt").pixel_values
    got = prepared.normalise(prepared.transform()(image).unsqueeze(0), torch.device("cpu"))
    assert got.shape == expected.shape
    step = 1 / 255 / min(prepared.config["std"])
    assert (got - expected).abs().max() <= 2.5 * step  # resizing rounds to whole pixel values, in another order


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("VideoMAE", lambda: transformers.VideoMAEImageProcessor(size={"shortest_edge": 28}, crop_size=24)),
        ("VideoMAE", lambda: transformers.VideoMAEVideoProcessor(size={"shortest_edge": 24}, crop_size=24,
                                                                 image_std=[0.2, 0.3, 0.4])),
        ("Vivit", lambda: transformers.VivitImageProcessor(size={"shortest_edge": 28}, crop_size=24)),
        ("Vivit", lambda: transformers.VivitImageProcessor(size={"shortest_edge": 24}, crop_size=24, offset=False,
                                                           rescale_factor=1 / 255)),
    ],
)  # fmt: skip
def test_frames_are_prepared_as_transformers_does(name: str, processor: Callable[[], Any], tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    folder = written(video(f"{name}ForVideoClassification", f"{name}Config"), tmp_path / "saved")
    made = processor()
    made.save_pretrained(folder)
    loaded = load_model(str(folder))
    prepared = preprocessing_of(loaded.model)
    assert not any("preprocessor_config.json" in note for note in loaded.notes)
    smooth = np.linspace(0, 255, 48 * 60 * 3).reshape(48, 60, 3).astype(np.uint8)
    frames = [Image.fromarray(np.roll(smooth, 5 * number, 1)) for number in range(6)]
    expected = made(torch.from_numpy(np.stack(frames)).movedim(3, 1) if "VideoProcessor" in type(made).__name__ else
                    frames, return_tensors="pt").pixel_values  # fmt: skip
    clip = torch.stack([prepared.transform()(frame) for frame in frames], 1)
    got = prepared.normalise(clip.unsqueeze(0), torch.device("cpu")).transpose(1, 2)
    assert got.shape == expected.shape
    step = 1 / 255 / min(prepared.config["std"])
    assert (got - expected).abs().mean() <= step and (got - expected).abs().max() <= 6 * step


def test_a_timm_model_in_transformers_wrapper(tmp_path: Path) -> None:
    config = transformers.TimmWrapperConfig(
        architecture="test_vit", num_labels=5, model_args={"depth": 2, "img_size": 64},
        pretrained_cfg={"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "crop_pct": 0.9},
    )  # fmt: skip
    source = shaken(transformers.TimmWrapperForImageClassification(config))
    folder = written(source, tmp_path / "saved")
    loaded = load_model(str(folder))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), source(images).logits)
    assert loaded.model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    features = shaken(transformers.TimmWrapperModel(config))
    loaded = load_model(str(written(features, tmp_path / "features")))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), features(images).pooler_output)


def test_another_number_of_classes_or_channels(tmp_path: Path) -> None:
    folder = written(vit("Dinov2ForImageClassification", "Dinov2Config"), tmp_path / "saved")
    loaded = load_model(str(folder), num_classes=7, model_kwargs={"in_chans": 1})
    assert loaded.new_head
    assert "the head of 7 classes is new: its weights are random (seed 0) until it is trained" in loaded.notes
    assert loaded.model(torch.zeros(1, 1, 24, 24)).shape == (1, 7)
    assert loaded.model.pretrained_cfg.get("label_names") is None
    same = load_model(str(folder))
    assert torch.equal(loaded.model.blocks[1].mlp.fc1.weight, same.model.blocks[1].mlp.fc1.weight)
    summed = same.model.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(loaded.model.patch_embed.proj.weight, summed)
    assert load_model(str(folder), num_classes=0).model(torch.zeros(1, 3, 24, 24)).shape == (1, 48)


def test_what_a_file_says_of_them(tmp_path: Path) -> None:
    folder = written(vit(), tmp_path / "saved")
    loaded = load_model(str(folder))
    info = artifact.save(compress(loaded.model, keep=0.5), tmp_path / "out.safetensors")
    assert info.label_names == tuple(LABELS.values())
    assert (info.origin.kind, info.origin.name) == ("local-dir", "transformers ViTForImageClassification")
    assert info.origin.sha256 == sha256(folder / "model.safetensors")
    assert (info.alterations.norm_eps, info.preprocessing["mean"]) == (1e-3, (0.5,) * 3)
    assert artifact.load(tmp_path / "out.safetensors").model.norm.eps == 1e-3


def test_weights_are_not_needed_for_a_cost(tmp_path: Path) -> None:
    folder = written(vit("Dinov2ForImageClassification", "Dinov2Config"), tmp_path / "saved")
    (folder / "model.safetensors").unlink()
    loaded = load_model(str(folder), weights_needed=False)
    assert loaded.origin.kind == "random" and loaded.model.head.weight.shape == (5, 48)
    with pytest.raises(ModelError, match="cannot load weights from .*there is none of model.safetensors, pytorch_mo"):
        load_model(str(folder))


def test_names_that_are_not_known(tmp_path: Path) -> None:
    folder = written(vit(), tmp_path / "saved")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "vit.encoder.layer.0.lora.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 of its tensors are not known for its type: vit\.encoder\.layer\.0\.lora"):
        load_model(str(folder))


def test_a_checkpoint_of_the_trainer(tmp_path: Path) -> None:
    source = vit()
    for step in (9, 10):
        written(source, tmp_path / "run" / f"checkpoint-{step}")
    from tokencut.errors import UsageError

    with pytest.raises(UsageError, match="its checkpoints do; type .*checkpoint-10$"):
        load_model(str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "checkpoint-10" / "config.json").read_text())["model_type"] == "vit"
    folder = tmp_path / "run" / "checkpoint-10"
    images = torch.randn(2, 3, 24, 24)
    for spec in (str(folder), f"local-dir:{folder}"):
        with torch.no_grad():
            torch.testing.assert_close(load_model(spec).model(images), source(images).logits, atol=1e-5, rtol=1e-5)
