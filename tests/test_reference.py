"""The reference models and the claims held against them: dry runs on images made here, figures worked out by hand."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from image_files import greys, write_folder

from tokencut.cli.app import app
from tokencut.errors import ArtifactError, TokencutError
from tokencut.evaluation import evaluate
from tokencut.modelzoo import load_model
from tokencut.preprocessing import preprocessing_of
from tokencut.sources import open_source

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES / "reference"))

import augment  # noqa: E402
import bench  # noqa: E402
import claims  # noqa: E402
import judge  # noqa: E402
import loop  # noqa: E402
import page  # noqa: E402
import pixels  # noqa: E402
import shards  # noqa: E402
import train  # noqa: E402
import verdicts  # noqa: E402
import worklist  # noqa: E402
from worklist import PAPER, Plan, Sweep, Task  # noqa: E402

CLASSES = ("ant", "bee", "cat")
STILL = augment.Augmentation((1, 1), (1, 1), hflip=0, rotation=0, jitter=0, three=0, erasing=0)
TINY = "embed_dim=16,depth=3,num_heads=1"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images to train on, and of four to judge by."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", CLASSES, images=8)
    write_folder(root / "val", CLASSES, images=4)
    return root


def arguments(data: Path, output: Path, *words: str) -> argparse.Namespace:
    fixed = f"deit_tiny --train {data / 'train'} --val {data / 'val'} -o {output} --size 16 --stored 20 --batch 8 -j 0"
    return train.parse([*fixed.split(), "--model-kwargs", TINY, "--device", "cpu", "--epochs", "3", *words])


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs, in one go."""
    folder = tmp_path_factory.mktemp("runs") / "deit_tiny"
    run = train.Run(arguments(data, folder, "--small", "8", "--patch-drop-share", "0.6"))
    assert run.go()
    return folder


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
    # To the byte, so that claims.py knows them for the same model.
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
        from tokencut.preprocessing import decode

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
    with pytest.raises(FloatingPointError, match=r"the loss is nan in epoch 1; try a smaller learning rate, such as"):
        training.run_epoch()


def test_other_classes_are_refused(data: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "val", ("ant", "bee", "dog"), images=1)
    args = arguments(data, tmp_path / "run")
    args.val = str(tmp_path / "val")
    with pytest.raises(TokencutError, match=r"have different class folders; give two with the same"):
        train.Run(args)


# The claims: work, results, verdicts, page.


TOKENCUT = typer.main.get_command(app)


def parsed(words: list[str]) -> typer.Context:
    """Reads a command as tokencut does, without running it; a misspelt option or value raises."""
    assert words[0] == "tokencut"
    return TOKENCUT.commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined, no-any-return]


def test_every_job_is_a_command_that_tokencut_takes() -> None:
    jobs = Plan(["deit_tiny", "deit_small"], seeds=(1, 2), searches=False).jobs()
    assert len({job.key for job in jobs}) == len(jobs)
    for job in jobs:
        if isinstance(job, Sweep):
            assert parsed(job.words("runs/x", "val.tar", "report/")).params["no_latency"] is True
        elif isinstance(job, Task) and not isinstance(job.keep, str) and job.seed == 1:
            params = parsed(shlex.split(job.command("runs/x", "train.tar", "val.tar", 256))).params
            assert params["finetune_epochs"] == (job.epochs or None)
    tuned = [job for job in jobs if isinstance(job, Task) and job.label == "deit_tiny" and job.method == "evit"]
    assert {(job.keep, job.seed) for job in tuned} == {(keep, seed) for keep in (0.7, 0.5) for seed in (1, 2)}


def test_a_task_is_carried_out_in_process(data: Path, trained: Path) -> None:
    recipe = {**worklist.RECIPE, "mixup": 0.0, "cutmix": 0.0}
    judging = judge.Judge({
        "folders": {"deit_tiny": str(trained)}, "train": str(data / "train"), "val": str(data / "val"), "device": "cpu",
        "recipe": recipe, "batch": 8, "workers": 0, "precision": "fp32", "limit": None,
    })  # fmt: skip
    dense = judging.run(Task("deit_tiny"))
    assert dense["gmacs"] == dense["dense_gmacs"] and len(dense["correct"]) == dense["images"] == 12
    assert 12 * dense["top1"] / 100 == pytest.approx(dense["correct"].count("1"))
    found = judging.run(Task("deit_tiny", PAPER, "-20%", epochs=1))
    assert 0.7 < found["gmacs"] / dense["gmacs"] <= 0.8
    assert found["loss"] > 0
    # The next hundredth saves too little.
    more = judging.run(Task("deit_tiny", PAPER, round(found["keep"] + 0.01, 2)))
    assert more["gmacs"] / dense["gmacs"] > 0.8


CONDITIONS = {"models": {"deit_tiny": "a"}, "epochs": 3, "recipe": worklist.RECIPE, "batch": 256, "precision": "bf16",
              "train": "train.tar", "val": "val.tar", "limit": None}  # fmt: skip


def entry(correct: str, task: Task | None = None, **more: Any) -> dict[str, Any]:
    told = {"label": task.label, "epochs": task.epochs, "seed": task.seed} if task else {}
    images = len(correct)
    return {"correct": correct, "top1": 100 * correct.count("1") / images, "images": images, "keep": 0.5, "gmacs": 0.6,
            "dense_gmacs": 1.0, "seconds": 5.0, "classes": 100, "train_images": 45000, **told, **more}  # fmt: skip


def test_differences_are_paired_over_the_seeds_that_both_have() -> None:
    control, mine = Task("deit_tiny", epochs=3), Task("deit_tiny", "bat", 0.5, epochs=3)
    found = {}
    for seed, theirs, ours in ((1, "1100", "1110"), (2, "1100", "1111"), (3, "0000", None)):
        found[replace(control, seed=seed).key] = entry(theirs, replace(control, seed=seed))
        if ours:
            found[replace(mine, seed=seed).key] = entry(ours, replace(mine, seed=seed))
    book = verdicts.Book({"found": found, "conditions": CONDITIONS})
    difference = book.difference(mine, control)
    assert difference is not None
    # By image, averaged over seeds 1 and 2: 0, 0, 1, 0.5. Mean 0.375; deviations' squares 0.6875 / 3, over 4 images.
    assert difference.points == pytest.approx(37.5)
    assert difference.standard_error == pytest.approx(100 * math.sqrt(0.6875 / 3 / 4))
    assert book.difference(mine, Task("deit_small", epochs=3)) is None


@pytest.mark.parametrize(
    ("points", "error", "least", "said"),
    [
        (0.5, 0.1, -0.2, "yes"),
        (-0.1, 0.1, -0.2, "yes, though the error allows less"),
        (-0.3, 0.1, -0.2, "not told apart: the error allows it"),
        (-0.5, 0.1, -0.2, "no"),
    ],
)
def test_a_claim_holds_as_far_as_two_standard_errors_tell(points: float, error: float, least: float, said: str) -> None:
    assert verdicts.judged(verdicts.Difference(points, error), least) == said


def test_ahead_at_every_keep_and_most_at_the_lowest() -> None:
    def verdict(**differences: float) -> str:
        found = {float(keep[1:]) / 10: verdicts.Difference(points, 0.2) for keep, points in differences.items()}
        return verdicts._ahead(found, "", "").verdict

    assert verdict(k7=1.0, k5=3.0) == "yes, ahead at every keep; most at the lowest"
    assert verdict(k7=3.0, k5=1.0) == "yes, ahead at every keep; most at 0.7"
    assert verdict(k7=0.1, k5=3.0) == "not told apart at 0.7, ahead elsewhere; most at the lowest"
    assert verdict(k7=-1.0, k5=3.0).startswith("no: behind at 0.7")
    assert verdict(k5=0.1) == "not told apart at any"


def results_with(found: dict[str, Any]) -> dict[str, Any]:
    run = {"device": "a GPU", "torch": "2", "timm": "1", "date": "2026-01-01", "command": "python claims.py"}
    failed = {"deit_tiny parts": {"tries": 1, "reason": "lost"}}
    return {"conditions": CONDITIONS, "found": found, "failed": failed, "runs": [run]}


def test_a_page_of_part_of_the_results_is_whole_and_says_what_is_missing(tmp_path: Path) -> None:
    jobs = Plan(["deit_tiny", "deit_small"]).jobs()
    assert page.write(results_with({}), jobs, tmp_path).endswith("Nothing has been measured yet.\n")
    right, wrong = "1" * 60 + "0" * 40, "1" * 20 + "0" * 80
    tuned = Task("deit_tiny", PAPER, "-40%", epochs=3)
    row = {"method": "dense", "keep": 1.0, "gmacs": 1.0, "top1": 60.0, "correct": right}
    found = {
        Task("deit_tiny").key: entry(right, gmacs=1.0),
        tuned.key: entry(wrong, tuned),
        "deit_tiny methods": {"whole": False, "rows": [
            row, {**row, "method": "bat", "keep": 0.5}, {**row, "method": "evit", "keep": 0.5, "correct": wrong},
        ]},
    }  # fmt: skip
    text = page.write(results_with(found), jobs, tmp_path)
    assert text == (tmp_path / "RESULTS.md").read_text()
    assert (tmp_path / "deit_tiny-off-the-shelf.png").stat().st_size > 1000
    # 40 of 100 images lost: -40 points, standard error sqrt(0.24 * 100 / 99 / 100) = 4.92.
    failing = text.split("## The claims")[0].split("## What does not reproduce")[1]
    assert f"(b) deit_tiny, `{PAPER}`, 40 % fewer multiply-adds, against dense as trained: -40.00 ± 4.92" in failing
    assert "**no**" in failing and "- (a) deit_small" in failing.split("Not measured:")[1]
    assert "yes, ahead at every keep" in text and "deit_tiny, off the shelf: `bat` over `evit`" in text
    assert "`deit_tiny methods`" in text.split("## What was cut")[1] and "`deit_tiny parts`: lost" in text
    assert "None" not in text


class FakeSlot(bench.Slot):
    """Answers at once, and fails at what it is told to."""

    def task(self, task: Task) -> dict[str, Any]:
        if task.method == "evit":
            raise TokencutError("no luck")
        if task.method == "tome":
            time.sleep(60)
        return entry("10", task)

    def command(self, words: list[str]) -> str:
        if "--target-gmacs" not in words:
            raise TokencutError("no sweeps here")
        assert words[words.index("--target-gmacs") + 1] == "0.3600"  # 40 % less than 0.6
        return json.dumps({"method": "bat", "keep": [0.8, 0.5], "layers": [2, 3]})


def test_a_schedule_that_was_found_is_judged_and_fine_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Slot", FakeSlot)
    results = bench.Results(tmp_path, CONDITIONS)
    setup = {"folders": {"deit_tiny": "runs/deit_tiny"}, "train": "train.tar"}
    jobs = [Task("deit_tiny"), worklist.Search("deit_tiny", 40, 3)]
    bench.Bench(jobs, results, setup, tmp_path, print).run(1)
    assert results.data["failed"] == {}
    found = results.data["found"]["deit_tiny searched -40%"]
    assert (found["shelf"]["epochs"], found["tuned"]["epochs"]) == (0, 3)
    text = page.write(results.data, jobs, tmp_path)
    assert "| deit_tiny | 40.0 | 0.8/0.5 | 2,3 | +0.00 ± 0.00 |" in text
    assert text.split("## What was cut")[1].strip().startswith("Nothing of the list is left.")


def test_jobs_are_done_once_tried_twice_and_cut_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Slot", FakeSlot)
    monkeypatch.setattr(threading.Thread, "join", _impatient(threading.Thread.join))
    jobs = [Task("deit_tiny"), *(Task("deit_tiny", method, 0.5) for method in ("evit", "bat"))]
    results = bench.Results(tmp_path, CONDITIONS)
    bench.Bench(jobs, results, {}, tmp_path, print).run(2, time.monotonic() + 30)
    again = bench.Results(tmp_path, CONDITIONS)
    assert set(again.data["found"]) == {"deit_tiny dense", "deit_tiny bat keep=0.5"}
    assert again.data["failed"] == {"deit_tiny evit keep=0.5": {"tries": 2, "reason": "no luck"}}
    assert [again.open(job) for job in jobs] == [False, False, False]
    # One that outlasts the limit is left for another time, and is no failure.
    late = Task("deit_tiny", "tome", 0.5, seed=2, epochs=1)
    bench.Bench([late], again, {}, tmp_path, print).run(1, time.monotonic() + 0.3)
    assert again.open(late) and late.key not in again.data["failed"]


def _impatient(join: Any) -> Any:
    return lambda thread, timeout=None: join(thread, None if timeout is None else min(timeout, 0.5))


def test_results_of_other_weights_are_refused(tmp_path: Path) -> None:
    bench.Results(tmp_path, CONDITIONS).save()
    more = {**CONDITIONS, "models": {"deit_tiny": "a", "deit_small": "b"}}
    assert bench.Results(tmp_path, more).data["conditions"]["models"] == more["models"]
    with pytest.raises(ArtifactError, match=r"holds results with other models and epochs; give another -o"):
        bench.Results(tmp_path, {**CONDITIONS, "models": {"deit_tiny": "c"}, "epochs": 1})
    with pytest.raises(TokencutError, match=r"--model deit_tiny=nowhere: there is no nowhere/model.safetensors; type"):
        claims.conditions_of(claims.parse(["--model", "deit_tiny=nowhere", "--train", "a", "--val", "b", "-o", "c"]))


def test_the_script_goes_on_where_it_was_and_writes_no_paths_of_this_machine(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", f"deit_tiny={trained}", "--train", str(data / "train"), "--val", str(data / "val")]
    monkeypatch.setattr(bench, "Slot", FakeSlot)
    monkeypatch.setattr(bench, "TRIES", 1)
    monkeypatch.setattr(
        Plan, "methods_tuned", lambda plan, label, seed: plan._tuned(label, ("bat", "evit"), (0.5,), seed)
    )
    monkeypatch.setattr(claims, "STARTED", time.monotonic())
    monkeypatch.setattr(
        sys, "argv", ["claims.py", *words, "-o", str(tmp_path / "out"), "--device", "cpu", "--seeds", "1"]
    )
    claims.main()
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    assert str(tmp_path) not in text and str(data) not in text
    assert "python examples/reference/claims.py --model deit_tiny=runs/deit_tiny --train train --val val" in text
    assert "deit_tiny, as trained: epochs 3, batch 8" in text
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--list"])
    claims.main()
    listed = capsys.readouterr().out.splitlines()
    assert "done deit_tiny bat keep=0.5 epochs=3 seed=1" in listed
    monkeypatch.setattr(bench, "TRIES", 2)
    claims.main()
    assert "left deit_tiny evit keep=0.5 epochs=3 seed=1" in capsys.readouterr().out.splitlines()
    (trained / "model.safetensors").rename(trained / "elsewhere")
    try:
        with pytest.raises(SystemExit, match=r"error: --model deit_tiny=.*: there is no "):
            claims.main()
    finally:
        (trained / "elsewhere").rename(trained / "model.safetensors")


# The commands of imagenet.md.

COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (EXAMPLES / "imagenet.md").read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_for_imagenet_are_spelt_right(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    if words[0] == "torchrun":
        assert words[1:5] == ["--nproc-per-node", "8", "-m", "tokencut"]
        words = words[4:]
    if words[0] == "python":
        sys.path.insert(0, str(EXAMPLES / "benchmarks"))
        import speed

        assert (EXAMPLES.parent / words[1]).name == "speed.py"
        monkeypatch.setattr(sys, "argv", words[1:])
        assert speed.parse().device == "cuda"
        return
    context = parsed(words)
    assert context.params
    if words[1] == "sweep":
        from tokencut.sweep_rows import read_variants

        assert len(read_variants(context.params["methods"].split(","))) in (5, 8)
