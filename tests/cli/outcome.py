"""What running the command line comes to, and the small model it is run on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# A timm model of 6 blocks and 0.1 M parameters, at 64 px with 16 image tokens.
TINY = ("test_vit", "--no-pretrained", "--img-size", "64", "--num-classes", "3")
CLASSES = ("ant", "bee", "cat")
# A fine-tune of two short epochs.
FINETUNE = ("-j", "0", "-b", "4", "--finetune-epochs", "2")


@dataclass(frozen=True)
class Outcome:
    """What a command line came to: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        found = json.loads(self.out, parse_constant=pytest.fail)
        assert isinstance(found, dict)
        return found

    @property
    def notes(self) -> list[str]:
        """The notes on standard error, of which nothing else may be there."""
        lines = self.err.splitlines()
        assert all(line.startswith("note: ") for line in lines), self.err
        return [line.removeprefix("note: ") for line in lines]


Run = Callable[..., Outcome]


def log_of(output: Path) -> list[dict[str, str]]:
    """The rows of the log that a fine-tune leaves beside its output."""
    with output.with_suffix(".log.csv").open(newline="") as file:
        return list(csv.DictReader(file))
