"""The kinds of exported files: one file each, found through the registry by the name or by how a file's name ends.

Every module of this package is imported, so that a file with a registered runtime is all that a new kind takes.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from functools import cache

from tokencut.errors import UsageError
from tokencut.export.runtimes import base
from tokencut.export.runtimes.base import ExportedModel, Runtime, register
from tokencut.files import user_path

__all__ = ["ExportedModel", "Runtime", "exported_kind", "open_exported", "register", "runtimes"]


@cache
def _load_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def runtimes() -> dict[str, Runtime]:
    """All kinds of files by name, in alphabetical order."""
    _load_all()
    return dict(sorted(base.registered().items()))


def exported_kind(path: str | os.PathLike[str]) -> Runtime | None:
    """The kind of a file as its name ends, in capitals or not; None where it ends like none of them."""
    name = os.fspath(path).lower()
    fitting = [kind for kind in runtimes().values() if name.endswith(kind.suffix)]
    return max(fitting, key=lambda kind: len(kind.suffix), default=None)


def open_exported(path: str | os.PathLike[str]) -> ExportedModel:
    """Opens a file that `export_model` wrote, to be called, evaluated and timed as any model.

    Args:
        path: The file; its runtime is the one that its name ends like.

    Raises:
        UsageError: Its name ends like none of them.
        TokencutError: The runtime is not installed.
        ArtifactError: The file does not exist, is damaged, or was not written by tokencut.
    """
    file, kind = user_path(path), exported_kind(path)
    if kind is None:
        endings = sorted(each.suffix for each in runtimes().values())
        raise UsageError(f"{file} is no exported file: it ends in none of {', '.join(endings)}; name one that "
                         "`tokencut.export_model(model, 'FILE.onnx')` wrote")  # fmt: skip
    return kind.open(file)
