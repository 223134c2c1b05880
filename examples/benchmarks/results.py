"""The file that keeps what a long benchmark found, so that the same command goes on where it was cut off."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import timm
import torch

import tokencut
from tokencut.errors import TokencutError
from tokencut.files import atomic_write
from tokencut.runtime.resume import require_same

VERSIONS = {"torch": torch.__version__, "timm": timm.__version__, "tokencut": tokencut.__version__}


class Results:
    """What was found so far, in a JSON file that is whole at any moment.

    Attributes:
        path: The file.
        content: What is in it: the `settings` that all results share, the `versions` that made them, `rows` by the keys
            of their tasks, how often and why a task `failed`, and what else a benchmark keeps there.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, growing: Collection[str] = ()) -> None:
        """Opens the file, or begins one.

        Args:
            path: The file.
            settings: What all results share.
            growing: The settings with parts that may be added; those that are there must stay as they are.

        Raises:
            TokencutError: It cannot be read, or holds the results of other settings.
        """
        self.path = path
        self.content: dict[str, Any] = {
            "settings": dict(settings),
            "versions": dict(VERSIONS),
            "rows": {},
            "failed": {},
        }
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            held, wanted = dict(found["settings"]), dict(settings)
            for name in growing:
                held[name], wanted[name] = (
                    {**held[name], **settings[name], **held[name]},
                    {**held[name], **settings[name]},
                )
            self.content |= {**found, "rows": dict(found["rows"]), "versions": {**VERSIONS, **found["versions"]}}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise TokencutError(f"cannot read {path}: {error}; give another -o") from error
        made, now = ({name: str(value) for name, value in each.items()} for each in (held, wanted))
        require_same(f"{path} holds results", made, now, "give another -o")
        self.content["settings"] = held

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """What was found, by the task's key."""
        rows: dict[str, dict[str, Any]] = self.content["rows"]
        return rows

    def add(self, key: str, found: dict[str, Any]) -> None:
        """Keeps a result."""
        self.rows[key] = found
        held = self.content["versions"]
        for name, version in VERSIONS.items():
            if version not in held[name].split(" and "):
                held[name] += f" and {version}"
        self.save()

    def fail(self, key: str, reason: str) -> None:
        """Notes that a task came to nothing, and why."""
        self.content["failed"][key] = {"tries": self.tries(key) + 1, "reason": reason}
        self.save()

    def tries(self, key: str) -> int:
        """How often a task came to nothing."""
        tries: int = self.content["failed"].get(key, {"tries": 0})["tries"]
        return tries

    def save(self) -> None:
        """Writes the file."""
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
