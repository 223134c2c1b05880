"""What is in the cache, and that clearing it takes what was unpacked and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock
from image_files import tar_of, write_folder

from tokencut.data.archives import unpack
from tokencut.data.cache import cached_archives, clear_cache, list_of
from tokencut.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENCUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unpacked(folder: Path, tmp_path: Path) -> Path:
    """Four images, unpacked."""
    return unpack(tar_of(write_folder(tmp_path / "set", ["ant", "bee"], images=2), tmp_path / "set.tar.gz", "w:gz"))


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix != ".lock")


def test_a_cache_that_is_not_there_is_empty(folder: Path) -> None:
    assert (cached_archives(), clear_cache()) == ([], ([], []))
    assert not folder.exists()


def test_it_tells_paths_sizes_and_ages(unpacked: Path) -> None:
    files = [path for path in unpacked.rglob("*") if path.is_file()]
    os.utime(list_of(unpacked), (time.time() - 7200,) * 2)
    (found,) = cached_archives()
    assert (found.path, found.files, found.bytes) == (unpacked, 4, sum(path.stat().st_size for path in files))
    assert found.age_seconds == pytest.approx(7200, abs=60)
    assert found.kept == ""


def test_clearing_takes_what_was_unpacked_and_what_a_killed_unpacking_left(folder: Path, unpacked: Path) -> None:
    partial = folder / f".{unpacked.name}-abcd_123"
    (partial / "ant").mkdir(parents=True)
    (partial / "ant/1.jpg").write_text("half")
    (unpacked / "ant/1.jpg").unlink()  # as cleaners of temporary folders do
    orphan = list_of(folder / "gone-0123456789abcdef")
    orphan.write_text("")
    removed, kept = clear_cache()
    assert ([found.path for found in removed], kept) == ([unpacked], [])
    assert left(folder) == []


def test_what_is_not_ours_stays(folder: Path, unpacked: Path, tmp_path: Path) -> None:
    (folder / "precious").mkdir()
    (folder / "precious/mine.txt").write_text("mine")
    (folder / "mine-0123456789abcdef").mkdir()  # named as ours are, but nothing says that it was unpacked
    (folder / "mine-0123456789abcdef/mine.txt").write_text("mine")
    (folder / "notes.list").write_text("mine")
    (folder / ".hidden").write_text("mine")
    link = folder / "link-0123456789abcdef"
    link.symlink_to(tmp_path / "set")
    list_of(link).write_text("")
    before = left(folder)
    removed, kept = clear_cache()
    assert ([found.path for found in removed], kept) == ([unpacked], [])
    assert left(folder) == sorted(set(before) - {unpacked.name, list_of(unpacked).name})
    assert (folder / "precious/mine.txt").read_text() == "mine"
    assert len(list((tmp_path / "set").rglob("*.jpg"))) == 4


@pytest.mark.parametrize("change", ["added", "changed"])
def test_an_archive_with_files_of_the_users_stays_whole(unpacked: Path, change: str) -> None:
    mine = unpacked / ("ant/mine.txt" if change == "added" else "ant/1.jpg")
    mine.write_text("mine")
    removed, (kept,) = clear_cache()
    assert (removed, kept.path) == ([], unpacked)
    name = mine.relative_to(unpacked)
    assert kept.kept == f"it holds '{name}', which did not come out of the archive so"
    assert len([path for path in unpacked.rglob("*") if path.is_file()]) == (5 if change == "added" else 4)
    assert list_of(unpacked).exists()


def test_what_another_process_unpacks_stays(folder: Path, unpacked: Path) -> None:
    partial = folder / f".{unpacked.name}-abcd_123"
    partial.mkdir()
    with FileLock(folder / f".{unpacked.name}.lock"):
        removed, (kept,) = clear_cache()
    assert (removed, kept.kept) == ([], "it is being unpacked")
    assert unpacked.exists() and partial.exists()
    assert len(clear_cache()[0]) == 1


def test_a_cache_that_may_not_be_read_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    folder.mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError) as caught:
        cached_archives()
    assert str(caught.value) == (
        f"cannot read or clear the cache {folder}: Permission denied; set TOKENCUT_CACHE to a folder of your own"
    )
