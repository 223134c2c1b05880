"""The fine-tuning benchmark: its shares and differences by hand, and that it runs, goes on, and refuses to mix."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import tuning_table

SMALL = ("--keep", "0.1", "--seeds", "1", "--epochs", "1", "--train-limit", "16", "--limit", "20", "-b", "8", "-j", "0",
         "--device", "cpu")  # fmt: skip
WORDS = ("digits", "--train-data", "digits", "--data", "digits", *SMALL)

Script = Callable[..., tuple[str, str]]


@pytest.fixture
def script(benchmark: Script) -> Script:
    """Runs the benchmark with the words given: what it printed, and what it said on stderr."""
    return partial(benchmark, "finetune")


def row(correct: str) -> dict[str, Any]:
    return {"correct": correct, "top1": 100 * correct.count("1") / len(correct), "gmacs": 1.0}


def test_what_was_recovered_by_hand() -> None:
    # Dense 100, off the shelf 25, fine-tuned 50 and 100: 50 of 75 points on average.
    line = tuning_table.Line("bat", 0.5, row("1000"), {1: row("1100"), 2: row("1111")})
    assert tuning_table.recovered(line, 100.0) == "67 % of 75.00"
    assert tuning_table.recovered(line, 20.0) == "nothing was lost"
    assert tuning_table.spread(line) == "75.00 (50.00 to 100.00)"


def test_differences_are_paired_over_images_and_averaged_over_seeds() -> None:
    first = tuning_table.Line("bat", 0.5, row("0000"), {1: row("1100"), 2: row("1110"), 3: row("0000")})
    second = tuning_table.Line("evit", 0.5, row("0000"), {1: row("1000"), 2: row("0110"), 4: row("1111")})
    # Of seeds 1 and 2, by image: (0 + 1) / 2, (1 + 0) / 2, (0 + 0) / 2, 0: a mean of 25 points.
    found = tuning_table.lead([first], [second])
    assert found.points == 25.0
    assert found.standard_error == pytest.approx(100 * (1 / 12) ** 0.5 / 2)
    assert tuning_table.lead([first], [tuning_table.Line("x", 0.5, row("0000"), {9: row("1111")})]) is None


@pytest.mark.slow
def test_the_script_on_the_digits_and_once_more(tmp_path: Path, script: Script) -> None:
    pytest.importorskip("sklearn")
    output = tmp_path / "results.json"
    words = (*WORDS, "--methods", "evit", "-o", output)
    assert script(*words, "--max-seconds", "0")[0] == "nothing has been fine-tuned yet\n"
    printed, said = script(*words)
    assert "4 of 4" in said
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [line[:2] for line in lines[1:]] == [["| 1", "dense"], ["| 0.1", "evit"]]
    assert "1 epochs, 2 updates of 8 images" in printed
    rows = json.loads(output.read_text())["rows"]
    assert set(rows) == {
        f"{what} at {keep}, {how}" for what, keep in (("dense", "1"), ("evit", "0.1"))
        for how in ("off the shelf", "seed 1")
    }  # fmt: skip
    assert all(len(found["correct"]) == 20 for found in rows.values())
    assert rows["dense at 1, seed 1"]["history"][0]["distillation"] == pytest.approx(0.0, abs=0.1)
    assert list(tmp_path.glob("results.json.resume/*")) == []

    # One row lost: only that is done again, to the same result; the versions that made the others stay named.
    lost = rows.pop("evit at 0.1, seed 1")
    content = json.loads(output.read_text())
    output.write_text(json.dumps({**content, "rows": rows, "versions": {**content["versions"], "timm": "1.0"}}))
    again, said = script(*words)
    assert said.splitlines()[-1].startswith("4 of 4") and len(said.splitlines()) == 1
    assert json.loads(output.read_text())["rows"]["evit at 0.1, seed 1"]["correct"] == lost["correct"]
    assert again.splitlines()[:4] == printed.splitlines()[:4]
    assert f"timm 1.0 and {timm.__version__}" in again
    with pytest.raises(SystemExit) as caught:
        script(*words, "--precision", "bf16")
    assert (
        caught.value.code
        == f"error: {output} holds results made with other precision (fp32, not bf16); give another -o"
    )


@pytest.mark.slow
def test_a_grid_is_judged_on_training_images_held_out(tmp_path: Path, script: Script) -> None:
    pytest.importorskip("sklearn")
    printed, _ = script("digits", "--train-data", "digits", "--held-out", "30", *SMALL, "--methods", "bat",
                        "--grid", "alpha=0,0.1", "lr_scaling=none,rms", "-o", tmp_path / "grid.json")  # fmt: skip
    # A row of each with the dense model fine-tuned alike beside it; of those, against the dense model as it came.
    lines = [line.split(" | ") for line in printed.splitlines()]
    for variant in (f"alpha={alpha} lr_scaling={scaling}" for alpha in ("0", "0.1") for scaling in ("none", "rms")):
        (dense,) = (line for line in lines if line[:2] == ["| 1", f"dense {variant}"])
        (cut,) = (line for line in lines if line[:2] == ["| 0.1", f"bat {variant}"])
        assert all("±" in cell for cell in (dense[5], cut[5], cut[6]))
    assert "judged by 20 images of training images held out" in printed
    rows = json.loads((tmp_path / "grid.json").read_text())["rows"]
    assert rows["bat alpha=0.1 lr_scaling=rms at 0.1, seed 1"]["history"][0]["importance"] > 0
    assert "importance" not in rows["bat alpha=0 lr_scaling=rms at 0.1, seed 1"]["history"][0]
    assert len(rows) == 2 + 8


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--grid", "speed=1"), "error: --grid speed is no part of a recipe, expected one of epochs, "),
        (("--grid", "lr_scaling=size"), "error: --lr-scaling size is not one of rms, none; type --lr-scaling rms"),
        (("--grid", "alpha=-1"), "error: --alpha -1.0 is not a number from 0 to 1000; type --alpha 0.0"),
    ],
)
def test_wrong_words(tmp_path: Path, script: Script, words: tuple[str, ...], line: str) -> None:
    with pytest.raises(SystemExit) as caught:
        script(*WORDS, *words, "-o", tmp_path / "results.json")
    assert str(caught.value.code).startswith(line)
