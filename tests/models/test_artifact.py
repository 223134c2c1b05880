"""The file: it loads the same everywhere, nothing is lost in it, and a bad one is refused in one line."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.utils.prune
from model_files import Payload, compressed_model, images, metadata_of, names_in
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from torch import nn

from tokencut.errors import ArtifactError, UsageError
from tokencut.model import CompressedModel, compress
from tokencut.models import artifact
from tokencut.models.metadata import Origin


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file to be read, not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    artifact.save(compressed_model(), path, measured={"gmacs": 0.01, "top1": 71.5, "images": 600})
    content = path.read_bytes()
    yield path
    assert path.read_bytes() == content


def refusal(path: Path, read: Callable[[Path], Any] = artifact.load) -> str:
    with pytest.raises(ArtifactError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# test_vit2: no class token, a register token, average pooling, LayerScale; test_vit3: attention pooling.
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_vit", {}),
        ("test_vit2", {"num_classes": 0}),
        ("test_vit3", {"embed_dim": 48, "depth": 4}),
        ("deit_tiny_distilled_patch16_224", {"depth": 4, "embed_dim": 48}),
    ],
)
def test_logits_are_the_same_and_timm_takes_the_tensors(tmp_path: Path, name: str, args: dict[str, Any]) -> None:
    model, path = compressed_model(name, **args), tmp_path / "model.safetensors"
    written = artifact.save(model, path)
    loaded = artifact.load(path)
    assert torch.equal(loaded(images()), model(images()))
    assert loaded.recipe == model.recipe
    assert not loaded.training
    assert artifact.read_info(path) == written
    by_timm = timm.create_model(written.architecture, checkpoint_path=path, **written.model_args).eval()
    assert torch.equal(by_timm(images()), model.model(images()))


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    state = torch.random.get_rng_state()
    artifact.load(saved)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import model_files; from tokencut.models import artifact;"
        "artifact.save(model_files.compressed_model(), sys.argv[1], measured={'images': 600, 'top1': 71.5, "
        "'gmacs': 0.01})"
    )
    path = tmp_path / "other.safetensors"
    subprocess.run(
        [sys.executable, "-c", code, str(path), str(Path(__file__).parents[1])],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "12345",
             "PYTHONPATH": str(Path(artifact.__file__).resolve().parents[2])},
    )  # fmt: skip
    assert path.read_bytes() == saved.read_bytes()


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path: Path) -> None:
    model = compressed_model()
    artifact.mark_origin(model.model, Origin("random", seed=3))
    artifact.save(model, tmp_path / "first.safetensors")
    artifact.save(artifact.load(tmp_path / "first.safetensors"), tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    assert artifact.read_info(tmp_path / "second.safetensors").origin == Origin("random", seed=3)


def test_an_origin_given_replaces_the_one_noted(tmp_path: Path) -> None:
    origin = Origin("hub", "timm/test_vit.r160_in1k", licence="apache-2.0")
    info = artifact.save(compressed_model(), tmp_path / "model.safetensors", origin=origin)
    assert info.origin == origin
    assert str(origin) == "hub timm/test_vit.r160_in1k"
    assert str(Origin("random", seed=0)) == "random seed 0"
    assert str(Origin("checkpoint", sha256="ab")) == "checkpoint sha256 ab"


@pytest.mark.parametrize("labels", [list("abcde"), {0: "zero", 4: "four"}], ids=["in order", "by index"])
def test_description_and_labels_survive_a_folder_and_its_path_does_not(tmp_path: Path, labels: Any) -> None:
    source = compressed_model(embed_dim=32, num_heads=2).model
    folder = tmp_path / "secret-folder"
    folder.mkdir()
    save_file(source.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "test_vit",
        "num_classes": 5,
        "model_args": {"img_size": 64, "embed_dim": 32, "num_heads": 2},
        "label_names": labels,
        "pretrained_cfg": {"tag": "mine", "input_size": [3, 64, 64], "fixed_input_size": True, "crop_pct": 0.9,
                           "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear",
                           "num_classes": 5, "license": "mit", "first_conv": "patch_embed.proj", "classifier": "head"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    path = tmp_path / "model.safetensors"
    artifact.save(compress(model, keep=0.5), path)
    assert "secret" not in metadata_of(path)["tokencut"]
    loaded = artifact.load(path)
    cfg = loaded.pretrained_cfg
    expected = timm.data.resolve_model_data_config(model)
    assert timm.data.resolve_model_data_config(loaded) == {**expected, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert [cfg[name] for name in ("input_size", "crop_pct", "interpolation")] == [(3, 64, 64), 0.9, "bilinear"]
    assert [cfg[name] for name in ("license", "tag", "num_classes")] == ["mit", "mine", 5]
    assert cfg["label_names"] == (tuple(labels) if isinstance(labels, list) else labels)
    assert torch.equal(loaded.model(images()), model(images()))


@pytest.mark.parametrize("in_chans", [1, 4])
def test_a_model_of_other_channels_is_described_as_it_was_built(tmp_path: Path, in_chans: int) -> None:
    model = timm.create_model("test_vit", img_size=64, in_chans=in_chans).eval()
    info = artifact.save(compress(model, keep=0.5), tmp_path / "model.safetensors")
    loaded = artifact.load(tmp_path / "model.safetensors")
    assert info.preprocessing["input_size"] == loaded.pretrained_cfg["input_size"] == (in_chans, 64, 64)
    pixels = torch.randn(2, in_chans, 64, 64)
    assert torch.equal(loaded.model(pixels), model(pixels))


def test_label_names_of_another_head_are_not_kept(tmp_path: Path) -> None:
    model = compressed_model()
    model.pretrained_cfg["label_names"] = ["a", "b"]
    assert artifact.save(model, tmp_path / "model.safetensors").label_names is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_half_the_size_and_loads_as_fp32(tmp_path: Path, saved: Path, dtype: Any) -> None:
    path = tmp_path / "model.safetensors"
    artifact.save(compressed_model(), path, dtype=dtype)
    assert path.stat().st_size < 0.52 * saved.stat().st_size
    first, second = artifact.load(path), artifact.load(path)
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    assert torch.equal(first(images()), second(images()))
    weight, kind = "model.blocks.0.attn.qkv.weight", {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert torch.equal(first.state_dict()[weight], compressed_model().state_dict()[weight].to(kind).float())
    info = artifact.read_info(path)
    assert info.dtype == dtype
    assert info.parameters == sum(p.numel() for p in first.parameters())


def test_fp16_does_not_swallow_large_weights(tmp_path: Path) -> None:
    model = compressed_model()
    with torch.no_grad():
        model.model.head.bias[0] = 1e5
    with pytest.raises(
        ArtifactError, match=r"head\.bias holds values beyond fp16's largest, 65504; type `dtype='bf16'`"
    ):
        artifact.save(model, tmp_path / "model.safetensors", dtype="fp16")
    assert names_in(tmp_path) == []


def test_what_a_stage_has_learned_is_stored_under_its_own_prefix(tmp_path: Path) -> None:
    model, path = compressed_model(method="dyvit"), tmp_path / "model.safetensors"
    with torch.no_grad():
        for parameter in model.stages.parameters():
            parameter.add_(0.25)
    artifact.save(model, path)
    own = {name for name in load_file(path) if name not in model.model.state_dict()}
    assert own == {f"tokencut.stages.{name}" for name in model.stages.state_dict()}
    assert own
    loaded = artifact.load(path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(images()), model(images()))


def test_buffers_that_no_file_holds_are_not_lost(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def with_buffer(*args: Any, **kwargs: Any) -> nn.Module:
        model = create(*args, **kwargs)
        model.register_buffer("table", torch.arange(3), persistent=False)
        return model

    monkeypatch.setattr(timm, "create_model", with_buffer)
    loaded = artifact.load(saved)
    assert loaded.model.table.tolist() == [0, 1, 2]
    assert torch.equal(loaded(images()), compressed_model()(images()))


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    model, old = compressed_model(), tmp_path / "old.safetensors"
    old.write_bytes(b"old")
    cases = {
        old: f"{old} exists; add `force=True` to replace it, or give another `path`",
        tmp_path / "no" / "out.safetensors": "does not exist; create it first",
    }
    for path, message in cases.items():
        for write in (lambda p: artifact.save(model, p), artifact.check_output):
            assert message in refusal(path, write)
    wrong = "out.bin does not end in .safetensors, by which timm and others tell the format; type "
    wrong += f"`path={str(tmp_path / 'out.safetensors')!r}`"
    for write in (lambda p: artifact.save(model, p), artifact.check_output):
        with pytest.raises(UsageError) as caught:
            write(tmp_path / "out.bin")
        assert wrong in str(caught.value)
    assert old.read_bytes() == b"old"
    assert names_in(tmp_path) == ["old.safetensors"]
    artifact.save(model, old, force=True)
    assert artifact.load(old).recipe == model.recipe


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
     SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")],
    ids=["from the system", "through safetensors"],
)  # fmt: skip
def test_disk_full_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def half(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(artifact, "save_file", half)
    old = tmp_path / "old.safetensors"
    old.write_bytes(b"old")
    for path in (old, tmp_path / "new.safetensors"):
        message = refusal(path, lambda p: artifact.save(compressed_model(), p, force=True))
        assert message == f"cannot write {path}: No space left on device; nothing was written"
    assert old.read_bytes() == b"old"
    assert names_in(tmp_path) == ["old.safetensors"]


def test_a_model_that_could_not_be_built_again_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(
        ArtifactError, match=r"the model's argument block_fn is <class .*, which is a type, not a plain value"
    ):
        artifact.save(compressed_model(block_fn=ParallelThingsBlock), path)
    odd = compressed_model()
    odd.model.pretrained_cfg["crop_pct"] = "all"
    with pytest.raises(ArtifactError, match=r"would not load again: .* preprocessing\.crop_pct is 'all', not"):
        artifact.save(odd, path)
    changed = compressed_model()
    changed.model.norm = nn.LayerNorm(9)
    with pytest.raises(ArtifactError, match=r"built it \(2 of another shape: norm\.weight \(9 in the file, 64 in"):
        artifact.save(changed, path)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of fp32, bf16, fp16; type dtype='bf16'"),
        ({"measured": {"seconds": 3.0}}, "measured has an unknown field seconds; give some of dense_gmacs, gmacs"),
        ({"measured": {"top1": "70"}}, "measured's top1 is '70', not a number"),
        ({"measured": {"top1": float("nan")}}, "measured's top1 is nan, not a number"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        artifact.save(compressed_model(), tmp_path / "model.safetensors", **arguments)
    assert message in str(caught.value)


def test_a_model_built_by_hand_is_saved_as_the_refusal_says(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    by_hand = VisionTransformer(
        img_size=32, patch_size=8, in_chans=1, embed_dim=12, num_heads=2, depth=3, num_classes=4
    )
    model = compress(by_hand.eval(), keep=0.5, layers=[2])
    with pytest.raises(ArtifactError, match=r"this VisionTransformer was not built by timm\.create_model") as caught:
        artifact.save(model, path)
    assert (
        "`new = timm.create_model('vit_base_patch16_224', img_size=32, patch_size=8, in_chans=1, num_classes=4, "
        "embed_dim=12, depth=3, num_heads=2, ...)`" in str(caught.value)
    )
    new = timm.create_model("vit_base_patch16_224", img_size=32, patch_size=8, in_chans=1, num_classes=4, embed_dim=12,
                            depth=3, num_heads=2)  # fmt: skip
    new.load_state_dict(model.model.state_dict())
    artifact.save(CompressedModel(new, model.recipe), path)
    pixels = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(artifact.load(path)(pixels), model(pixels), rtol=1e-4, atol=1e-5)


def test_only_a_compressed_model_is_saved(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", compressed_model()
    with pytest.raises(UsageError, match=r"this Linear is none; type `model = tokencut\.compress\(model, keep=0\.7\)`"):
        artifact.save(nn.Linear(1, 1), path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"this Sequential is something around a model; pass that, `model\.get_sub"):
        artifact.save(nn.Sequential(model), path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="this dict is none"):
        artifact.save({}, path)  # type: ignore[arg-type]
    artifact.save(nn.DataParallel(model), path)  # type: ignore[arg-type]
    assert torch.equal(artifact.load(path)(images()), model(images()))


def test_blocks_that_are_compiled_are_saved_under_their_own_names(tmp_path: Path) -> None:
    model, path = compressed_model(), tmp_path / "model.safetensors"
    artifact.save(model, path)
    for number, block in enumerate(model.model.blocks):
        model.model.blocks[number] = torch.compile(block)
    artifact.save(torch.compile(model), tmp_path / "compiled.safetensors")  # type: ignore[arg-type]
    assert (tmp_path / "compiled.safetensors").read_bytes() == path.read_bytes()


def test_tied_weights_are_stored_once_for_each_name(tmp_path: Path) -> None:
    model, path = compressed_model(), tmp_path / "model.safetensors"
    model.model.blocks[0].mlp.fc1.weight = model.model.blocks[1].mlp.fc1.weight
    artifact.save(model, path)
    assert torch.equal(artifact.load(path)(images()), model(images()))
    stored = load_file(path)
    assert torch.equal(stored["blocks.0.mlp.fc1.weight"], stored["blocks.1.mlp.fc1.weight"])


def spectral(linear: nn.Linear) -> object:
    return nn.utils.parametrizations.spectral_norm(linear)


def pruned(linear: nn.Linear) -> object:
    return torch.nn.utils.prune.l1_unstructured(linear, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "how", "unwrap"),
    [
        (spectral, "parametrize.remove_parametrizations(module, 'weight')",
         lambda linear: nn.utils.parametrize.remove_parametrizations(linear, "weight")),
        (nn.utils.weight_norm, "torch.nn.utils.remove_weight_norm(module)", nn.utils.remove_weight_norm),
        (pruned, "torch.nn.utils.prune.remove(module, 'weight')",
         lambda linear: torch.nn.utils.prune.remove(linear, "weight")),
    ],
)  # fmt: skip
def test_weights_made_of_others_are_refused_with_the_way_out(
    tmp_path: Path, wrap: Callable[[nn.Linear], object], how: str, unwrap: Callable[[nn.Linear], object]
) -> None:
    model, path = compressed_model(), tmp_path / "model.safetensors"
    wrap(model.model.blocks[0].mlp.fc1)
    model.eval()
    logits = model(images())
    with pytest.raises(ArtifactError, match="make up its weights; join them by ") as caught:
        artifact.save(model, path)
    assert how in str(caught.value)
    unwrap(model.model.blocks[0].mlp.fc1)
    artifact.save(model, path)
    torch.testing.assert_close(artifact.load(path)(images()), logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_that_peft_adds_to_are_refused_with_the_way_out(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], init_lora_weights=False)
    around, path = peft.get_peft_model(compressed_model(), settings).eval(), tmp_path / "model.safetensors"
    logits = around(images())
    with pytest.raises(
        UsageError, match=r"save takes a compressed model, and this PeftModel .*model.merge_and_unload\(\)"
    ):
        artifact.save(around, path)
    with pytest.raises(ArtifactError, match=r"join them by peft's model.merge_and_unload\(\), then save it"):
        artifact.save(around.base_model.model, path)
    artifact.save(around.merge_and_unload(), path)
    torch.testing.assert_close(artifact.load(path)(images()), logits)


def test_a_measurement_without_a_value_is_left_out(tmp_path: Path) -> None:
    info = artifact.save(compressed_model(), tmp_path / "model.safetensors", measured={"gmacs": 1.5, "top1": None})
    assert dict(info.measured) == {"gmacs": 1.5}


def test_files_of_other_kinds(tmp_path: Path, saved: Path) -> None:
    content = saved.read_bytes()
    torch.save({"weight": torch.zeros(2)}, tmp_path / "zip.safetensors")
    cases = {
        "cut-data": (content[:-100], "is truncated or damaged ("),
        "cut-header": (content[:200], "is truncated or damaged ("),
        "empty": (b"", "is empty; give a file that `tokencut.save(model, 'FILE')` wrote"),
        "text": (b"just some text, and more of it\n" * 9, "is not a safetensors file; give a file that"),
        "pickle": (pickle.dumps(Payload(tmp_path / "ran")), "is a pickled PyTorch file, not safetensors; name its"),
        "zip": ((tmp_path / "zip.safetensors").read_bytes(), f"as `checkpoint={str(tmp_path / 'zip.pth')!r}`"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        for read in (artifact.load, artifact.read_info):
            assert message in refusal(path, read)
    assert not (tmp_path / "ran").exists()
    missing = tmp_path / "missing.safetensors"
    for read in (artifact.load, artifact.read_info):
        with pytest.raises(UsageError) as caught:
            read(missing)
        assert (
            str(caught.value) == f"{missing} does not exist; type `tokencut.save(model, {str(missing)!r})` to make one"
        )
        with pytest.raises(UsageError, match="is a folder, not a file; type"):
            read(tmp_path)


def test_weights_without_a_recipe_are_called_so(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    for other in (None, {"format": "pt"}):
        save_file({"head.weight": torch.zeros(2)}, path, metadata=other)
        assert refusal(path).endswith(f"name their architecture and type `checkpoint={str(path)!r}`")


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_types_for_no_weights_are_refused(saved: Path, tmp_path: Path, kind: torch.dtype) -> None:
    tensors, path = load_file(saved), tmp_path / "edited.safetensors"
    tensors["head.weight"] = tensors["head.weight"].to(kind)
    save_file(tensors, path, metadata=metadata_of(saved))
    assert "its tensors are not as they were written: 1 in a type for no weights: head.weight (" in refusal(path)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_types_for_weights_are_taken(saved: Path, tmp_path: Path, kind: torch.dtype) -> None:
    tensors, path = load_file(saved), tmp_path / "edited.safetensors"
    tensors["head.weight"] = tensors["head.weight"].to(kind)
    save_file(tensors, path, metadata=metadata_of(saved))
    assert torch.equal(artifact.load(path).model.head.weight, tensors["head.weight"].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(saved: Path, tmp_path: Path, value: float) -> None:
    tensors, path = load_file(saved), tmp_path / "edited.safetensors"
    tensors["blocks.3.norm1.weight"][2] = value
    save_file(tensors, path, metadata=metadata_of(saved))
    assert refusal(path).endswith(
        "its weights cannot be used: 1 with numbers that are not finite: blocks.3.norm1.weight; compress a model with "
        "other weights"
    )


def test_all_wrong_tensors_are_named_at_once(saved: Path, tmp_path: Path) -> None:
    tensors, path = load_file(saved), tmp_path / "edited.safetensors"
    for block in range(4):
        del tensors[f"blocks.{block}.norm1.weight"]
    tensors["tokencut.stages.2.gate"] = torch.zeros(2)
    tensors["head.bias"] = torch.zeros(6)
    save_file(tensors, path, metadata=metadata_of(saved))
    assert refusal(path) == (
        f"cannot load {path}: its tensors are not those of its model: 4 missing: blocks.0.norm1.weight, "
        "blocks.1.norm1.weight, blocks.2.norm1.weight, blocks.3.norm1.weight; 1 unexpected: tokencut.stages.2.gate; "
        "1 of another shape: head.bias (6 in the file, 5 in the model); compress the model again"
    )


def test_a_real_checkpoint(shared: Path, tmp_path: Path) -> None:
    folder = shared / "checkpoints" / "cifar10_vit"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    compressed, path = compress(model, keep=0.7), tmp_path / "model.safetensors"
    info = artifact.save(compressed, path)
    assert info.label_names == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    assert torch.equal(artifact.load(path)(images(32)), compressed(images(32)))
    by_timm = timm.create_model(info.architecture, checkpoint_path=path, **info.model_args).eval()
    assert torch.equal(by_timm(images(32)), model(images(32)))
    assert str(folder.parent) not in metadata_of(path)["tokencut"]
