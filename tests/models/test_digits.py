"""The bundled images and model: the split stays as it was written down, and the model is as good as we say."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from tokencut.errors import DataError, UsageError
from tokencut.models import digits


def test_stratified_gives_every_class_its_share() -> None:
    # 10 of 20 from classes of 9, 7, 4: shares 4.5, 3.5, 2. The one left over goes to the lower class of equals.
    labels = [0] * 9 + [1] * 7 + [2] * 4
    drawn = digits.stratified(labels, 10, seed=0)
    assert Counter(labels[index] for index in drawn) == {0: 5, 1: 3, 2: 2}
    assert drawn == sorted(set(drawn))
    assert drawn == digits.stratified(labels, 10, seed=0)
    assert drawn != digits.stratified(labels, 10, seed=1)


@pytest.mark.parametrize("count", [0, 20])
def test_stratified_draws_none_or_all(count: int) -> None:
    assert digits.stratified([0] * 9 + [1] * 7 + [2] * 4, count, seed=0) == list(range(count))


def test_split_sizes_and_classes() -> None:
    train, train_labels = digits.images("train")
    test, test_labels = digits.images("test")
    assert (len(train), len(test)) == (1197, 600)
    # scikit-learn's classes hold 178 182 177 183 181 182 181 179 174 180 images; a third of each is 58.1 to 61.1.
    assert set(Counter(test_labels).values()) <= {58, 59, 60, 61, 62}
    assert set(train_labels) == set(test_labels) == set(range(10))
    assert {(image.mode, image.size) for image in train + test} == {("RGB", (8, 8))}
    assert max(high for image in test for _, high in image.getextrema()) == 255


def test_split_never_changes() -> None:
    """The test images and labels, to the byte: accuracies stay comparable between versions."""
    images, labels = digits.images("test")
    content = hashlib.sha256(b"".join(image.tobytes() for image in images) + bytes(labels)).hexdigest()
    assert content == "1162c576a9575433469f3d499bcc310ee900b820b1863dd04a3be44643cffa7c"


def test_unknown_split() -> None:
    with pytest.raises(UsageError) as error:
        digits.images("val")
    assert str(error.value) == (
        "unknown split 'val' of the digits, expected 'train' or 'test'; type digits.images('test')"
    )


def test_missing_scikit_learn_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError) as error:
        digits.images("test")
    assert str(error.value) == (
        "the digits images come with scikit-learn, which is not installed; type pip install 'tokencut[digits]'"
    )


def test_model_is_the_one_described() -> None:
    model = digits.create()
    assert len(model.blocks) == 12
    assert (model.patch_embed.num_patches, model.num_prefix_tokens, model.num_classes) == (64, 1, 10)
    assert tuple(model.pretrained_cfg["label_names"]) == digits.LABELS
    assert not model.training
    assert digits.WEIGHTS.stat().st_size + digits.CONFIG.stat().st_size < 2_000_000


def test_weights_are_timms_own_and_random_without_them() -> None:
    saved = load_file(digits.WEIGHTS)
    loaded, random = digits.create().state_dict(), digits.create(pretrained=False).state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) and saved[name].dtype == torch.float32 for name in saved)
    assert not torch.equal(random["patch_embed.proj.weight"], saved["patch_embed.proj.weight"])


def test_loading_is_strict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = load_file(digits.WEIGHTS)
    del tensors["norm.bias"]
    save_file(tensors, tmp_path / "part.safetensors")
    monkeypatch.setattr(digits, "WEIGHTS", tmp_path / "part.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing key.*norm\.bias"):
        digits.create()


def test_files_work_as_a_local_dir_of_timm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(digits.CONFIG.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(digits.WEIGHTS.read_bytes())
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    ours = digits.create()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(theirs(images), ours(images))
    assert resolve_model_data_config(theirs) == resolve_model_data_config(ours)
    assert theirs.pretrained_cfg["label_names"] == ours.pretrained_cfg["label_names"]


def test_dense_accuracy_on_the_test_images() -> None:
    model = digits.create()
    transform = create_transform(**resolve_model_data_config(model))
    images, labels = digits.images("test")
    with torch.inference_mode():
        predicted = model(torch.stack([transform(image) for image in images])).argmax(dim=1)
    correct = int((predicted == torch.tensor(labels)).sum())
    # 591 of 600 where it was trained, 98.5 %; one image of slack for another machine's rounding.
    assert abs(correct - 591) <= 1


def test_training_script_gives_the_same_bytes_again(
    monkeypatch: pytest.MonkeyPatch, run_script: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "train_digits.py"
    images, labels = digits.images("train")
    monkeypatch.setattr(digits, "images", lambda split: (images[::6], labels[::6]))
    threads = torch.get_num_threads()
    try:
        for name in ("one", "two"):
            run_script(script, "--hold-out", "100", "--epochs", "1", "-o", tmp_path / name)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert load_file(tmp_path / "one").keys() == load_file(digits.WEIGHTS).keys()
