"""The examples in the public functions' docstrings: each runs and gives what it says."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import tokencut

EXPLAINED = [
    "CompressedModel", "capture", "compare", "compress", "draw", "evaluate", "export_model", "features_only",
    "find_levels", "find_schedule", "finetune", "load", "predict", "profile", "quantize", "save", "sweep",
]  # fmt: skip
NEEDS = {"draw": "matplotlib", "sweep": "matplotlib"}


@pytest.mark.parametrize("name", EXPLAINED)
@pytest.mark.slow
def test_the_example_gives_what_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(NEEDS.get(name, "torch"))
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder(recurse=False).find(getattr(tokencut, name), name, globs={})
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert found[0].examples
    failed = runner.run(found[0], out=told.append).failed
    assert not failed, "".join(told)


def test_every_public_function_has_one() -> None:
    functions = {name for name in tokencut.__all__ if name.islower()}
    assert functions == set(EXPLAINED) - {"CompressedModel"}
