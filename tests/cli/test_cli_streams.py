"""What goes to stdout and stderr where a reader, a disk, a closed stream or a file's own text has it otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from outcome import TINY, Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tokencut.cli import app, render

# What clears a screen, hides a line, and adds one that looks like an error of ours.
NASTY = "cat\x1b[2J\x9b2K\rx\nerror: all is lost\u2028\u202e!"
SHOWN = "cat [2J 2K x error: all is lost  !"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of a shell in which `tokencut` is this one."""
    line = f'tokencut() {{ "{sys.executable}" -m tokencut "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)


WRONG = [
    (("profle", "--json"), 2),
    (("--json", "models"), 2),
    (("profile", "--json", "--kep", "1"), 2),
    (("eval", "digits", "--json"), 2),
    (("compress", "digits", "--json"), 2),
    (("models", "xyzzy", "--json"), 1),
    (("info", "none.safetensors", "--json"), 2),
]


@pytest.mark.parametrize(
    ("words", "code"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value)
)
def test_with_json_an_error_is_an_object_on_stdout_too(run: Run, words: tuple[str, ...], code: int) -> None:
    done = run(*words)
    assert done.code == code
    assert done.json == {"error": done.err.removeprefix("error: ").strip(), "exit_code": code}
    assert len(done.err.splitlines()) == 1


def test_every_command_has_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert all("--json" in run(name, "--help").out for name in app.COMMANDS)


def test_json_behind_two_dashes_is_a_word_like_any_other(run: Run) -> None:
    assert run("models", "--", "--json").out == ""


def test_an_interrupt_is_told_in_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(pattern: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokencut.models.names.list_supported", interrupt)
    done = run("models", "--json")
    assert (done.code, done.json) == (130, {"error": "interrupted", "exit_code": 130})


def test_what_a_file_says_cannot_move_the_cursor_or_fake_a_line(run: Run, tmp_path: Path, compressed: Path) -> None:
    with safe_open(compressed, "pt") as file:
        told = json.loads(file.metadata()["tokencut"])
    told["label_names"] = [NASTY, "dog", "emu"]
    told["origin"] |= {"kind": "hub", "name": NASTY, "seed": None, "licence": NASTY}
    path = tmp_path / "nasty\x1b[2J\nname.safetensors"
    save_file(load_file(compressed), path, metadata={"tokencut": json.dumps(told)})
    for words in (("info", path), ("profile", path, "--no-latency")):
        done = run(*words)
        assert done.code == 0
        for line in (done.out + done.err).splitlines():
            assert line.isprintable()
            assert not line.startswith("error:")
    assert SHOWN in run("info", path).out
    labels = run("info", path, "--json").json["label_names"]
    assert labels[0] == NASTY  # JSON has escapes of its own
    assert all(line.isprintable() for line in run("info", path, "--json").out.splitlines())


def test_every_way_to_stdout_is_cleaned(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    render.write(NASTY)
    render.show(NASTY, render.facts([(NASTY, NASTY)]), render.table([NASTY], [[NASTY]], title=NASTY))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.isprintable() for line in lines)
    assert "".join(lines).count(SHOWN) == 7


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.slow
def test_closed_streams(tmp_path: Path) -> None:
    done = shell("tokencut models vit_tiny >&-")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: stdout is closed, so no result could be printed; send it to a file or /dev/null\n"
    done = shell("tokencut models xyzzy 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    done = shell("tokencut models vit_tiny 2>&- <&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert "vit_tiny_patch16_224" in done.stdout
    # With stderr closed the next file to be opened would have its number, and get what libraries print there.
    output = tmp_path / "tiny.safetensors"
    done = shell(f"tokencut compress {' '.join(TINY)} --keep 0.5 -o {output} 2>&- >&-")
    assert done.returncode == 1
    assert not output.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes")
@pytest.mark.slow
def test_a_reader_that_leaves_half_way_is_no_error() -> None:
    for words in ("--help", "compress --help", "models", "models --json"):
        done = shell(f"tokencut {words} | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}")
        assert (done.stdout, "error" in done.stderr) == ("0\n", False)


@pytest.mark.parametrize("words", [("--help",), ("models", "--help")])
def test_help_that_cannot_be_printed_is_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with full.open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        done = run(*words)
        monkeypatch.undo()
    assert done.code == 1
    assert "No space left on device" in done.err


def test_help_shows_what_stands_in_brackets(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for name, command in app.COMMANDS.items():
        said = (command.__doc__ or "").split()
        shown = run(name, "--help").out.split()
        assert [word for word in said if "[" in word and word not in shown] == []
    assert "'tokencut[onnx]'." in run("export", "--help").out


def test_help_is_a_word_too(run: Run) -> None:
    assert run("help").out == run("--help").out
    assert run("help", "models").out == run("models", "--help").out
    assert run("help", "modles").code == 2


def test_home_folders_stand_in_options_too(
    run: Run, tmp_path: Path, compressed: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(compressed.read_bytes())
    (tmp_path / "val").symlink_to(pictures)
    assert run("info", "~/model.safetensors").code == 0
    assert run("profile", "~/model.safetensors", "--no-latency").code == 0
    words = ("eval", "~/model.safetensors", "--data", "~/val", "-j", "0", "--predictions=~/p.csv")
    assert run(*words).code == 0
    assert (tmp_path / "p.csv").exists()
    assert run("compress", *TINY, "-o~/new.safetensors").code == 0
    assert (tmp_path / "new.safetensors").exists()
