"""How the names of exported models end, which runtimes take as they are, and which hold no weights to work on."""

from __future__ import annotations

import os

# Whoever wrote them, whether or not tokencut writes or runs that kind.
ENDINGS = (".onnx", ".pt2", ".xml", ".pte", ".ptd", ".tflite", ".engine", ".plan", ".mlpackage", ".mlmodel", ".ort")
WHAT = "an exported model, which profile and eval run where its runtime is installed; {} it came from"


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a path ends like that of an exported model."""
    return os.fspath(path).lower().endswith(ENDINGS)
