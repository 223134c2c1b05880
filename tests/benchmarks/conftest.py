"""What the tests of the benchmarks share: their folder on the path, and the runner."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(FOLDER))


@pytest.fixture
def benchmark(run_script: Callable[..., tuple[str, str]]) -> Callable[..., tuple[str, str]]:
    """Runs a benchmark as typed, `benchmark(name, *words)`: what it printed, and what it said on stderr."""
    return partial(run_script, FOLDER / "run.py")
