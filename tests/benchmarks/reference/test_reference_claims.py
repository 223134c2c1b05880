"""The claims held against the reference models: small runs, and figures worked out by hand."""

from __future__ import annotations

import math
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from reference import claims, judge, page, verdicts, worklist
from reference.worklist import PAPER, Plan, Sweep, Task
from results import Results

from tokencut.cli.app import app
from tokencut.errors import TokencutError

# The claims: work, results, verdicts, page.


TOKENCUT = typer.main.get_command(app)


def parsed(words: list[str]) -> typer.Context:
    """Reads a command as tokencut does, without running it; a misspelt option or value raises."""
    assert words[0] == "tokencut"
    return TOKENCUT.commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined, no-any-return]


def test_every_job_is_a_command_that_tokencut_takes() -> None:
    jobs = Plan(["deit_tiny", "deit_small"], seeds=(1, 2)).jobs()
    assert len({job.key for job in jobs}) == len(jobs)
    for job in jobs:
        if isinstance(job, Sweep):
            assert parsed(job.words("runs/x", "val.tar", "report/")).params["no_latency"] is True
        elif isinstance(job, Task) and not isinstance(job.keep, str) and job.seed == 1:
            params = parsed(shlex.split(job.command("runs/x", "train.tar", "val.tar", 256))).params
            assert params["finetune_epochs"] == (job.epochs or None)
    tuned = [job for job in jobs if isinstance(job, Task) and job.label == "deit_tiny" and job.method == "evit"]
    assert {(job.keep, job.seed) for job in tuned} == {(keep, seed) for keep in (0.7, 0.5) for seed in (1, 2)}


def judge_of(data: Path, trained: Path, work: Path, **changed: Any) -> judge.Judge:
    settings = {"folders": {"deit_tiny": str(trained)}, "train": str(data / "train"), "val": str(data / "val"),
                "recipe": {}, "batch": 8, "workers": 0, "device": "cpu", "precision": "fp32", "limit": None,
                "work": work}  # fmt: skip
    return judge.Judge(**{**settings, **changed})


def test_a_task_is_carried_out(data: Path, trained: Path, tmp_path: Path) -> None:
    recipe = {**worklist.RECIPE, "mixup": 0.0, "cutmix": 0.0}
    judging = judge_of(data, trained, tmp_path, recipe=recipe)
    dense = judging(Task("deit_tiny"))
    assert dense["gmacs"] == dense["dense_gmacs"] and len(dense["correct"]) == dense["images"] == 12
    assert 12 * dense["top1"] / 100 == pytest.approx(dense["correct"].count("1"))
    found = judging(Task("deit_tiny", PAPER, "-20%", epochs=1))
    assert 0.7 < found["gmacs"] / dense["gmacs"] <= 0.8
    assert found["history"][-1]["loss"] > 0
    # The next hundredth saves too little.
    more = judging(Task("deit_tiny", PAPER, round(found["keep"] + 0.01, 2)))
    assert more["gmacs"] / dense["gmacs"] > 0.8


@pytest.mark.slow
def test_a_sweep_and_a_search_are_carried_out(data: Path, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    judging = judge_of(data, trained, tmp_path)
    sweep = Sweep("deit_tiny", "methods", ("bat", PAPER), (0.5,), prop_attn=False)
    assert judge.swept(sweep, tmp_path) is None
    found = judging(sweep)
    assert found["whole"] and found["seconds"] > 0
    assert [(row["method"], row["keep"]) for row in found["rows"]] == [("dense", 1.0), ("bat", 0.5), (PAPER, 0.5)]
    assert found["rows"][0]["correct"] == judging(Task("deit_tiny"))["correct"]
    assert not judge.swept(replace(sweep, keeps=(0.5, 0.3)), tmp_path)["whole"]  # type: ignore[index]
    searched = judging(worklist.Search("deit_tiny", 45, 0))
    assert searched["shelf"]["gmacs"] <= 0.55 * searched["shelf"]["dense_gmacs"] + 0.00005  # it is rounded
    assert searched["shelf"]["correct"] == searched["tuned"]["correct"]  # after no epoch
    assert (searched["shelf"]["keep"], searched["shelf"]["layers"]) == (
        tuple(searched["keep"]),
        tuple(searched["layers"]),
    )


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
    book = verdicts.Book({"rows": found, "settings": CONDITIONS})
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
        return verdicts._everywhere(found, "", "").verdict

    assert verdict(k7=1.0, k5=3.0) == "yes, ahead at every keep; most at the lowest"
    assert verdict(k7=3.0, k5=1.0) == "yes, ahead at every keep; most at 0.7"
    assert verdict(k7=0.1, k5=3.0) == "not told apart at 0.7, ahead elsewhere; most at the lowest"
    assert verdict(k7=-1.0, k5=3.0).startswith("no: behind at 0.7")
    assert verdict(k5=0.1) == "not told apart at any"


def results_with(found: dict[str, Any]) -> dict[str, Any]:
    run = {"device": "a GPU", "torch": "2", "timm": "1", "date": "2026-01-01", "command": "python claims.py"}
    failed = {"deit_tiny parts": {"tries": 1, "reason": "lost"}}
    return {"settings": CONDITIONS, "rows": found, "failed": failed, "runs": [run]}


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


class FakeJudge(judge.Judge):
    """Answers at once, and fails at what it is told to."""

    def judged(self, task: Task) -> dict[str, Any]:
        if task.method == "evit":
            raise TokencutError("no luck")
        return entry("10", task)

    def swept(self, job: Sweep) -> dict[str, Any]:
        raise TokencutError("no sweeps here")

    def searched(self, job: worklist.Search) -> dict[str, Any]:
        assert job.gmacs(0.6) == 0.36  # 40 % less
        task = Task(job.label, "bat", (0.8, 0.5), layers=(2, 3))
        shelf, tuned = (self.judged(replace(task, epochs=epochs)) for epochs in (0, job.epochs))
        return {"keep": [0.8, 0.5], "layers": [2, 3], "searching": 1.0, "shelf": shelf, "tuned": tuned}


def fake(work: Path) -> FakeJudge:
    return FakeJudge({"deit_tiny": "runs/deit_tiny"}, "train.tar", "val.tar", {}, 8, 0, "cpu", "fp32", None, work)


def test_a_schedule_that_was_found_is_judged_and_fine_tuned(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", CONDITIONS)
    jobs = [Task("deit_tiny"), worklist.Search("deit_tiny", 40, 3)]
    claims.work_off(jobs, results, fake(tmp_path), jobs=1, until=math.inf)
    assert results.content["failed"] == {}
    found = results.rows["deit_tiny searched -40%"]
    assert (found["shelf"]["epochs"], found["tuned"]["epochs"]) == (0, 3)
    text = page.write({**results.content, "runs": []}, jobs, tmp_path)
    assert "| deit_tiny | 40.0 | 0.8/0.5 | 2,3 | +0.00 ± 0.00 |" in text
    assert text.split("## What was cut")[1].strip().startswith("Nothing of the list is left.")


def test_jobs_are_done_once_and_tried_twice(tmp_path: Path) -> None:
    jobs = [Task("deit_tiny"), *(Task("deit_tiny", method, 0.5) for method in ("evit", "bat"))]
    claims.work_off(jobs, Results(tmp_path / "results.json", CONDITIONS), fake(tmp_path), jobs=1, until=math.inf)
    again = Results(tmp_path / "results.json", CONDITIONS)
    assert set(again.rows) == {"deit_tiny dense", "deit_tiny bat keep=0.5"}
    assert again.content["failed"] == {"deit_tiny evit keep=0.5": {"tries": 2, "reason": "no luck"}}
    assert [claims.is_open(job, again) for job in jobs] == [False, False, False]
    # One whose like took longer than is left waits for another time, and is no failure.
    late = Task("deit_tiny", "tome", 0.5, seed=2)
    again.rows["deit_tiny bat keep=0.5"]["seconds"] = 1000.0
    claims.work_off([late], again, fake(tmp_path), jobs=1, until=time.monotonic() + 1000)
    assert claims.is_open(late, again) and again.tries(late.key) == 0


@pytest.mark.slow
def test_a_sweep_is_done_when_it_has_every_row_and_given_up_when_it_fails(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    results, sweep = Results(tmp_path / "results.json", CONDITIONS), Sweep("deit_tiny", "methods", ("bat",), (0.5,))
    judge_of(data, trained, tmp_path)(sweep)
    more = replace(sweep, keeps=(0.5, 0.3))
    assert claims.is_open(more, results)
    claims.work_off([more], results, fake(tmp_path), jobs=1, until=math.inf)
    assert results.content["failed"][more.key] == {"tries": 2, "reason": "no sweeps here"}
    assert not claims.is_open(more, results)
    # What there was until then is kept, and is no whole.
    assert [row["keep"] for row in results.rows[more.key]["rows"]] == [1.0, 0.5]
    assert not results.rows[more.key]["whole"]
    results.content["failed"].clear()
    assert claims.is_open(more, results) and not claims.is_open(sweep, results)


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(TokencutError, match=r"--model deit_tiny=nowhere: there is no nowhere/model.safetensors; type"):
        claims.conditions_of(claims.parse(["--model", "deit_tiny=nowhere", "--train", "a", "--val", "b", "-o", "c"]))


def test_the_benchmark_goes_on_where_it_was_and_writes_no_paths_of_this_machine(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", f"deit_tiny={trained}", "--train", str(data / "train"), "--val", str(data / "val")]
    words += ["-o", str(tmp_path / "out"), "--device", "cpu", "--seeds", "1"]
    monkeypatch.setattr(claims, "Judge", FakeJudge)
    monkeypatch.setattr(claims, "TRIES", 1)
    monkeypatch.setattr(
        Plan, "methods_tuned", lambda plan, label, seed: plan._tuned(label, ("bat", "evit"), (0.5,), seed)
    )

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py claims", *words, *more])
        claims.main()
        return capsys.readouterr().out

    run()
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    assert str(tmp_path) not in text and str(data) not in text
    assert "python examples/benchmarks/run.py claims --model deit_tiny=runs/deit_tiny --train train --val val" in text
    assert "deit_tiny, as trained: epochs 3, batch 8" in text
    for extra in (["--note", "Trained on a Sunday."], []):
        run("--time-limit", "0", *extra)
        assert "- Trained on a Sunday." in (tmp_path / "out" / "RESULTS.md").read_text()
    assert "done deit_tiny bat keep=0.5 epochs=3 seed=1" in run("--list").splitlines()
    monkeypatch.setattr(claims, "TRIES", 2)
    assert "left deit_tiny evit keep=0.5 epochs=3 seed=1" in run("--list").splitlines()
