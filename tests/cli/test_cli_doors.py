"""Weights from elsewhere at the command line: what is told of them, and what `info` shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from model_files import write_transformers_folder
from outcome import Outcome

Run = Callable[..., Outcome]


def test_a_transformers_folder(run: Run, tmp_path: Path) -> None:
    write_transformers_folder(tmp_path / "model")
    out = tmp_path / "out.safetensors"
    done = run("compress", tmp_path / "model", "--keep", "0.5", "--layers", "1", "-o", out)
    assert (done.code, done.notes[0]) == (
        0,
        "there is no preprocessor_config.json: taking what transformers has for this type, mean 0.5,0.5,0.5, std "
        "0.5,0.5,0.5",
    )
    told = run("info", out).out
    for row in ("cat, dog, hen", "local-dir transformers ViTForImageClassification sha256", "squash"):
        assert row in told
    assert "not timm's own" not in told  # its epsilon is timm's
    dense, folder = (run("profile", spec, "--no-latency", "--json").json["dense"] for spec in (out, tmp_path / "model"))
    assert dense == folder


def test_what_timm_has_no_argument_for_is_told(run: Run, tmp_path: Path) -> None:
    _, config = write_transformers_folder(tmp_path / "model")
    text = (tmp_path / "model" / "config.json").read_text().replace("1e-06", "1e-12")
    (tmp_path / "model" / "config.json").write_text(text)
    out = tmp_path / "out.safetensors"
    assert run("compress", tmp_path / "model", "--keep", "0.5", "--layers", "1", "-o", out).code == 0
    assert any(line.split() == ["not", "timm's", "own", "norm_eps=1e-12"] for line in run("info", out).out.splitlines())
    assert config["layer_norm_eps"] == 1e-6


def test_a_checkpoint_says_nothing_of_its_preprocessing_and_a_folder_does(run: Run, tmp_path: Path) -> None:
    model, _ = write_transformers_folder(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    words = ["compress", "vit_base_patch16_224", "--keep", "0.5", "--layers", "1", "--model-kwargs",
             "embed_dim=24,depth=2,num_heads=3", "--img-size", "32", "--num-classes", "3"]  # fmt: skip
    assumed = "does not say how its images were prepared: taking what timm has for vit_base_patch16_224"
    for file, told in ((tmp_path / "timm.pth", True), (tmp_path / "model" / "model.safetensors", False)):
        done = run(*words, "--checkpoint", file, "-o", tmp_path / f"{file.stem}-out.safetensors")
        assert done.code == 0, done.err
        assert (assumed in done.err) == told
