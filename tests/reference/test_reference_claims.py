"""The claims held against the reference models: small runs, and figures worked out by hand."""

from __future__ import annotations

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

import bench
import claims
import judge
import page
import pytest
import typer
import verdicts
import worklist
from reference_runs import EXAMPLES
from worklist import PAPER, Plan, Sweep, Task

from tokencut.cli.app import app
from tokencut.errors import ArtifactError, TokencutError

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


def test_a_sweep_is_done_when_it_has_every_row_and_given_up_when_it_fails(tmp_path: Path) -> None:
    results = bench.Results(tmp_path, CONDITIONS)
    sweep = Sweep("deit_tiny", "methods", ("bat",), (0.9, 0.5))
    for number in range(bench.TRIES):
        assert results.open(sweep)
        results.add(sweep.key, {"rows": [{"method": "bat", "keep": 0.9}], "whole": False})  # what there was until then
        results.failed(sweep.key, f"the {number}th time")
    assert not results.open(sweep)
    results.add(sweep.key, {"rows": [{"method": "bat", "keep": keep} for keep in (0.9, 0.5)], "whole": True})
    assert not results.open(sweep)
    assert results.open(replace(sweep, keeps=(0.9, 0.3)))


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
    typed = [*sys.argv, "--time-limit", "0"]
    for extra in (["--note", "Trained on a Sunday."], []):
        monkeypatch.setattr(sys, "argv", [*typed, *extra])
        claims.main()
        assert "- Trained on a Sunday." in (tmp_path / "out" / "RESULTS.md").read_text()
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
        from tokencut.sweep.rows import read_variants

        assert len(read_variants(context.params["methods"].split(","))) in (5, 8)
