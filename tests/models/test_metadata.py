"""What a file says about its model, and that nothing wrong in it is believed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from model_files import SIZE, compressed_model, metadata_of
from safetensors.torch import load_file, save_file

from tokencut.errors import ArtifactError
from tokencut.model import compress
from tokencut.models import artifact
from tokencut.models.metadata import MAX_LENGTH


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file to be read, not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    artifact.save(compressed_model(), path, measured={"gmacs": 0.01, "top1": 71.5, "images": 600})
    content = path.read_bytes()
    yield path
    assert path.read_bytes() == content


@pytest.fixture
def rewrite(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the saved file anew with its metadata changed."""

    def write(
        edit: Callable[[dict[str, Any]], Any] | None = None,
        text: str | None = None,
    ) -> Path:
        data = json.loads(metadata_of(saved)["tokencut"])
        if edit:
            edit(data)
        path = tmp_path / "edited.safetensors"
        save_file(load_file(saved), path, metadata={"tokencut": json.dumps(data) if text is None else text})
        return path

    return write


def refusal(path: Path, read: Callable[[Path], Any] = artifact.load) -> str:
    with pytest.raises(ArtifactError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_what_the_metadata_says(saved: Path) -> None:
    assert list(metadata_of(saved)) == ["tokencut"]
    text = metadata_of(saved)["tokencut"]
    data = json.loads(text)
    assert text == json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert (data["type"], data["format"], data["architecture"]) == ("compressed-model", 1, "test_vit")
    assert data["model_args"] == {"global_pool": "token", "img_size": [64, 64], "in_chans": 3, "num_classes": 5}
    # ceil(0.5 * 16) = 8, ceil(0.5 * 8) = 4
    assert data["tokens_per_block"] == [16, 8, 8, 4, 4, 4]
    assert data["keep_per_block"] == [1.0, 0.5, 1.0, 0.5, 1.0, 1.0]
    assert data["recipe"] == compressed_model().recipe.to_json()
    assert data["preprocessing"]["input_size"] == [3, 64, 64]
    assert data["preprocessing"]["interpolation"] == "bicubic"
    assert data["label_names"] is None
    assert data["origin"] == {"kind": "unverified", "name": "timm/test_vit.r160_in1k", "sha256": None, "seed": None,
                              "licence": "apache-2.0"}  # fmt: skip
    assert data["measured"] == {"gmacs": 0.01, "images": 600, "top1": 71.5}


def test_keep_per_block_of_reduce_by(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        model = compress(timm.create_model("test_vit", img_size=SIZE), reduce_by=4, layers=[1, 3])
    info = artifact.save(model, tmp_path / "model.safetensors")
    assert info.tokens_per_block == (12, 12, 8, 8, 8, 8)
    assert info.keep_per_block == (12 / 16, 1.0, 8 / 12, 1.0, 1.0, 1.0)
    assert artifact.read_info(tmp_path / "model.safetensors") == info


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "its metadata is not JSON that can be read (Expecting property name"),
        ("[" * 100_000, "its metadata is not JSON that can be read (nested too deep)"),
        ("9" * 5000, "its metadata is not JSON that can be read ("),
        (" " * (MAX_LENGTH + 1), f"its metadata has {MAX_LENGTH + 1} characters, more than {MAX_LENGTH}"),
        ("[]", "its metadata is [], not an object"),
        ("{}", "its metadata's type is None, not 'compressed-model'"),
        ('{"type": "other"}', "its metadata's type is 'other', not 'compressed-model'"),
        ('{"type": "compressed-model", "format": NaN}', "(NaN is not JSON)"),
        ('{"type": "compressed-model", "format": "1"}', "its metadata's format is '1', not 1"),
        ('{"type": "compressed-model", "format": 1}', "its metadata has no field architecture"),
        (
            '{"type": "compressed-model", "format": 2}',
            "has format 2, and this tokencut reads up to 1; type pip install ",
        ),
    ],
)
def test_a_bad_text(rewrite: Callable[..., Path], text: str, message: str) -> None:
    assert message in refusal(rewrite(text=text))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("extra", 1, "its metadata has an unknown field extra"),
        ("architecture", "resnet18", "its metadata's architecture is 'resnet18', not a supported model's name"),
        ("architecture", ["test_vit"], "its metadata's architecture is ['test_vit'], not"),
        ("model_args", [], "its metadata's model_args is [], not an object"),
        ("model_args.checkpoint_path", "x.pth", "checkpoint_path is not an argument of the architecture"),
        ("model_args.pretrained_cfg", {"file": "x"}, "pretrained_cfg is not an argument of the architecture"),
        ("model_args.depth", 7, "its model_args say depth 7, its keep_per_block has 6 blocks"),
        ("model_args.depth", 10**12, "`depth=1000000000000` is not a whole number from 1 to 128"),
        ("preprocessing.crop_pct", 1e-9, "its metadata's preprocessing.crop_pct is 1e-09, not a number from 0.05 to 2"),
        (
            "preprocessing.interpolation",
            "foo",
            "preprocessing.interpolation is 'foo', not one of bicubic",
        ),
        (
            "preprocessing.crop_mode",
            "foo",
            "preprocessing.crop_mode is 'foo', not one of center, squash",
        ),
        ("label_names", ["a", "b"], "its label_names name 2 classes, and its model has 5"),
        ("label_names", {"9" * 5_000: "a"}, "not a list of strings, strings by index, or null"),
        ("label_names", {"²": "a"}, "not a list of strings, strings by index, or null"),
        ("label_names", {"5": "a"}, "its label_names name 1 classes, and its model has 5"),
        ("model_args.init_values", [[[[1]]]], "init_values is [[[[1]]]], which is too large a list"),
        ("model_args.block_fn", "os.system", "timm cannot build test_vit with the arguments"),
        ("model_args.nonsense", 1, "timm cannot build test_vit with the arguments"),
        ("model_args.img_size", 96, "its recipe is for 6 blocks and 16 image tokens, its model has 6 and 36"),
        (
            "model_args.embed_dim",
            128,
            "of another shape: cls_token (1x1x64 in the file, 1x1x128 in the model), pos_embed",
        ),
        ("recipe.keep", 2, "keep 2 is not in (0, 1]"),
        ("recipe.method", "unheard-of", "unknown method 'unheard-of'"),
        ("recipe.method_options", {"nonsense": 1}, "method bat has no setting 'nonsense'"),
        ("keep_per_block", [1.0] * 6, "its keep_per_block or tokens_per_block is not what its recipe says"),
        ("keep_per_block", [1.0] * 7, "its keep_per_block or tokens_per_block is not what its recipe says"),
        ("keep_per_block", [], "its metadata's keep_per_block is [], not a list of up to 1000 float"),
        ("tokens_per_block", [10**400], "is not JSON that can be read (too large a number, 1000"),
        ("preprocessing.mean", "0.5", "its metadata's preprocessing.mean is '0.5', not a list of numbers"),
        (
            "preprocessing.std",
            [0.5, 0, 0.5],
            "its metadata's preprocessing.std is [0.5, 0, 0.5], not a list of positive",
        ),
        (
            "preprocessing.input_size",
            [3, 64],
            "its metadata's preprocessing.input_size is [3, 64], not channels, height",
        ),
        ("preprocessing.crop_pct", 0, "its metadata's preprocessing.crop_pct is 0, not a number from 0.05 to 2"),
        ("preprocessing.nonsense", 0, "its metadata has an unknown field preprocessing.nonsense"),
        ("pretrained_cfg.file", "x.pth", "its metadata has an unknown field pretrained_cfg.file"),
        (
            "pretrained_cfg.test_crop_pct",
            True,
            "its metadata's pretrained_cfg.test_crop_pct is True, not a number or null",
        ),
        (
            "label_names",
            [1, 2],
            "its metadata's label_names is [1, 2], not a list of strings, strings by index, or null",
        ),
        ("label_names", {"x": "y"}, "its metadata's label_names is {'x': 'y'}, not a list of strings"),
        ("origin.kind", "nowhere", "its metadata's origin.kind is 'nowhere', not one of hub, url, checkpoint"),
        ("origin.seed", 1.5, "its metadata's origin.seed is 1.5, not a whole number or null"),
        ("measured.seconds", 3, "its metadata has an unknown field measured.seconds"),
        ("measured.top1", "x" * 500, "xxx..., not a number"),
    ],
)
def test_a_wrong_field(rewrite: Callable[..., Path], field: str, value: Any, message: str) -> None:
    def edit(data: dict[str, Any]) -> None:
        *parents, name = field.split(".")
        for parent in parents:
            data = data[parent]
        data[name] = value

    assert message in refusal(rewrite(edit))


def test_reading_a_file_builds_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("a model was built"))
    info = artifact.read_info(saved)
    assert (info.architecture, info.dtype, info.depth) == ("test_vit", "fp32", 6)
    assert dataclasses.asdict(info.origin)["kind"] == "unverified"
