"""The three commands of the help text, one after the other, with what is bundled and no network."""

from __future__ import annotations

from pathlib import Path

import pytest
from outcome import Run


def test_compress_profile_eval(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the images come with scikit-learn")
    output = tmp_path / "digits.safetensors"
    made = run("compress", "digits", "--keep", "0.6", "-o", output, "--json")
    assert (made.code, made.json["model"], made.json["layers"], made.notes) == (0, "digits", [4, 7, 10], [])
    cost = run("profile", output, "--no-latency", "--json").json
    assert [stage["tokens_out"] for stage in cost["stages"]] == [39, 24, 15]
    assert cost["compressed"]["gmacs"] == made.json["gmacs"] < 0.7 * made.json["dense_gmacs"]
    words = ("eval", output, "--data", "digits", "-j", "0", "--limit", "200", "--json")
    assert run(*words, "--dense").json["top1"] >= 95
    assert run(*words).json["top1"] >= 90
