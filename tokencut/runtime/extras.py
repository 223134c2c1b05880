"""Packages that only some features need: each is installed with an extra of this one."""

from __future__ import annotations

import importlib.util

from tokencut.errors import TokencutError


def require(needing: str, *packages: str, extra: str) -> None:
    """Refuses to go on without some packages, before any work is done.

    Args:
        needing: What needs them, with its verb, as the message begins: `the plots need`.
        packages: Import names.
        extra: The extra that installs them.

    Raises:
        TokencutError: Some are missing, with the command that installs them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names, are = " and ".join(missing), "are" if len(missing) > 1 else "is"
        raise TokencutError(f"{needing} {names}, which {are} not installed; type pip install 'tokencut[{extra}]'")
