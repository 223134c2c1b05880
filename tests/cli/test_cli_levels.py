"""A keep rate for each image from the command line: found, written, judged, and refused where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from outcome import TINY, Run

pytestmark = pytest.mark.usefixtures("run")


@pytest.mark.slow
def test_levels_are_found_written_and_judged(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / "levels.safetensors"
    words = [
        "--mean-gmacs",
        "0.017",
        "--levels",
        "2",
        "--calibration",
        "digits",
        "--calibration-limit",
        "40",
        "--device",
        "cpu",
        "--json",
    ]
    made = run("compress", "digits", *words, "-o", path)
    assert made.code == 0
    found = made.json["levels"]
    assert len(found["levels"]["keeps"]) <= 2 and made.json["gmacs"] == pytest.approx(found["gmacs"])
    assert run("info", path, "--json").json["recipe"]["levels"] == found["levels"]
    assert " of the images" in run("info", path).out
    judged = run("eval", path, "--data", "digits", "--limit", "40", "--device", "cpu", "--json")
    assert judged.code == 0 and judged.json["levels"] == found["levels"]["keeps"]
    assert judged.json["images"] == 40 and judged.json["top1"] > 80
    refused = run("profile", path, "--no-latency")
    assert refused.code == 2 and "profile takes one schedule, and this model has levels" in refused.err
    assert "type --keep 0.5 for one" in refused.err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--levels 3", "--levels is for a keep rate for each image; add --mean-gmacs G --calibration DIR"),
        ("--mean-gmacs 0.001", "--mean-gmacs needs images to choose by"),
        ("--mean-gmacs 0.001 --calibration digits --keep 0.5", "and --keep is for one schedule; leave one out"),
        ("--mean-gmacs 0.001 --calibration digits --max-drop 1", "and --max-drop is for one schedule; leave one out"),
        ("--mean-gmacs 0.001 --calibration digits --dry-run", "and --dry-run is for one; leave it out"),
        ("--mean-gmacs 0 --calibration digits", "a number above 0"),
    ],
)
def test_what_does_not_fit_is_told(run: Run, tmp_path: Path, words: str, problem: str) -> None:
    refused = run("compress", *TINY, *words.split(), "-o", tmp_path / "out.safetensors")
    assert refused.code == 2 and problem in refused.err
    assert not list(tmp_path.iterdir())
