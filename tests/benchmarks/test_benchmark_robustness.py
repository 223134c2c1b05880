"""The benchmarks that damage files and kill runs: that they do so, and that they would notice."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import headers
import kills
import pytest

from tokencut.errors import ArtifactError, TokencutError


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file whose header is mutated."""
    return headers.small_file(tmp_path_factory.mktemp("small"))


def test_mutations_repeat_differ_and_mostly_damage(content: bytes, tmp_path: Path) -> None:
    path, outcomes = tmp_path / "m.safetensors", Counter[str]()
    made = [headers.mutated(content, number) for number in range(150)]
    assert made[7] == headers.mutated(content, 7)
    assert headers.mutated(content, 7, seed=1) != made[7]
    for one in made:
        path.write_bytes(one)
        word, wrong = headers.outcome(path)
        assert wrong is None
        outcomes[word] += 1
    assert set(outcomes) <= {"read", "ArtifactError"}
    assert outcomes["ArtifactError"] > 100
    path.write_bytes(content)
    assert headers.outcome(path) == ("read", None)


def test_every_way_of_mutating_changes_the_header_alone(content: bytes) -> None:
    tensors = headers._parts(content)[1]
    for way in set(headers.WAYS) - {headers.cut_off, headers.move_slices}:
        made = [way(content, random.Random(seed)) for seed in range(20)]
        assert all(one.endswith(tensors) for one in made)
        assert sum(one != content for one in made) > 10


@pytest.mark.parametrize(
    ("raised", "wrong"),
    [(KeyError("x"), "KeyError: 'x'"), (RecursionError("deep"), "RecursionError: deep"),
     (ArtifactError(""), "an error without words"), (ArtifactError("damaged"), None)],
)  # fmt: skip
def test_an_exception_of_another_class_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: Exception, wrong: str | None
) -> None:
    def fail(path: Path) -> None:
        raise raised

    monkeypatch.setattr(headers, "read_info", fail)
    assert headers.outcome(tmp_path) == (type(raised).__name__, wrong)
    found = {"outcomes": {"read": 1}, "failures": {3: wrong} if wrong else {}, "slowest_s": 0.0, "memory_mib": 1.0}
    assert headers.failed(found) == (wrong is not None)
    assert headers.failed({**found, "failures": {}, "memory_mib": 2000.0})


@pytest.mark.slow
def test_pieces_are_kept_and_a_failure_has_an_exit_code(
    benchmark: Callable[..., tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[int] = []

    def piece(first: int, count: int, seed: int) -> dict[str, Any]:
        pieces.append(first)
        failures = {first: "KeyError: 'x'"} if first else {}
        return {"outcomes": {"read": count}, "failures": failures, "slowest_s": 0.001, "memory_mib": 600.0}

    monkeypatch.setitem(sys.modules, "headers", headers)
    monkeypatch.setattr(headers, "watched_piece", piece)
    words = ("headers", "-o", tmp_path / "headers.json", "--count")
    out, _ = benchmark(*words, 1500)
    assert out.startswith("1,500 mutated headers: read 1,500\n0 failures; slowest 1 ms, 600 MiB at most")
    with pytest.raises(SystemExit):
        benchmark(*words, 4000)
    with pytest.raises(SystemExit):
        benchmark(*words, 4000)
    assert pieces == [0, 0, 2000]


def test_a_process_that_hangs_or_dies_is_a_failure_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [{"outcomes": {"read": 3}, "failures": {}, "slowest_s": 0.5, "memory_mib": 7.0},
             {"outcomes": {"gone": 1}, "failures": {9: "hangs"}, "slowest_s": 0.0, "memory_mib": 0.0}]  # fmt: skip
    assert headers.merged(parts) == {
        "outcomes": {"read": 3, "gone": 1}, "failures": {9: "hangs"}, "slowest_s": 0.5, "memory_mib": 7.0,
    }  # fmt: skip


def test_what_a_kill_spoils_is_noticed(tmp_path: Path) -> None:
    trial = kills.Trial(tmp_path, False, tmp_path, 1, tmp_path / "log.txt")
    trial.check_users("now")
    (tmp_path / kills.OUTPUT).write_text("other")
    digest = kills.digests(tmp_path)[kills.OUTPUT]
    (tmp_path / "out.log.csv").write_text("log")
    (tmp_path / ".out.safetensors.x.part").write_text("part")
    trial.check_result(digest)
    with pytest.raises(TokencutError, match="is not that of the undisturbed run"):
        trial.check_result("another")
    (tmp_path / "left.txt").write_text("x")
    with pytest.raises(TokencutError, match=r"left over: left.txt"):
        trial.check_result(digest)
    (tmp_path / "precious.txt").write_text("gone")
    with pytest.raises(TokencutError, match="after SIGKILL, the user's precious.txt are not as they were"):
        trial.check_users("after SIGKILL")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_run_that_is_killed_comes_to_the_same_file() -> None:
    pytest.importorskip("sklearn")
    # In a process of its own: what is forked off this one would inherit what other tests have left in torch.
    words = [sys.executable, str(Path(kills.__file__).parent / "run.py"), "kills", "--kills", "2", "--epochs", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 kills (" in done.stdout
    assert done.stdout.endswith("every file equal to the last byte, and nothing of the user's touched\n")
