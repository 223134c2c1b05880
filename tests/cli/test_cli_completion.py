"""Completion: what shells read, that a real bash completes by it, and that installing loses nothing of the user's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from outcome import Run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(run: Run, shell: str) -> None:
    done = run("--show-completion", shell)
    assert (done.code, done.err) == (0, "")
    assert f"_TOKENCUT_COMPLETE=complete_{shell}" in done.out


def test_an_unknown_shell_is_refused_with_the_known_ones(run: Run) -> None:
    for option in ("--show-completion", "--install-completion"):
        done = run(option, "bsh")
        assert (done.code, done.err) == (
            2, "error: no completion for the shell 'bsh', did you mean bash? shells are bash, zsh, fish; type tokencut "
            "--show-completion bash\n",
        )  # fmt: skip


def test_installing_appends_one_line_once(run: Run, home: Path) -> None:
    mine = b"export A='\xe9'  # not UTF-8, and no newline at the end"
    (home / ".bashrc").write_bytes(mine)
    for _ in range(2):
        done = run("--install-completion", "bash")
        assert (done.code, done.notes) == (
            0, [f"wrote {home}/.bash_completions/tokencut.sh; open a new terminal for it to take effect"],
        )  # fmt: skip
    assert (home / ".bashrc").read_bytes() == mine + b"\nsource ~/.bash_completions/tokencut.sh\n"
    assert (home / ".bash_completions/tokencut.sh").read_text() == run("--show-completion", "bash").out
    assert run("--install-completion", "zsh").code == 0
    assert (home / ".zshrc").read_text() == "fpath+=~/.zfunc; autoload -Uz compinit; compinit\n"
    assert run("--install-completion", "fish").code == 0
    assert sorted(path.name for path in home.iterdir()) == [
        ".bash_completions",
        ".bashrc",
        ".config",
        ".zfunc",
        ".zshrc",
    ]


def test_a_home_that_cannot_be_written_is_one_line(run: Run, home: Path) -> None:
    (home / ".bash_completions").write_text("a file")
    done = run("--install-completion", "bash")
    assert done.code == 1
    assert done.err.endswith("; put what tokencut --show-completion bash prints where your shell reads it\n")
    assert not (home / ".bashrc").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("pre", {"predict"}),
        ("cache --cl", {"--clear"}),
        ("--vers", {"--version"}),
    ],
)
def test_bash_completes_commands_and_options(run: Run, tmp_path: Path, typed: str, words: set[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    program = tmp_path / "bin" / "tokencut"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tokencut "$@"\n')
    program.chmod(0o755)
    (tmp_path / "script").write_text(run("--show-completion", "bash").out)
    line = f"tokencut {typed}".split()
    code = (
        f"source {tmp_path / 'script'}; COMP_WORDS=({' '.join(line)}); COMP_CWORD={len(line) - 1}; "
        '_tokencut_completion tokencut; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([bash, "-c", code], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert (set(done.stdout.split()), done.stderr) == (words, "")


def test_the_version_has_a_short_name(run: Run) -> None:
    assert run("-V").out == run("--version").out != ""
