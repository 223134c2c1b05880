"""Completion of the command line by shells: the script a shell reads, where it goes, and the words it asks for.

Scripts and protocol are typer's. Installing is not: typer writes a shell's whole start-up file anew, which a full disk
would leave empty; here a line is appended to it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokencut.errors import TokencutError, UsageError
from tokencut.files import atomic_write
from tokencut.messages import nearest_known

PROGRAM = "tokencut"
VARIABLE = f"_{PROGRAM.upper()}_COMPLETE"

# Where each shell finds the script, the file it reads at its start, and the line there that makes it look; both in the
# user's home. fish looks by itself.
PLACES = {
    "bash": (Path(f".bash_completions/{PROGRAM}.sh"), Path(".bashrc"), f"source ~/.bash_completions/{PROGRAM}.sh"),
    "zsh": (Path(f".zfunc/_{PROGRAM}"), Path(".zshrc"), "fpath+=~/.zfunc; autoload -Uz compinit; compinit"),
    "fish": (Path(f".config/fish/completions/{PROGRAM}.fish"), None, ""),
}


def script(shell: str) -> str:
    """What a shell reads to complete our command lines.

    Raises:
        UsageError: It is of no shell that is known here.
    """
    if shell not in PLACES:
        raise UsageError(f"no completion for the shell {shell!r}{nearest_known(shell, PLACES)} shells are "
                         f"{', '.join(PLACES)}; type tokencut --show-completion bash")  # fmt: skip
    from typer._completion_shared import get_completion_script

    return str(get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell))


def install(shell: str) -> Path:
    """Writes the script where the shell finds it, and makes the shell look there.

    Returns:
        The script's place.

    Raises:
        UsageError: As `script`.
        TokencutError: A file could not be written.
    """
    content = script(shell)
    place, starter, line = PLACES[shell]
    target = Path.home() / place
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")
        if starter is not None:
            _append(Path.home() / starter, line)
    except OSError as error:
        raise TokencutError(f"cannot write {error.filename or target}: {error.strerror or error}; put what tokencut "
                            f"--show-completion {shell} prints where your shell reads it") from error  # fmt: skip
    return target


def _append(path: Path, line: str) -> None:
    """Adds a line to a file, unless it is in it."""
    before = path.read_bytes() if path.exists() else b""
    if line.encode() in before.splitlines():
        return
    with path.open("ab") as file:
        file.write((b"" if before.endswith(b"\n") or not before else b"\n") + line.encode() + b"\n")


def asked() -> bool:
    """Whether a shell asks for words, and nobody typed a command."""
    return VARIABLE in os.environ


def complete(command: Any) -> None:
    """Prints the words that a shell asks for.

    Args:
        command: What typer makes of an app.
    """
    from typer._completion_classes import completion_init

    completion_init()
    command.main(args=[], prog_name=PROGRAM, complete_var=VARIABLE)
