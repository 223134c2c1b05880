"""The stand-in for videos: what is in its clips, the folder of its model, and what is measured on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tokencut.models.loading import load_model

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def _with_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))


@pytest.fixture
def modules(_with_benchmarks: None) -> Any:
    from video import clips, measure_clips, train_clips

    return clips, train_clips, measure_clips


def test_one_digit_moves_and_the_other_does_not(modules: Any) -> None:
    clips, _, _ = modules
    ink = torch.ones(4, 8, 8)
    rng = torch.Generator().manual_seed(0)
    found = clips.render(ink, ink, torch.arange(4), 16, rng)
    assert found.shape == (4, 3, 16, 64, 64) and found.min() >= 0 and found.max() <= 1
    brighter = (found[:, :, -1] - found[:, :, 0]).mean(1)  # where the digit has come to, and where it was
    place = torch.arange(64.0)
    for clip, (axis, sign) in enumerate(((1, 1), (0, 1), (1, -1), (0, -1))):
        gained, lost = brighter[clip].clamp(min=0.15) - 0.15, (-brighter[clip]).clamp(min=0.15) - 0.15
        moved = [float((part.sum(1 - axis) * place).sum() / part.sum()) for part in (gained, lost)]
        assert sign * (moved[0] - moved[1]) > 5, clips.DIRECTIONS[clip]
    changed = (found[:, :, 1:] - found[:, :, :-1]).abs().mean(1) > 0.08
    assert 0 < changed.float().mean() < 0.35  # most of a clip stands still


def test_classes_are_digits_and_directions(modules: Any) -> None:
    clips, _, _ = modules
    ink, label = clips.inks("test")
    found, classes = clips.batch(ink, label, 5, 4, torch.Generator().manual_seed(1))
    assert found.shape == (5, 3, 4, 64, 64) and clips.CLASSES[4 * 3 + 2] == "3-left"
    assert int(classes.min()) >= 0 and int(classes.max()) < len(clips.CLASSES) == 40


@pytest.mark.slow
def test_files_are_judged_by_a_model_that_was_saved(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, train_clips, measure_clips = modules
    monkeypatch.setattr(train_clips, "DEPTH", 2)
    monkeypatch.setattr(train_clips, "WIDTH", 24)
    monkeypatch.setattr(train_clips, "judge", lambda model, device: 2.5)
    for words in (["clips", "-o", tmp_path / "clips", "--val", 6, "--train", 1],
                  ["train_clips", "-o", tmp_path / "model", "--seconds", 0.1, "--batch", 2]):  # fmt: skip
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        {"clips": clips, "train_clips": train_clips}[str(words[0])].main()
    assert len(list((tmp_path / "clips" / "val").rglob("*.mp4"))) == 6
    loaded = load_model(str(tmp_path / "model"))
    assert (
        loaded.model.patch_embed.grid_size == (8, 8, 8) and loaded.model.pretrained_cfg["label_names"][14] == "3-left"
    )
    words = ["measure_clips", tmp_path / "model", "--data", tmp_path / "clips" / "val", "--frame-stride", 2, "-j", 0,
             "--keep", 0.5, "--static", 0.5, "--methods", "tome", "--rounds", 0, "--device", "cpu",
             "-o", tmp_path / "out.json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    capsys.readouterr()
    measure_clips.main()
    told = json.loads((tmp_path / "out.json").read_text())
    names = ["dense", "static 0.5", "static 0.5 weighing alike", "static 0.5 dropped", "tome 0.5",
             "tome 0.5, static 0.5"]  # fmt: skip
    assert [row["name"] for row in told["rows"]] == names and told["clips"] == 6
    held, dropped = (row["loss"] for row in told["rows"][1:4:2])
    assert held != dropped and told["rows"][0]["loss_change"] == 0
    assert capsys.readouterr().out.count("| static 0.5") == 3


def test_quantising_is_by_blocks_of_eight(modules: Any) -> None:
    _, train_clips, _ = modules
    plain = torch.full((1, 3, 2, 16, 16), 0.5)
    plain[..., 8:] = 0.75
    rng = torch.Generator().manual_seed(0)
    found = train_clips.quantised(plain, rng)
    assert found.shape == plain.shape and (found - plain).abs().max() < 0.02
    assert all(part.std() < 1e-5 for part in (found[..., :8], found[..., 8:]))
