"""MODEL: what a user types, and what comes of it. No network is needed; for the hub see test_hub.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import random_weights, same_weights, write_model_folder
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

from tokencut.errors import ArtifactError, ModelError, TokencutError, UsageError
from tokencut.export.run import export_model
from tokencut.model import CompressedModel, compress
from tokencut.models import artifact
from tokencut.models.checkpoints import sha256
from tokencut.models.loading import artifact_of, load_model
from tokencut.models.metadata import Origin
from tokencut.models.model_args import parse_model_kwargs
from tokencut.models.pretrained_cfg import data_config


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights()


@pytest.fixture
def folder(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "saved", weights)


def refusal(kind: type[TokencutError], spec: str, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load_model(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("diet_tiny", "unknown model 'diet_tiny', did you mean deit_tiny or vit_tiny or "),
        ("no/such/file", "no such file: no/such/file; give a file that `tokencut.save(model, 'FILE')` wrote"),
        ("timm/deit", "wrote, or type hf-hub:timm/deit for the hub's repository"),
        ("out.safetensors", "no such file: out.safetensors; give a file that `tokencut.save(model, 'FILE')` wrote"),
        ("s3:bucket", "unknown kind of model 's3:bucket'; type hf-hub:OWNER/NAME, local-dir:FOLDER, or a name that"),
        (
            "local-dir:nowhere",
            "there is no folder nowhere; give one with config.json and model.safetensors, such as local",
        ),
        ("", "unknown model ''; 'tokencut models' lists the names"),
    ],
)
def test_what_is_not_a_model(spec: str, message: str) -> None:
    assert message in refusal(UsageError, spec)


def test_preprocessing_that_is_told_is_kept(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "weights.safetensors")
    told = {"mean": [0.1, 0.2, 0.3], "std": (0.5,), "crop_pct": 1.0, "interpolation": "bilinear"}
    loaded = load_model("test_vit", checkpoint=tmp_path / "weights.safetensors", preprocessing=told)
    expected = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0, "interpolation": "bilinear"}
    path = tmp_path / "out.safetensors"
    artifact.save(compress(loaded.model, keep=0.5), path)
    by_default = data_config(load_model("test_vit", pretrained=False).model)
    for model in (loaded.model, artifact.load(path).model):
        found = data_config(model)
        assert {name: found[name] for name in expected} == expected
        assert {name: found[name] for name in found.keys() - expected} == {
            name: by_default[name] for name in found.keys() - expected
        }
    assert by_default["mean"] != expected["mean"]
    assert "takes no other preprocessing" in refusal(UsageError, str(path), preprocessing=told)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean 0.5,0.5 is not a number from -1 to 2, one or three of them; give such as 0.485,"),
        ({"mean": 128.0}, "mean 128.0 is not a number from -1 to 2, one"),
        ({"std": (0.2, 0.2, 0.0)}, "std 0.2,0.2,0.0 is not a number from 0.001 to 1000"),
        ({"crop_pct": float("nan")}, "crop_pct nan is not a number from 0.05 to 2; give such as 0.9"),
        ({"crop_pct": 1e-9}, "crop_pct 1e-09 is not a number from 0.05"),
        ({"interpolation": "foo"}, "interpolation 'foo' is none of bicubic, bilinear, "),
    ],
)
def test_preprocessing_that_is_none(told: dict[str, Any], message: str) -> None:
    assert message in refusal(UsageError, "test_vit", pretrained=False, preprocessing=told)


def test_a_folder_with_a_tokencut_file_has_its_recipe(folder: Path, weights: dict[str, Tensor]) -> None:
    spec = f"local-dir:{folder}"
    assert artifact_of(spec) is None and load_model(spec).info is None
    model = compress(load_model(spec).model, keep=0.4, layers=[3], method="topk").eval()
    artifact.save(model, folder / "model.safetensors", force=True)
    loaded = load_model(spec)
    assert artifact_of(spec) == folder / "model.safetensors"
    assert (loaded.name, loaded.recipe) == (spec, model.recipe)
    assert isinstance(loaded.model, CompressedModel) and same_weights(loaded.dense, weights)
    assert loaded.origin.kind == "local-dir"
    assert load_model(spec, weights_needed=False).recipe == model.recipe
    assert "takes no arguments of the architecture" in refusal(UsageError, spec, num_classes=5)
    # Other weights than the file's: of the folder only the architecture counts.
    assert load_model(spec, pretrained=False).recipe is None


def test_a_tokencut_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_model("test_vit", pretrained=False, img_size=64)
    model = compress(source.model, keep=0.5).eval()
    artifact.save(model, tmp_path / "out.safetensors")
    (tmp_path / "out.safetensors").rename(tmp_path / "deit_tiny")
    monkeypatch.chdir(tmp_path)
    loaded = load_model("deit_tiny")
    assert isinstance(loaded.model, CompressedModel)
    assert loaded.recipe == model.recipe
    assert loaded.name == "deit_tiny"
    assert loaded.origin == Origin("random", seed=0)
    assert loaded.dense is loaded.model.model
    assert source.dense is source.model
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.model(images), model(images))
    for options, named in (
        ({"checkpoint": "x.pth"}, "`checkpoint`"),
        ({"pretrained": False}, "`pretrained=False`"),
        ({"num_classes": 3}, "arguments of the architecture"),
    ):
        assert f"takes no {named}; leave that out, or name an architecture as MODEL" in refusal(
            UsageError, "deit_tiny", **options
        )


def test_a_folder_without_a_config_is_none_unless_it_is_called_like_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(UsageError, str(tmp_path))
    assert message.startswith(f"{tmp_path} has no config.json; give a folder as timm or transformers save it")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_vit").mkdir()
    assert load_model("test_vit", pretrained=False).name == "test_vit"


def test_a_folder_with_a_config_needs_no_scheme(
    folder: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(str(folder))
    assert (loaded.name, same_weights(loaded.model, weights)) == (str(folder), True)
    monkeypatch.chdir(folder.parent)
    folder.rename(folder.parent / "deit_tiny")
    assert same_weights(load_model("deit_tiny").model, weights)
    assert artifact_of("deit_tiny") is None
    artifact.save(compress(load_model("deit_tiny").model, keep=0.4), "deit_tiny/model.safetensors", force=True)
    assert artifact_of("deit_tiny") == Path("deit_tiny/model.safetensors")


def test_a_file_of_another_kind(folder: Path) -> None:
    path = folder / "model.safetensors"
    assert refusal(UsageError, str(path)).endswith(f"config.json says what they are: name the folder {folder}")
    (folder / "config.json").unlink()
    assert f"name their architecture and type `checkpoint={str(path)!r}`" in refusal(ArtifactError, str(path))


def test_the_bundled_model() -> None:
    random = load_model("digits", pretrained=False, seed=1)
    assert random.origin == Origin("random", seed=1)
    bundled = load_model("digits")
    assert (bundled.name, bundled.origin.kind, bundled.origin.licence) == ("digits", "bundled", "apache-2.0")
    assert not same_weights(bundled.model, dict(random.model.state_dict()))
    assert bundled.notes == ()
    assert "takes no img_size; leave that out, or name an architecture as MODEL" in refusal(
        UsageError, "digits", img_size=64
    )


def test_a_folder_as_timm_saves_it(folder: Path, weights: dict[str, Tensor]) -> None:
    loaded = load_model(f"local-dir:{folder}")
    assert same_weights(loaded.model, weights)
    assert loaded.name == f"local-dir:{folder}"
    assert loaded.origin == Origin("local-dir", sha256=sha256(folder / "model.safetensors"), licence="mit")
    assert str(folder) not in str(loaded.model.pretrained_cfg)
    assert loaded.model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    new_head = load_model(f"LOCAL_DIR:{folder}", num_classes=3)
    assert new_head.notes == ("the head of 3 classes is new: its weights are random (seed 0) until it is trained",)
    assert torch.equal(new_head.model.norm.weight, weights["norm.weight"])
    random = load_model(f"local-dir:{folder}", weights_needed=False)
    assert random.origin.kind == "random"


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_of_a_compressed_model_by_timms_own_writer(whole: bool, tmp_path: Path) -> None:
    model = compress(load_model("test_vit", pretrained=False, img_size=64, num_classes=3).model, keep=0.5).eval()
    save_for_hf(model if whole else model.model, str(tmp_path), safe_serialization=True)
    loaded = load_model(str(tmp_path))
    assert same_weights(loaded.model, dict(model.model.state_dict()))
    assert loaded.model.patch_embed.img_size == (64, 64)
    assert (
        f"{tmp_path / 'model.safetensors'} has the model under 'model.', which is taken off" in loaded.notes
    ) == whole


def test_a_recipe_without_weights(tmp_path: Path) -> None:
    """As a cost is had of a repository of which only the description is fetched."""
    model = compress(load_model("test_vit", pretrained=False, img_size=64).model, keep=0.4, layers=[3], method="topk")
    export_model(model, tmp_path / "folder", format="timm", limit=1)
    (tmp_path / "folder" / "model.safetensors").unlink()
    spec = str(tmp_path / "folder")
    assert load_model(spec, weights_needed=False).recipe == model.recipe
    assert load_model(spec, weights_needed=False, num_classes=3).recipe is None
    assert load_model(spec, pretrained=False).recipe is None
    assert "there is none of model.safetensors" in refusal(ModelError, spec)
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokencut": {"recipe": {"keep": 0.5}}}))
    assert "the recipe has no field layers; compress the model again" in refusal(
        ArtifactError, spec, weights_needed=False
    )


def test_label_names_that_are_too_few_are_told_of(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "label_names": ["cat", "dog", "hen"]}))
    note = "config.json names 3 classes and the head has 1000: the names are left out"
    assert note in load_model(f"local-dir:{folder}").notes
    assert note not in load_model(f"local-dir:{folder}", num_classes=3).notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "foo"}, "its description's interpolation is 'foo', not one of bicubic, bilinear, nearest"),
        ({"crop_pct": 1e-9}, "its description's crop_pct is 1e-09, not a number from 0.05 to 2; give what its"),
        ({"crop_mode": "foo"}, "its description's crop_mode is 'foo', not one of center, squash, border"),
        ({"mean": "x"}, "its description's mean is 'x', not a list of numbers"),
        ({"std": [0, 0, 0]}, "its description's std is [0, 0, 0], not a list of positive numbers"),
    ],
)
def test_a_description_by_which_no_image_can_be_prepared(folder: Path, change: dict[str, Any], message: str) -> None:
    describe(folder, change)
    with pytest.raises(ModelError) as caught:
        load_model(f"local-dir:{folder}")
    assert message in str(caught.value)


def describe(folder: Path, change: dict[str, Any]) -> None:
    """Changes what a folder's config.json says of its weights."""
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= change
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_that_timm_did_not_save(folder: Path) -> None:
    spec, config = f"local-dir:{folder}", folder / "config.json"
    (folder / "model.safetensors").write_bytes(b"damaged")
    path = folder / "model.safetensors"
    assert f"{path} is not a safetensors file; give" in refusal(ModelError, spec)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n")
    assert f"{path} is a pointer of Git LFS, not the file itself; type git lfs pull where" in refusal(ModelError, spec)
    (folder / "model.safetensors").unlink()
    message = refusal(ModelError, spec)
    assert message.endswith("there is none of model.safetensors, pytorch_model.bin; or give `checkpoint='FILE'`")
    for text in ("{", "[]", "[" * 100_000):
        config.write_text(text)
        assert f"{config} is not a JSON object; save the model again, with timm's save_" in refusal(ModelError, spec)
    config.write_text('{"architecture": 3}')
    assert f"{config} does not name a timm architecture, nor transformers' model_type;" in refusal(ModelError, spec)
    config.write_text('{"architecture": "resnet18"}')
    assert "resnet18 is of timm's family resnet, which is not supported" in refusal(ModelError, spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "`num_classes=-1` is less than 0; type `num_classes=10`"),
        ({"img_size": 0}, "`img_size=0` is less than 1; type `img_size=224`"),
        ({"img_size": 64, "model_kwargs": {"img_size": 32}}, "img_size is given twice, by `img_size=64` and"),
        ({"model_kwargs": {"pretrained": True}}, "pretrained is not an argument of the architecture"),
        ({"model_kwargs": {"embed_dims": 8}}, "test_vit takes no argument 'embed_dims', did you mean embed_dim? its"),
    ],
)  # fmt: skip
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    assert message in refusal(UsageError, "test_vit", pretrained=False, **options)


def test_arguments_reach_timm_and_its_description() -> None:
    loaded = load_model("test_vit", pretrained=False, num_classes=3, img_size=64, model_kwargs={"depth": 2})
    assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert len(loaded.model.blocks) == 2
    assert not loaded.model.training
    cfg = loaded.model.pretrained_cfg
    assert (cfg["input_size"], cfg["num_classes"]) == ((3, 64, 64), 3)
    # The weights are not those that timm describes.
    assert not {"tag", "license", "hf_hub_id"} & set(cfg)


def test_a_model_without_a_head() -> None:
    loaded = load_model("test_vit", pretrained=False, num_classes=0)
    assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 64)


def test_random_weights_go_by_their_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, again = (load_model("test_vit", pretrained=False, seed=5) for _ in range(2))
    other = load_model("test_vit", pretrained=False, seed=6)
    assert same_weights(first.model, dict(again.model.state_dict()))
    assert not same_weights(first.model, dict(other.model.state_dict()))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.origin == Origin("random", seed=5)
    assert first.notes == ("test_vit has random weights (seed 5)",)


def test_real_checkpoints(shared: Path) -> None:
    folder = shared / "checkpoints" / "tin100_deit_tiny"
    by_folder = load_model(f"local-dir:{folder}")
    args = parse_model_kwargs(["img_size=56,patch_size=4"])
    by_file = load_model("deit_tiny", checkpoint=folder / "model.safetensors", num_classes=100, model_kwargs=args)
    assert same_weights(by_folder.model, dict(by_file.model.state_dict()))
    assert same_weights(by_file.model, load_file(folder / "model.safetensors"))
    assert by_folder.model.pretrained_cfg["label_names"][0] == "n01443537"
    assert "for this model" not in refusal(ModelError, "deit_tiny", checkpoint=folder / "model.safetensors")


def test_a_renamed_model_leaves_stderr_clean(capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model("vit_small_patch16_224_dino", weights_needed=False, model_kwargs={"depth": 1})
    assert loaded.name == "vit_small_patch16_224"
    assert loaded.notes[0] == "timm calls vit_small_patch16_224_dino vit_small_patch16_224.dino now"
    assert capfd.readouterr() == ("", "")
