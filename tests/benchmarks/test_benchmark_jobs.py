"""What long benchmarks share: processes that carry out tasks, the file of results, differences, and the runner."""

from __future__ import annotations

import json
import math
import multiprocessing
import operator
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tables
from jobs import carried_out
from results import Results

from tokencut.cli.options import read_keep
from tokencut.errors import ArtifactError, TokencutError, UsageError


def test_jobs_share_the_tasks_and_end_in_time() -> None:
    for jobs in (1, 2):
        done = carried_out(operator.neg, [1, 2, 3, 4], jobs=jobs)
        assert sorted(done) == [(1, -1), (2, -2), (3, -3), (4, -4)]
        assert list(carried_out(operator.neg, [1, 2], jobs=jobs, until=0.0)) == []


def test_what_outlasts_the_time_is_ended_and_what_would_is_not_begun() -> None:
    tasks = [0.0, 1000.0, 0.0]
    done = list(carried_out(time.sleep, tasks, jobs=1, until=time.monotonic() + 500, seconds=lambda task: task))
    assert done == [(0.0, None), (0.0, None)]
    assert list(carried_out(time.sleep, [1000.0], jobs=1, until=time.monotonic() + 1)) == []


def test_what_goes_wrong_in_a_job_is_told() -> None:
    with pytest.raises(UsageError, match="keep two is not a number"):
        list(carried_out(read_keep, ["0.5", "two"], jobs=2))
    with pytest.raises(TokencutError) as caught:
        list(carried_out(os._exit, [1, 1], jobs=2))
    assert str(caught.value) == "a process ended unexpectedly, often for want of memory; type fewer --jobs"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_may_be_tried_again_while_the_rest_goes_on(jobs: int) -> None:
    met: list[str] = []

    def again(task: str, error: TokencutError) -> bool:
        met.append(f"{task}: {type(error).__name__}")
        return len(met) < 2

    done = list(carried_out(read_keep, ["two", "0.5"], jobs=jobs, on_failure=again))
    assert done == [("0.5", 0.5)]
    assert met == ["two: UsageError"] * 2


def test_a_process_that_died_is_replaced() -> None:
    lost: list[int] = []
    # Each ends its process; one after the other they need two.
    found = list(carried_out(os._exit, [3, 4], jobs=1, until=time.monotonic() + 500,
                             on_failure=lambda task, error: lost.append(task) is not None))  # fmt: skip
    assert (found, lost) == ([], [3, 4])


def test_a_job_starts_processes_as_the_platform_does() -> None:
    asked = "__import__('multiprocessing').get_start_method()"  # of the process that answers
    assert list(carried_out(eval, [asked], jobs=2)) == [(asked, multiprocessing.get_all_start_methods()[0])]


def test_results_are_kept_for_the_same_settings_only(tmp_path: Path) -> None:
    path, settings = tmp_path / "results.json", {"epochs": 3, "recipe": {"lr": 0.1}, "models": {"small": "a"}}
    results = Results(path, settings, growing=("models",))
    results.fail("one", "lost")
    results.add("two", {"top1": 50.0})
    again = Results(path, {**settings, "models": {"tiny": "b"}}, growing=("models",))
    assert again.content["settings"]["models"] == {"tiny": "b", "small": "a"}
    assert (again.rows, again.tries("one"), again.tries("two")) == ({"two": {"top1": 50.0}}, 1, 0)
    with pytest.raises(
        ArtifactError, match=r"results.json holds results made with other epochs \(3, not 1\) and other recipe"
    ):
        Results(path, {**settings, "epochs": 1, "recipe": {"lr": 0.1, "warmup": 1}}, growing=("models",))
    with pytest.raises(ArtifactError, match=r"holds results made with other models .*; give another -o"):
        Results(path, {**settings, "models": {"small": "c"}}, growing=("models",))
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(TokencutError, match=r"cannot read .*results.json: .*; give another -o"):
        Results(path, settings)


def test_differences_by_hand() -> None:
    first, second = {"correct": "1101"}, {"correct": "1000"}
    found = tables.ahead([(first, second), (second, second)])
    assert found is not None
    # By image, averaged over both pairs: 0, 0.5, 0, 0.5.
    assert found.points == 25.0
    assert found.standard_error == pytest.approx(100 * math.sqrt(4 * 0.25**2 / 3 / 4))
    assert tables.ahead([]) is None
    assert tables.markdown(["a", "b"], [[1, None]]) == "| a | b |\n|---|---|\n| 1 |  |"


def test_the_runner_lists_what_there_is(benchmark: Callable[..., tuple[str, str]]) -> None:
    listed = {line.split()[0] for line in benchmark()[0].splitlines() if line and not line.startswith(" ")}
    assert listed >= {"speed", "scaling", "precision", "defaults", "finetune", "schedules", "train", "claims", "shards"}
    assert not listed & {"run", "jobs", "results", "tables", "timing", "page"}
    with pytest.raises(SystemExit, match=r"^error: there is no benchmark sped, expected one of .*speed"):
        benchmark("sped")
    with pytest.raises(SystemExit, match=r"^error: .* holds no model.safetensors"):
        benchmark("shards", "tests")
