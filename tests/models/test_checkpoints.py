"""Files of weights: every form that is read, and what is wrong with those that are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import Payload, random_weights, same_weights, write_model_folder
from safetensors.torch import save_file
from torch import Tensor

from tokencut.errors import ModelError
from tokencut.models import artifact
from tokencut.models.checkpoints import not_finite, sha256
from tokencut.models.loading import load_model
from tokencut.models.metadata import Origin


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights()


def refusal(checkpoint: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model("test_vit", checkpoint=checkpoint, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "plain.pth", "training.pth.tar", "no-suffix", "artifact"])
def test_checkpoints_of_every_form(name: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / name
    if name in ("model.safetensors", "no-suffix"):
        save_file(weights, path)
    elif name == "artifact":
        path = tmp_path / "artifact.safetensors"
        save_file({**weights, "tokencut.stages.1.learned.weight": torch.zeros(2)}, path)
    elif name == "plain.pth":
        torch.save(weights, path)
    else:
        wrapped = {f"module.{key}": tensor for key, tensor in weights.items()}
        torch.save({"state_dict": {}, "state_dict_ema": wrapped, "epoch": 3}, path)
    loaded = load_model("test_vit", checkpoint=path)
    assert same_weights(loaded.model, weights)
    assert loaded.origin == Origin("checkpoint", sha256=sha256(path))
    assert artifact.origin_of(loaded.model) == loaded.origin
    assert "license" not in loaded.model.pretrained_cfg


def test_weights_that_are_none(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for name, tensor, told in (
        ("head.bias", weights["head.bias"].long(), "1 in a type for no weights: head.bias (int64)"),
        ("head.bias", weights["head.bias"] + float("nan"), "1 with numbers that are not finite: head.bias"),
    ):
        save_file({**weights, name: tensor}, path)
        assert refusal(path) == f"the weights in {path} cannot be used: {told}; give another file"


def test_a_folder_whose_weights_are_none(weights: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "saved", {**weights, "head.bias": weights["head.bias"] / 0})
    with pytest.raises(ModelError, match=r"1 with numbers that are not finite: head\.bias; give another file"):
        load_model(f"local-dir:{folder}")


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    def made(name: str, write: Callable[[Path], Any]) -> Path:
        write(tmp_path / name)
        return tmp_path / name

    cases = {
        tmp_path / "no.pth": "no.pth does not exist; give a file of weights: `checkpoint='model.safetensors'`",
        tmp_path: "is a folder; give a file of weights",
        made("text.pth", lambda path: path.write_text("weights " * 99)): "is not a file of weights that can be",
        made("code.pth", lambda path: torch.save({"a": Payload(tmp_path / "ran")}, path)): "holds no weights; it has",
        made("pickle.safetensors", lambda path: torch.save({}, path)): f"`checkpoint={str(tmp_path / 'pickle.pth')!r}`",
        made("none.pth", lambda path: torch.save({}, path)): "none.pth holds no weights; give a file whose content",
        made("numbers.pth", lambda path: torch.save({"a": 1}, path)): "numbers.pth holds no weights",
        made("list.pth", lambda path: torch.save([1], path)): "list.pth",
        made("cut.safetensors", lambda path: path.write_bytes(b"\x20" + bytes(7) + b"{")): "is truncated or damaged (",
    }  # fmt: skip
    for path, message in cases.items():
        assert message in refusal(path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_shape(weights: dict[str, Tensor], tmp_path: Path) -> None:
    def refused(change: Callable[[dict[str, Tensor]], Any], **options: Any) -> str:
        changed, path = dict(weights), tmp_path / "changed.safetensors"
        change(changed)
        save_file(changed, path)
        return refusal(path, **options).removeprefix(f"{path} does not fit this model: ")

    shapes = "head.weight (1000x64 in the file, 10x64 in the model), head.bias (1000 in the file, 10 in the model)"
    assert refused(lambda _: None, num_classes=10) == (
        f"2 of another shape: {shapes}; its head has 1000 classes: type `num_classes=1000`"
    )
    assert refused(lambda tensors: tensors.update(pos_embed=torch.zeros(1, 101, 3)), num_classes=10) == (
        f"3 of another shape: pos_embed (1x101x3 in the file, 1x101x64 in the model), {shapes}; its head has 1000 "
        "classes: type `num_classes=1000`, and the arguments it was trained with (`img_size`, `model_kwargs`)"
    )
    assert refused(lambda tensors: [tensors.pop("head.weight"), tensors.pop("head.bias")]) == (
        "2 missing: head.weight, head.bias; it has no head: type `num_classes=0`, or train one "
        "(`epochs=5`, `train_data='DIR'`)"
    )
    assert refused(lambda tensors: tensors.update(extra=torch.zeros(1)), model_kwargs={"depth": 7}) == (
        "12 missing: blocks.6.norm1.weight, blocks.6.norm1.bias, blocks.6.attn.qkv.weight and 9 more; "
        "1 unexpected: extra; name the model it was made for, with the arguments it was trained with "
        "(`img_size`, `model_kwargs`)"
    )


def test_a_limit_that_limits_nothing_is_no_damage() -> None:
    assert not_finite({"input_max": torch.tensor(float("inf")), "weight": torch.ones(2)}) is None
    wrong = not_finite({"scale": torch.tensor(float("nan")), "weight": torch.tensor([float("inf")])})
    assert wrong == "2 with numbers that are not finite: scale, weight"
