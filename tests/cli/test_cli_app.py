"""The command as a process: help, exit codes, what goes to which stream, and that no failure is more than one line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from outcome import TINY, Run

import tokencut
from tokencut.cli import app, render

HEAVY = ("torch", "timm", "fvcore", "PIL", "numpy")


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, *words], text=True, timeout=60, check=False, **streams)


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["compress", "--help-all"], ["eval"], ["profle"]])
def test_nothing_heavy_is_imported_before_a_command_runs(words: list[str]) -> None:
    code = (
        "import json, sys; from tokencut.cli.app import main; code = main(sys.argv[1:]); "
        f"print(json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]))"
    )
    done = python("-c", code, *words)
    assert json.loads(done.stdout.splitlines()[-1])[1] == []


def test_a_file_is_read_without_torch(compressed: Path) -> None:
    code = "import sys; from tokencut.cli.app import main; main(); print({'torch', 'timm'} & set(sys.modules))"
    done = python("-c", code, "info", str(compressed))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "set()"


def test_module_and_script_run_the_same(run: Run) -> None:
    done = python("-m", "tokencut", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tokencut {tokencut.__version__}\n", "")
    assert run("--version").out == done.stdout


def test_help_shows_commands_to_type(run: Run) -> None:
    done = run("--help")
    assert (done.code, done.err) == (0, "")
    assert "tokencut compress digits --keep 0.6 -o digits.safetensors" in done.out
    assert run().out == done.out
    for name in app.COMMANDS:
        assert f"tokencut {name} " in run(name, "--help").out
        assert run(name, "-h").code == 0


def test_every_option_of_the_contract_is_offered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shared = {"--checkpoint", "--no-pretrained", "--model-kwargs", "--num-classes", "--img-size", "--device", "--json",
              "--precision", "--batch-size", "--seed", "--keep", "--layers", "--method", "--method-option",
              "--reduce-by", "--prop-attn", "--no-prop-attn"}  # fmt: skip
    images = {"--data", "--limit", "--workers"}
    own = {
        "compress": images | {"--output", "--force", "--dtype"},
        "profile": {"--dense", "--no-latency", "--by-block"},
        "eval": images | {"--dense", "--predictions"},
        "visualize": {"--output", "--force", "--attention", "--compare"},
    }
    for name, options in own.items():
        offered = run(name, "--help").out.replace(",", " ").split()
        assert shared | options <= set(offered)


@pytest.mark.slow
def test_json_is_all_there_is_on_stdout(compressed: Path) -> None:
    done = python("-m", "tokencut", "profile", str(compressed), "--no-latency", "--keep", "0.4", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["keep"] == 0.4
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["note", "note"]
    assert done.stderr.startswith("note: loading torch and timm\n")


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_a_reader_that_leaves_is_no_error(word: str) -> None:
    command = [sys.executable, "-m", "tokencut", word]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_cannot_be_printed_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = python("-m", "tokencut", "--version", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "error: cannot print the result: No space left on device; free space, or send it elsewhere\n"


FAILURES = [
    (ValueError("odd\n  thing"), 1, "unexpected ValueError: odd thing; add --debug for a traceback to report"),
    (EOFError("cut"), 1, "unexpected EOFError: cut; add --debug for a traceback to report"),
    (MemoryError(), 1, "out of memory; type a smaller --batch-size, such as --batch-size 8"),
    (PermissionError(13, "Permission denied", "/x"), 1,
     "Permission denied: '/x'; add --debug to see where that came from"),
    (KeyboardInterrupt(), 130, "interrupted"),
]  # fmt: skip


@pytest.mark.parametrize(("failure", "code", "line"), FAILURES, ids=lambda value: type(value).__name__)
def test_whatever_goes_wrong_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int, line: str
) -> None:
    def fail(pattern: str | None) -> None:
        raise failure

    monkeypatch.setattr("tokencut.models.names.list_supported", fail)
    done = run("models")
    assert (done.code, done.out, done.err) == (code, "", f"error: {line}\n")


@pytest.mark.parametrize("words", [("--debug", "models", "xyzzy"), ("models", "xyzzy", "--debug")])
def test_debug_shows_the_traceback_as_well(run: Run, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.code == 1
    assert done.err.startswith("Traceback (most recent call last):")
    assert done.err.endswith("error: no supported model matches 'xyzzy'; type tokencut models for all of them\n")


def test_debug_behind_two_dashes_is_a_word_like_any_other(run: Run) -> None:
    assert run("models", "--", "--debug").err == (
        "error: no supported model matches '--debug'; type tokencut models for all of them\n"
    )


def test_what_libraries_fail_at_while_they_clean_up_is_not_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Untidy:
        def __del__(self) -> None:
            raise RuntimeError("no such worker")

    def leave(pattern: str | None) -> list[Any]:
        Untidy()
        return []

    hook = sys.unraisablehook
    monkeypatch.setattr("tokencut.models.names.list_supported", leave)
    assert len(run("models").err.splitlines()) == 1
    assert sys.unraisablehook is hook


def test_warnings_of_libraries_are_shown_with_debug_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging
    import warnings

    def complain(pattern: str | None) -> list[Any]:
        warnings.warn("an old habit", stacklevel=1)
        logging.getLogger("timm").warning("an odd name")
        return []

    monkeypatch.setattr("tokencut.models.names.list_supported", complain)
    assert len(run("models").err.splitlines()) == 1
    with pytest.warns(UserWarning, match="an old habit"):
        run("models", "--debug")


def test_numbers_that_json_does_not_know_become_null(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    render.write_json({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (1, None)}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": {"d": [1, None]}}


def test_text_that_a_terminal_cannot_show_is_replaced() -> None:
    done = python("-m", "tokencut", "größe", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown command 'gr\\xf6\\xdfe'; commands are")
    code = "from tokencut.cli import render\nwith render.streams(): render.write('1.0 ± 0.1')"
    assert python("-c", code, env={**os.environ, "PYTHONIOENCODING": "ascii"}).stdout == "1.0 ? 0.1\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_is_drawn_on_a_terminal_only(
    run: Run, monkeypatch: pytest.MonkeyPatch, compressed: Path, pictures: Path
) -> None:
    import pty

    words = ("eval", compressed, "--data", pictures, "-j", "0", "--json")
    assert "evaluating" not in run(*words).err
    assert are_progress_bars_disabled()  # those of downloads
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "80")
        assert run(*words).json["images"] == 12
    drawn = ""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 1 << 16):
            drawn += part.decode()
    os.close(ours)
    assert "evaluating" in drawn
    assert "12/12" in drawn
    assert "% top-1" in drawn


def test_small_model_is_what_the_tests_say(run: Run) -> None:
    assert run("profile", *TINY, "--no-latency", "--json").json["stages"][0]["tokens_in"] == 16
