"""`tokencut compress --train-data`: the fine-tune as users run it, stop it, go on with it, and spread it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import write_folder
from model_files import names_in
from outcome import CLASSES, FINETUNE, TINY, Run, log_of
from safetensors.torch import load_file

from tokencut.cli import render
from tokencut.cli.cmd_compress import _facts
from tokencut.cli.finetune_view import RunView
from tokencut.errors import ArtifactError
from tokencut.models import artifact
from tokencut.training import held_out
from tokencut.training.held_out import compared
from tokencut.training.setup import FinetuneReport
from tokencut.training.state import folder_for
from tokencut.training.step import Trainer, TrainingDivergedError

REDUCTION = ("--keep", "0.5", "--layers", "2,4")


def test_it_trains_judges_logs_and_leaves_a_file_that_loads(
    run: Run, tmp_path: Path, train: Path, pictures: Path, compressed: Path
) -> None:
    output = tmp_path / "out.safetensors"
    words = ("--train-data", train, "--data", pictures, "--alpha", "0.1", "-o", output, "--json")
    done = run("compress", compressed, *FINETUNE, *words)
    assert done.code == 0, done.err
    log = str(tmp_path / "out.log.csv")
    assert done.json["finetune"] == {"epochs": 2, "chosen": 2, "held_out": None, "log": log}
    assert {"dense_top1", "top1", "top1_before_finetuning"} <= set(done.json)
    assert names_in(tmp_path) == ["out.log.csv", "out.safetensors"]
    rows = log_of(output)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(rows[1][name]) > 0 for name in ("loss", "task", "importance", "images_per_second"))
    assert rows[1]["diversity"] == ""
    assert float(rows[1]["top1"]) == done.json["top1"]
    lines = [line for line in done.err.splitlines() if line.startswith("note: epoch")]
    assert len(lines) == 2
    assert lines[0].startswith("note: epoch 1: loss ")
    assert run("eval", output, "--data", pictures, "-j", "0", "--json").json["top1"] == done.json["top1"]
    before, after = load_file(compressed), load_file(output)
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_people_see_what_it_did(run: Run, tmp_path: Path, train: Path, pictures: Path, compressed: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = run("compress", compressed, *FINETUNE, "--train-data", train, "--data", pictures, "-o", output)
    lines = dict(line.split("  ", 1) for line in done.out.splitlines())
    assert lines["fine-tuned"].strip() == "epoch 2 of 2"
    assert "% before fine-tuning on 12 images" in lines["top-1"]


def test_a_new_head_is_trained_named_and_announced(run: Run, tmp_path: Path, train: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = run("compress", *TINY, *REDUCTION, *FINETUNE, "--train-data", train, "-o", output)
    assert done.code == 0
    assert "test_vit has random weights (seed 0)" in done.notes
    assert any(note.startswith("the head is new, so there are no logits to distil from") for note in done.notes)
    assert artifact.read_info(output).label_names == CLASSES


def test_the_best_epoch_is_chosen_on_held_out_images(run: Run, tmp_path: Path, train: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = run(
        "compress", *TINY, *REDUCTION, *FINETUNE, "--select", "best", "--train-data", train, "-o", output, "--json"
    )
    rows = log_of(output)
    best = max(rows, key=lambda row: float(row["top1"]))
    assert done.json["finetune"]["chosen"] == int(best["epoch"])


@pytest.mark.slow
@pytest.mark.parametrize("select", ["last", "best"])
def test_a_fine_tune_that_harms_keeps_the_weights_from_before(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(held_out, "GUARD_LARGEST_SHARE", 0.9)
    monkeypatch.setattr(held_out, "GUARD_LEAST", 1000)
    output, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    base = ("compress", "digits", "--keep", "0.5", "--data", "digits", "--limit", "20", "-j", "0", "--json", "-o")
    assert run(*base, plain).code == 0
    tuning = ("--train-data", "digits", "--finetune-epochs", "1", "--lr", "0.5", "--min-lr", "1", "--select", select)
    done = run(*base, output, *tuning)
    assert done.code == 0, done.err
    told = done.json["finetune"]
    found = told["held_out"]
    images = 1000 if select == "last" else 120
    assert (told["chosen"], found["kept"], found["images"]) == (0, "before", images)
    assert found["difference"] == pytest.approx(found["after"] - found["before"])
    assert found["difference"] < -2 * found["standard_error"] < 0
    assert [note for note in done.notes if note.startswith("the fine-tune did harm")] == [
        f"the fine-tune did harm: top-1 on {images:,} training images held out went from {found['before']:.2f} to "
        f"{found['after']:.2f} % ({found['difference']:+.2f} ± {found['standard_error']:.2f}), so the weights from "
        "before are kept; type --lr 0.05"
    ]
    assert output.read_bytes() == plain.read_bytes()  # the accuracy in it is that of these weights, too
    assert done.json["top1"] == done.json["top1_before_finetuning"]
    assert names_in(tmp_path) == ["out.log.csv", "out.safetensors", "plain.safetensors"]


@pytest.mark.slow
def test_two_processes_judge_the_held_out_images_together(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    words = ("compress", "digits", "--keep", "0.1", "-j", "0", "--json", "--train-data", "digits", "--finetune-epochs",
             "1", "--lr", "0.5", "--min-lr", "1", "--select", "best", "-o")  # fmt: skip
    alone = run(*words, one, "-b", "128").json["finetune"]["held_out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*torchrun, "tokencut", *map(str, words), str(two), "-b", "64"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["finetune"]
    assert (told["chosen"], told["held_out"]["kept"]) == (0, "before")
    assert (told["held_out"]["images"], told["held_out"]["before"]) == (alone["images"], alone["before"])
    assert done.stderr.count("the fine-tune did harm") == 1
    assert one.read_bytes() == two.read_bytes()


def test_people_see_what_was_held_out() -> None:
    comparison = compared({number: number > 3 for number in range(400)}, dict.fromkeys(range(400), True))
    better = FinetuneReport(True, 2, (), 2, comparison, ())
    worse = FinetuneReport(True, 2, (), 0, compared(dict.fromkeys(range(9), True), dict.fromkeys(range(9), False)), ())
    measured = {"dense_gmacs": 1.0, "gmacs": 0.5}
    rows = dict(_facts("out", "model", "reduction", measured, better))
    assert rows["fine-tuned"] == "epoch 2 of 2"
    assert rows["held out"] == "99.00 % -> 100.00 % (+1.00 ± 0.50) on 400 training images"
    assert dict(_facts("out", "model", "reduction", measured, worse))["fine-tuned"] == (
        "no, the weights from before are kept"
    )


def test_dyvit_trains_through_the_same_loop(run: Run, tmp_path: Path, train: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = run("compress", *TINY, *REDUCTION, *FINETUNE, "--method", "dyvit", "--train-data", train, "-o", output)
    assert done.code == 0
    assert not any("untrained" in note for note in done.notes)
    assert float(log_of(output)[0]["ratio"]) > 0
    assert any(name.startswith("tokencut.") for name in load_file(output))


class Terminal:
    """A standard error that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_table(
    run: Run, tmp_path: Path, train: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(render, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    code = run("compress", compressed, *FINETUNE, "--train-data", train, "-o", tmp_path / "out.safetensors").code
    assert code == 0
    for word in ("epoch", "distillation", "images/s", "1/2", "2/2"):
        assert word in terminal.text


def test_a_run_that_was_told_to_stop_is_kept_and_goes_on(
    run: Run, tmp_path: Path, train: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("compress", compressed, *FINETUNE, "--train-data", train, "--mixup", "0.8", "-o")
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert run(*words, whole).code == 0
    before, step, seen = signal.getsignal(signal.SIGTERM), Trainer.step, []

    def interrupted(trainer: Trainer, *position: Any) -> dict[str, float]:
        seen.append(position[:2])
        if len(seen) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *position)

    monkeypatch.setattr(Trainer, "step", interrupted)
    stopped = run(*words, cut)
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err.splitlines()[-3:] == [
        f"note: stopping: the run is kept in {folder_for(cut)}, and the same command with --resume "
        "goes on; Ctrl-C again stops at once",
        f"note: the run is kept in {folder_for(cut)}; type the same command with --resume to go on",
        "error: interrupted",
    ]
    assert seen[-1] == (1, 1)  # the step was finished, no other begun
    assert not cut.exists()
    assert signal.getsignal(signal.SIGTERM) == before

    again = run(*words, cut)
    assert (again.code, again.err.splitlines()[-1]) == (
        1,
        f"error: {folder_for(cut)} holds a run that was stopped; add --resume to go on with it, or --force to start "
        "again",
    )
    other = run(*words, cut, "--resume", "--seed", "7")
    assert other.code == 1
    assert (
        f"{folder_for(cut)} holds a run made with other --seed (0, not 7); type the options it was started with"
        in other.err
    )

    resumed = run(*words, cut, "--resume")
    assert resumed.code == 0
    assert "note: going on at epoch 2, step 3" in resumed.err.splitlines()
    done = run(*words, cut, "--resume")
    assert done.code == 1
    assert done.err == (
        f"error: {cut} is finished, and there is nothing to resume; to train it further type tokencut compress {cut} "
        f"--train-data {train} -o {cut.with_name('cut-2.safetensors')}\n"
    )
    assert cut.read_bytes() == whole.read_bytes()
    assert names_in(tmp_path) == ["cut.log.csv", "cut.safetensors", "whole.log.csv", "whole.safetensors"]


@pytest.mark.slow
def test_a_request_to_stop_ends_an_evaluation_and_keeps_the_epoch(
    run: Run, tmp_path: Path, train: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "compress",
        compressed,
        *FINETUNE,
        "--train-data",
        train,
        "--data",
        train,
        "-o",
        tmp_path / "out.safetensors",
    )
    progress, judged = RunView.progress, []

    def stopped(view: RunView, task: str, *now: Any) -> None:
        if task.startswith("evaluating") and not judged:
            judged.append(task)
            os.kill(os.getpid(), signal.SIGTERM)
        progress(view, task, *now)

    monkeypatch.setattr(RunView, "progress", stopped)
    done = run(*words)
    folder = folder_for(tmp_path / "out.safetensors")
    assert done.code == 130
    assert done.err.splitlines()[-2:] == [
        f"note: the run is kept in {folder} as it was saved last; type the same command with --resume to go on",
        "error: interrupted",
    ]
    resumed = run(*words, "--resume")
    assert resumed.code == 0
    assert [row["epoch"] for row in log_of(tmp_path / "out.safetensors")] == ["1", "2"]


def test_a_second_interrupt_ends_it_at_once(
    run: Run, tmp_path: Path, train: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(trainer: Trainer, *position: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    monkeypatch.setattr(Trainer, "step", twice)
    done = run("compress", compressed, *FINETUNE, "--train-data", train, "-o", tmp_path / "out.safetensors")
    assert (done.code, done.err.splitlines()[-1]) == (130, "error: interrupted")
    assert names_in(tmp_path) == []


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_epoch(run: Run, tmp_path: Path, train: Path, compressed: Path) -> None:
    words = ("compress", compressed, *FINETUNE, "--train-data", train, "-o")
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert run(*words, whole).code == 0
    code = "import os, sys\nfrom tokencut.training.step import Trainer\nstep = Trainer.step\n" \
           "def dying(trainer, epoch, number, batches):\n" \
           "    if (epoch, number) == (1, 3):\n        os.kill(os.getpid(), 9)\n" \
           "    return step(trainer, epoch, number, batches)\n" \
           "Trainer.step = dying\nimport torch\ntorch.set_num_threads(1)\n" \
           "from tokencut.cli.app import main\nmain(sys.argv[1:])\n"  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", code, *map(str, words), str(cut)], capture_output=True)
    assert killed.returncode == -9
    resumed = run(*words, cut, "--resume")
    assert "note: going on at epoch 2, step 1" in resumed.err.splitlines()
    assert cut.read_bytes() == whole.read_bytes()


def test_nothing_to_resume_is_said(run: Run, tmp_path: Path, train: Path, compressed: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = run("compress", compressed, *FINETUNE, "--train-data", train, "--resume", "-o", output)
    assert done.code == 0
    assert f"there is nothing to resume in {folder_for(output)}: starting at the first epoch" in done.notes


def test_a_loss_that_is_no_number_leaves_the_last_good_weights(
    run: Run, tmp_path: Path, train: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(trainer: Trainer, *position: Any) -> dict[str, float]:
        raise TrainingDivergedError("the loss is not a finite number at epoch 1, step 1 of 6; type a smaller one")

    monkeypatch.setattr(Trainer, "step", diverge)
    output = tmp_path / "out.safetensors"
    done = run("compress", compressed, *FINETUNE, "--train-data", train, "-o", output)
    good = output.with_name(f"{output.stem}-last-good.safetensors")
    assert done.code == 1
    assert done.err.splitlines()[-1] == (
        "error: the loss is not a finite number at epoch 1, step 1 of 6; type a smaller one, and --force; the weights "
        f"before that step are in {good}"
    )
    assert torch.equal(load_file(good)["head.weight"], load_file(compressed)["head.weight"])
    assert not output.exists()


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_what_a_run_would_need_and_others_wrote_is_told_before_any_work(
    run: Run, tmp_path: Path, train: Path, compressed: Path, force: tuple[str, ...]
) -> None:
    output = tmp_path / "out.safetensors"
    folder = folder_for(output)
    words = ("compress", compressed, *FINETUNE, "--train-data", train, "-o", output, *force)
    folder.write_text("mine")
    assert f"cannot make the folder {folder}: it is a file; move that" in refusal(run, *words)
    folder.unlink()
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    assert f"{folder}, where the state of the run is to be kept, holds what tokencut did not write: 'precious.txt'" in (
        refusal(run, *words)
    )
    assert (folder / "precious.txt").read_text() == "mine"
    (folder / "precious.txt").unlink()
    good = tmp_path / "out-last-good.safetensors"
    good.write_text("mine")
    if not force:
        assert refusal(run, *words) == f"error: {good} exists; add --force to replace it, or give another -o"
    assert good.read_text() == "mine"
    long = tmp_path / f"{'n' * 240}.safetensors"
    assert "File name too long; give another name" in refusal(run, *words[: -1 - len(force)], long, *force)


def test_outputs_among_the_images_are_told_before_any_work(
    run: Run, tmp_path: Path, train: Path, compressed: Path
) -> None:
    words = ("compress", compressed, *FINETUNE, "--train-data", train, "-o")
    for output, curves in ((train / "out.safetensors", tmp_path), (tmp_path / "out.safetensors", train / "curves")):
        assert "would lie among the images of" in refusal(run, *words, output, "--tensorboard", curves)
    assert {path.suffix for path in train.rglob("*")} == {"", ".jpg"} and "curves" not in names_in(train)


def test_the_same_images_to_train_and_to_judge_are_told(
    run: Run, tmp_path: Path, train: Path, compressed: Path
) -> None:
    (tmp_path / "link").symlink_to(train)
    done = run("compress", compressed, *FINETUNE, "--train-data", train, "--data", tmp_path / "link", "--lr", "1e-9",
               "-o", tmp_path / "out.safetensors")  # fmt: skip
    assert done.code == 0
    assert (
        f"--train-data and --data are both {tmp_path / 'link'}: an accuracy on images that the model was trained on is "
        "too good; give other images to one of them" in done.notes
    )


def refusal(run: Run, *words: object) -> str:
    """The error line of a command that came to no step of training."""
    done = run(*words)
    assert (done.code, done.out) == (1, "") and "epoch" not in done.err
    return done.err.splitlines()[-1]


# (words, exit code, the line): {tmp} is an empty folder, {file} a tokencut file, {train} the training images.
WRONG = [
    (("--finetune-epochs", "2"), 2,
     "--finetune-epochs needs images to fine-tune on; add --train-data DIR, a folder with one sub-folder a class or a "
     ".tar of one, or --train-data digits"),
    (("--resume",), 2,
     "--resume needs images to fine-tune on; add --train-data DIR, a folder with one sub-folder a class or a .tar of "
     "one, or --train-data digits"),
    (("--train-data", "{tmp}/none"), 1,
     "no images at '{tmp}/none': it does not exist; expected a folder with one sub-folder a class, a .tar, .tar.gz "
     "or .zip of one, a .csv list of images, or the word digits"),
    (("--train-data", "digits"), 1,
     "'digits' has 10 class folders ('0', '1', '2' and 7 more), the model's head has 3 classes; type --num-classes 10 "
     "beside an architecture's name to train a new head"),
    (("--train-data", "{train}", "--data", "{val}"), 1,
     "--data '{val}' has classes that --train-data '{train}' has not: 'dog', 'eel', 'fox'; give two folders with the "
     "same classes"),
    (("--train-data", "{train}", "--finetune-epochs", "0"), 2,
     "invalid value for '--finetune-epochs': 0 is not a whole number from 1 to 100000, such as 5; "
     "type tokencut compress --help"),
    (("--train-data", "{train}", "--lr", "fast"), 2,
     "invalid value for '--lr': 'fast' is not a number from 1e-12 to 10, such as 5e-05; type tokencut "
     "compress --help"),
    (("--train-data", "{train}", "--recipe", "long"), 2,
     "unknown recipe 'long', expected short or paper; type --recipe short"),
    (("--train-data", "{train}", "--precision", "fp16"), 2,
     "training in fp16 is not supported, since its gradients underflow; type --precision bf16"),
    (("--train-data", "{train}", "--accumulate", "0"), 2,
     "invalid value for '--accumulate': 0 is not a whole number from 1 to 65536, such as 1; "
     "type tokencut compress --help"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "line"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_wrong_command_line(
    run: Run, tmp_path: Path, train: Path, compressed: Path, words: tuple[str, ...], code: int, line: str
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    val = tmp_path / "val"
    if "{val}" in words:
        write_folder(val, ("dog", "eel", "fox"), images=1)

    def fill(text: str) -> str:
        named = {"{tmp}": work, "{train}": train, "{val}": val}
        for name, path in named.items():
            text = text.replace(name, str(path))
        return text

    done = run("compress", compressed, *map(fill, words), "-j", "0", "-o", work / "out.safetensors")
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines()[-1] == f"error: {fill(line)}"
    assert names_in(work) == []


def test_an_earlier_state_that_is_damaged(run: Run, tmp_path: Path, train: Path, compressed: Path) -> None:
    output = tmp_path / "out.safetensors"
    folder_for(output).mkdir()
    (folder_for(output) / "state.pt").write_bytes(b"damaged")
    words = ("compress", compressed, *FINETUNE, "--train-data", train, "-o", output)
    assert "type --force to start again" in run(*words, "--resume").err.splitlines()[-1]
    again = run(*words, "--resume", "--force")
    assert again.code == 0
    assert any(note.endswith(": starting again, as --force says") for note in again.notes)
    assert issubclass(ArtifactError, Exception)
