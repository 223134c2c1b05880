"""Reduction methods: one file each, built from the primitives, found through the registry.

Every module of this package is imported, so that a file with a registered method is all that a new method takes.
Methods from other packages are found through the entry point group `tokencut.methods`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from tokencut.errors import TokencutError
from tokencut.methods import base
from tokencut.methods.base import Reduction, Scene, StageShape, option, register

__all__ = ["Reduction", "Scene", "StageShape", "make_method", "methods", "option", "register"]


@cache
def _load_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="tokencut.methods"):
        try:
            entry.load()
        except Exception as error:  # a foreign package may raise anything; say whose it is
            package = entry.dist.name if entry.dist else entry.value
            raise TokencutError(f"the method {entry.name!r} of the package {package} cannot be loaded ({error}); "
                                f"update it, or type: pip uninstall {package}") from error  # fmt: skip


def methods() -> dict[str, type[Reduction]]:
    """All methods by name, in alphabetical order."""
    _load_all()
    return dict(sorted(base.methods().items()))


def make_method(name: str, options: dict[str, object] | None = None) -> Reduction:
    """Builds a method from its name and settings; see `base.make_method`."""
    _load_all()
    return base.make_method(name, options)
