"""`tokencut cache`: what is shown, what is cleared, and that torch is not needed for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from image_files import tar_of
from outcome import Run

from tokencut.data.archives import unpack
from tokencut.data.cache import list_of


@pytest.fixture
def unpacked(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENCUT_CACHE", str(tmp_path / "cache"))
    return unpack(tar_of(pictures, tmp_path / "set.tar.gz", "w:gz"))


def test_people_see_paths_sizes_and_ages(run: Run, unpacked: Path, tmp_path: Path) -> None:
    os.utime(list_of(unpacked), (time.time() - 3 * 86_400 - 5,) * 2)
    lines = [line for line in run("cache").out.splitlines() if line.strip()]
    assert lines[0].split() == ["unpacked", "archive", "files", "size", "age"]
    assert lines[2].split() == [str(unpacked), "12", "0.0", "MB", "3", "days"]
    assert lines[-1] == "1 archive, 0.0 MB; type tokencut cache --clear to remove them"
    assert run("cache", "--clear").out == f"removed 1 archive, 0.0 MB from {tmp_path / 'cache'}\n"
    assert run("cache").out == f"nothing is unpacked in {tmp_path / 'cache'}\n"


def test_scripts_get_numbers(run: Run, unpacked: Path, tmp_path: Path) -> None:
    shown = run("cache", "--json").json
    size = sum(path.stat().st_size for path in unpacked.rglob("*") if path.is_file())
    assert (shown["folder"], shown["bytes"], shown["removed"]) == (str(tmp_path / "cache"), size, [])
    (archive,) = shown["archives"]
    assert (archive["path"], archive["bytes"], archive["files"], archive["kept"]) == (str(unpacked), size, 12, None)
    assert 0 <= archive["age_seconds"] < 600
    (unpacked / "mine.txt").write_text("mine")
    kept = run("cache", "--clear", "--json").json
    assert kept["removed"] == [] and kept["archives"][0]["kept"].startswith("it holds 'mine.txt'")
    (unpacked / "mine.txt").unlink()
    cleared = run("cache", "--clear", "--json").json
    assert (cleared["archives"], cleared["removed_bytes"]) == ([], size)
    assert not unpacked.exists()


def test_what_is_kept_is_told(run: Run, unpacked: Path) -> None:
    (unpacked / "mine.txt").write_text("mine")
    done = run("cache", "--clear")
    assert done.notes == [f"kept {unpacked}: it holds 'mine.txt', which did not come out of the archive so"]
    assert (unpacked / "mine.txt").exists()


@pytest.mark.slow
def test_it_does_not_wait_for_torch(unpacked: Path) -> None:
    code = (
        "import sys\nfrom tokencut.cli.app import main\nmain(['cache'])\n"
        "print([name for name in ('torch', 'timm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
