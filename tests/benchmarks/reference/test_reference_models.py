"""The reference models: dry runs on images made here, figures worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_files import greys, write_folder
from PIL import Image
from reference import augment, loop, pixels, shards, train
from reference_runs import CLASSES, STILL, arguments

from tokencut.data.preprocessing import preprocessing_of
from tokencut.data.sources import open_source
from tokencut.errors import ArtifactError, TokencutError
from tokencut.evaluation.accuracy import evaluate
from tokencut.models.loading import load_model

# Images in memory, and what is done to them.


def test_images_are_held_as_bytes_with_their_classes(tmp_path: Path) -> None:
    greys(tmp_path / "greys", {"dark": [51, 51], "light": [204]})
    held = pixels.read(str(tmp_path / "greys"), 12, workers=0)
    assert held.classes == ("dark", "light")
    assert held.labels.tolist() == [0, 0, 1]
    assert held.images.dtype == torch.uint8 and held.images.shape == (3, 3, 12, 12)
    assert held.images[:, 0, 5, 5].tolist() == [51, 51, 204]
    # 0.2, 0.2 and 0.8: mean 0.4; squares of the distances 0.04, 0.04, 0.16: mean 0.08.
    assert held.statistics() == ([0.4] * 3, [round(math.sqrt(0.08), 3)] * 3)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "bad", CLASSES, images=1)
    (tmp_path / "bad" / "bee" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(TokencutError, match=r"'bee/1.jpg' in .* cannot be decoded .*; mend it or take it out"):
        pixels.read(str(tmp_path / "bad"), 12, workers=0)


def test_with_nothing_to_do_a_crop_is_the_image() -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 12, 12)
    assert augment.crop(images, 12, STILL) == pytest.approx(images, abs=1e-5)
    assert augment.crop(images, 12, replace(STILL, hflip=1)) == pytest.approx(images.flip(3), abs=1e-5)
    assert augment.colour(images, STILL) == pytest.approx(images, abs=1e-5)
    assert torch.equal(augment.erase(images, 0), images)


def test_each_image_has_random_numbers_of_its_own() -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 3, 16, 16).expand(64, -1, -1, -1).contiguous()
    crops = augment.crop(images, 16, augment.Augmentation())
    assert len({tuple(image.flatten().tolist()) for image in crops}) == 64
    assert crops.min() >= 0 and crops.max() <= 1
    coloured = augment.colour(images, replace(augment.Augmentation(), jitter=0))
    grey = (coloured.amax(dim=1) - coloured.amin(dim=1)).flatten(1).amax(dim=1) < 1e-6
    same = (coloured - images).abs().flatten(1).amax(dim=1) < 1e-6
    assert 5 <= grey.sum() <= 22 and 15 <= same.sum() <= 37  # of 64: a fifth, and two fifths left as they were


def test_erased_boxes_have_the_area_asked_for() -> None:
    torch.manual_seed(0)
    share = (augment.erase(torch.zeros(200, 1, 32, 32), 1.0) != 0).float().mean(dim=(1, 2, 3))
    # Boxes that would stick out are cut, and edges fall between pixels: some room on both sides.
    assert share.min() > 0.01 and share.max() < 0.36
    assert (augment.erase(torch.zeros(400, 1, 8, 8), 0.25) != 0).flatten(1).any(dim=1).sum() in range(60, 140)


def test_small_images_and_whole_ones() -> None:
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    assert augment.augment(images, 16, mean, std, augment.Augmentation()).shape == (2, 3, 16, 16)
    assert augment.augment(images, 16, mean, std, augment.Augmentation(), small=8).shape == (2, 3, 8, 8)


def test_enlarged_images_are_pillows() -> None:
    torch.manual_seed(0)
    # No contrast so hard that Pillow clips between its two passes.
    pixels = (64 + 128 * torch.rand(12, 12, 3)).byte().numpy()
    theirs = torch.from_numpy(np.array(Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC)))
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    assert augment.enlarge(images / 255, 4) * 255 == pytest.approx(theirs.permute(2, 0, 1)[None].float(), abs=1.1)
    still = augment.augment(images, 48, torch.zeros(3), torch.ones(3), STILL, times=4)
    middle = augment.centre(images, 32, torch.zeros(3), torch.ones(3), times=4)
    assert still[..., 8:40, 8:40] == pytest.approx(middle, abs=1e-5)


def test_blocks_of_all_stages_are_trained_alike() -> None:
    model = timm.create_model("pvt_v2_b0", depths=(1, 2, 1, 1), embed_dims=(8, 16, 16, 16), num_heads=1, num_classes=3)
    assert loop.blocks_of(model) == [block for stage in model.stages for block in stage.blocks]


# Models in files.


def test_parts_of_a_model_come_together_as_the_whole(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(f"local-dir:{trained}").dense
    monkeypatch.setattr(shards, "PART_BYTES", 9000)
    parts = shards.write(tmp_path / "parts", {"any": 1}, model.state_dict(), parts=True)
    assert [path.name for path in parts][:1] == [f"model-00001-of-{len(parts):05}.safetensors"]
    assert len(parts) > 1 and all(path.stat().st_size < 12_000 for path in parts)
    whole = shards.assemble(tmp_path / "parts")
    # To the byte, so that `claims` knows them for the same model.
    assert whole.read_bytes() == (trained / "model.safetensors").read_bytes()
    parts[1].unlink()
    with pytest.raises(ArtifactError, match=rf"does not hold one whole model: {parts[1].name} is missing; copy all"):
        shards.assemble(tmp_path / "parts")
    with pytest.raises(ArtifactError, match=r"holds no model.safetensors and no parts of one, such as"):
        shards.assemble(tmp_path)
    assert shards.assemble(trained) == trained / "model.safetensors"


def test_a_written_model_is_one_for_tokencut_with_the_same_accuracy(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.Run(arguments(data, tmp_path / "run", "--ship", str(tmp_path / "ship"), "--judge-every", "1")).go()
    said = capsys.readouterr().out
    loaded = load_model(f"local-dir:{tmp_path / 'run'}").dense
    score = evaluate(loaded, data / "val", workers=0, device="cpu")
    assert f"{score.top1:.2f} % top-1 on 12 images in fp32, as stored, after 3 of 3 epochs" in said
    assert loaded.patch_embed.num_patches == 16
    # What the script judges by is what tokencut's preprocessing gives.
    held = pixels.read(str(data / "val"), 20, workers=0)
    prepared = preprocessing_of(loaded)
    source = open_source(data / "val")
    with source.open(5) as file:
        from tokencut.data.preprocessing import decode

        theirs = prepared.normalise(prepared.transform()(decode(file))[None], torch.device("cpu"))
    mean, std = (torch.tensor(prepared.config[name]) for name in ("mean", "std"))
    # 40 x 32 px are scaled to 25 x 20 by both; a rounding of a byte apart is 1 / 255 / 0.2.
    assert augment.centre(held.images[5:6], 16, mean, std) == pytest.approx(theirs, abs=0.06)
    assert sorted(path.name for path in (tmp_path / "ship").iterdir()) == [
        "config.json",
        "log.csv",
        "model.safetensors",
    ]


# The training loop.


def test_a_run_that_is_cut_goes_on_as_if_it_had_not_been(
    data: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--small", "8", "--patch-drop-share", "0.6")
    cut = train.Run(arguments(data, tmp_path / "run", *words))
    monkeypatch.setattr(train.Run, "_left", lambda run: math.inf if run.training.epoch < 1 else -1.0)
    assert not cut.go()
    assert "after 1 of 3 epochs" in (said := capsys.readouterr().out) and "type the same with --resume to go on" in said
    monkeypatch.undo()
    assert train.Run(arguments(data, tmp_path / "run", *words, "--resume")).go()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert not (tmp_path / "run" / "resume.pt").exists()
    log = (trained / "log.csv").read_text().splitlines()
    assert [line.split(",")[3:5] for line in log[1:]] == [["8", "0.5"], ["8", "0.5"], ["16", "0.0"]]
    with pytest.raises(TokencutError, match=r"holds a finished run; leave --resume out to start again"):
        train.Run(arguments(data, tmp_path / "run", "--resume"))


def test_a_plan_fits_the_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train.Run(arguments(data, tmp_path, "--epochs", "100", "--patch-drop-share", "0.75")).training
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    assert training._time(0, 0.5, steps=1) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in training.model.state_dict().items())
    # 3 steps an epoch of 2 s in three quarters of the epochs, of 6 s in the others: 9 s an epoch on average.
    monkeypatch.setattr(training, "_time", lambda small, drop: 2.0 if drop else 6.0)
    assert training.plan(100, 9 * 50 / loop.PLANNED_SHARE + 1) == 50
    assert training.plan(100, 1e6) == 100


def test_a_compiler_that_fails_is_done_without(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train.Run(arguments(data, tmp_path)).training
    notes: list[str] = []
    training.note = notes.append

    def broken(*_: Any, **__: Any) -> float:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **_: setattr(block, "_compiled_call_impl", print))
    monkeypatch.setattr(training, "_time", broken)
    assert training.compile() is False
    assert notes == ["torch.compile does not work here (RuntimeError), going on without: no compiler"]
    assert all(block._compiled_call_impl is None for block in training.model.blocks)


def test_what_cannot_be_trained_is_said(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TokencutError, match=r"--fit fits a run into a time; add --time-limit SECONDS"):
        train.Run(arguments(data, tmp_path, "--fit"))
    with pytest.raises(TokencutError, match=r"--batch 32 is more than there are training images, 24; type --batch 24"):
        train.Run(arguments(data, tmp_path, "--batch", "32"))
    (tmp_path / "resume.pt").write_bytes(b"no state")
    with pytest.raises(
        TokencutError, match=r"resume.pt is damaged \(UnpicklingError\); leave --resume out to start again"
    ):
        train.Run(arguments(data, tmp_path, "--resume"))


def test_a_loss_that_is_no_number_ends_the_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train.Run(arguments(data, tmp_path)).training
    monkeypatch.setattr(training, "_step", lambda chosen, small: torch.tensor(math.nan))
    with pytest.raises(TokencutError, match=r"the loss is nan in epoch 1; try a smaller learning rate, such as"):
        training.run_epoch()


def test_other_classes_are_refused(data: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "val", ("ant", "bee", "dog"), images=1)
    args = arguments(data, tmp_path / "run")
    args.val = str(tmp_path / "val")
    with pytest.raises(TokencutError, match=r"have different class folders; give two with the same"):
        train.Run(args)
