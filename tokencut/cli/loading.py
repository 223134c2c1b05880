"""Says that torch is being loaded, which takes seconds, as soon as a command begins to."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from tokencut.cli import render


class _Announcer(MetaPathFinder):
    """Is asked first where a module is, and leaves it to others to find it."""

    def __init__(self) -> None:
        self._said = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torch" and not self._said:
            self._said = True
            render.loading("torch and timm")
        return None


@contextmanager
def announced() -> Iterator[None]:
    """A context in which it is said that torch is being loaded, until anything else is."""
    announcer = _Announcer()
    sys.meta_path.insert(0, announcer)
    try:
        yield
    finally:
        sys.meta_path.remove(announcer)
        render.loaded()
