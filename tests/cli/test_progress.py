"""Progress: what fits into a line, how long it still takes, and when lines are printed where nothing can be drawn."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokencut.cli import progress, render
from tokencut.cli.observer import standing
from tokencut.cli.progress import LONGEST_BAR, Line, Pauses, Task, duration

WORDS = ("78.12 % top-1", "3 rows left", "512 images/s")
LONG = "evaluating vit_small_patch14_reg4_dinov2.lvd142m"


def drawn(line: Line) -> str:
    return line.name + ("  " + "=" * line.bar if line.bar else "") + "  " + line.words


def half_way(name: str = "evaluating deit_small", words: tuple[str, ...] = WORDS) -> Task:
    """25,000 of 50,000 images after 100 s, told at 0 s for the first time."""
    task = Task(name, 0.0)
    task.update(name, 0, 50_000, words, 0.0)
    task.update(name, 25_000, 50_000, words, 100.0)
    return task


@pytest.mark.parametrize("name", ["evaluating deit_small", LONG, "timing"])
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_what_runs_the_total_and_the_time_left_always_fit(name: str, width: int) -> None:
    line = half_way(name).line(width, 100.0)
    assert len(drawn(line)) <= width
    assert line.words.startswith("25,000/50,000  2 min left")
    free = width - 27 - 10 - len("  ".join(("", *WORDS)))  # all that is beside a short bar and all words
    assert (line.name == name) == (len(name) <= min(max(24, width // 3, free), width - 27))
    assert line.name == name or (line.name[:1], line.name[-8:]) == (name[:1], name[-8:])


def test_a_bar_and_words_take_the_room_that_is_left() -> None:
    task = half_way()
    narrow, usual, wide = (task.line(width, 100.0) for width in (60, 80, 120))
    assert narrow == Line("evaluating deit_small", 10, 5, "25,000/50,000  2 min left")
    assert usual == Line("evaluating deit_small", 15, 8, "25,000/50,000  2 min left  78.12 % top-1")
    assert wide == Line("evaluating deit_small", 28, 14, "25,000/50,000  2 min left  " + "  ".join(WORDS))
    assert task.line(200, 100.0).bar == LONGEST_BAR
    path = half_way("evaluating /a/folder/with/a/long/path/out.safetensors").line(80, 100.0)
    assert half_way("unpacking images-of-a-long-name.tar.gz", ()).line(80, 100.0).name[-7:] == ".tar.gz"
    assert half_way("timing all models in turn", ()).line(64, 100.0).name == "timing all models in turn"
    assert (path.name, path.words) == ("evalua...h/out.safetensors", usual.words)


def test_before_anything_is_known_the_time_passes() -> None:
    task = Task("loading torch and timm", 10.0)
    assert task.line(80, 13.2) == Line("loading torch and timm", 0, 0, "3 s")
    assert task.seconds_left(13.2) is None


def test_time_left_is_by_the_pace_since_it_was_told_first() -> None:
    task = Task("timing", 0.0)
    task.update("timing", 1, 21, (), 5.0)  # the first took 5 s, of which 4 to warm up
    assert task.seconds_left(5.0) == pytest.approx(100)
    task.update("timing", 3, 21, (), 7.0)
    assert task.seconds_left(7.0) == pytest.approx(18)
    assert task.seconds_left(10.0) == pytest.approx(15)  # it passes while nothing is told
    assert task.seconds_left(99.0) == 0
    task.update("timing", 4, 21, (), 8.0, left=60.0)  # it is known better
    assert task.seconds_left(9.0) == 59


def test_one_task_follows_another() -> None:
    task = Task("sweep", 0.0)
    task.update("bat, keep 0.5", 10, 40, (), 10.0)
    task.update("bat, keep 0.5", 20, 40, (), 20.0)
    task.update("topk, keep 0.5", 30, 40, (), 30.0)  # another row of the same sweep
    assert (task.name, task.seconds_left(30.0)) == ("topk, keep 0.5", 10)
    task.update("timing all models in turn", 1, 20, (), 34.0)  # began at 30 s
    assert task.seconds_left(34.0) == pytest.approx(4 * 19)


def test_a_share_is_told_of_what_cannot_be_counted() -> None:
    task = Task("searching", 0.0)
    task.update("trying schedules", 10.0, 40.0, ("best 0.021 GMACs",), 30.0)
    assert task.line(80, 30.0).words == "25 %  90 s left  best 0.021 GMACs"
    assert task.text(30.0) == "trying schedules: 25 %, 90 s left, best 0.021 GMACs"
    task.update("trying schedules", 40.0, 40.0, (), 40.0)
    assert task.text(40.0) == "trying schedules: 100 %"
    assert half_way().text(100.0) == f"evaluating deit_small: 25,000 of 50,000, 2 min left, {', '.join(WORDS)}"


def test_lines_come_ever_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PAUSES", (10.0, 20.0, 40.0, 60.0))
    pauses = Pauses(0.0)
    assert [second for second in range(200) if pauses.over(float(second))] == [10, 30, 70, 130, 190]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (3.4, 99, 720, 12600)] == ["3 s", "99 s", "12 min", "3.5 h"]


def test_values_in_words() -> None:
    values = {"images_per_second": 511.7, "top1": 78.123, "rows_left": 1, "unheard_of": 3.0}
    assert standing(values) == ("78.12 % top-1", "1 row left", "512 images/s")
    best = {"gmacs": 2.6123, "divergence": 0.01234, "agreement": 91.234}
    assert standing(best) == ("best 2.612 GMACs", "damage 0.01234", "91.2 % agree with dense")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("term", "draws"), [("xterm-256color", True), ("dumb", False), ("DUMB", False)])
def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch, term: str, draws: bool) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "PAUSES", (0.0,))
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "80")
    render.loading("torch")
    with render.progress("timing") as advance:
        advance("timing \x1b[2J", 1, 3, ("fast",))
    assert ("\r" in terminal.getvalue()) == draws
    if not draws:
        first, second = terminal.getvalue().splitlines()
        assert first == "note: loading torch"
        assert second.startswith("timing") and "\x1b" not in second and second.endswith(", fast")


def read_until(terminal: int, wanted: str) -> str:
    """What is drawn until that is there: a quarter of a second may pass."""
    text = ""
    while wanted not in text:
        text += os.read(terminal, 1 << 16).decode()
    return text


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_on_a_terminal_everything_stands_on_one_line(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    import pty

    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", str(columns))
        with render.live() as draw, render.progress("fine-tuning") as advance:
            draw(lambda width: render.table(("columns",), [(str(width),)]))
            advance(LONG, 1, 3, WORDS, 300.0)
            text = read_until(ours, "1/3")
            render.note("a note above")
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 1 << 16):
            text += part.decode()
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    [shown] = {line.rstrip() for line in re.split("[\r\n]+", plain) if "1/3" in line}
    assert len(shown) < columns
    assert "1/3  5 min left" in shown
    assert "a note above\r\n" in plain
    assert plain.split()[-1] == str(columns)  # the table stays, made for so many columns; the line below it does not


def test_what_is_loaded_is_said_before(tmp_path: Path) -> None:
    """With a torch that ends the process: nothing else is quick enough to be sure of."""
    (tmp_path / "torch.py").write_text("import os\nos._exit(7)\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-m", "tokencut", "profile", "digits"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path}, timeout=60)  # fmt: skip
    assert (done.returncode, done.stderr) == (7, "note: loading torch and timm\n")
