"""Reading tar archives in place, and unpacking compressed ones into a cache."""

from __future__ import annotations

import errno
import gzip
import io
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath
from typing import IO, Literal

import pytest
from image_files import tar_of, write_tar
from observing import Seen

from tokencut.data import archives, listing
from tokencut.data.cache import CACHE_VARIABLE, cache_folder, list_of
from tokencut.data.sources import open_source
from tokencut.errors import DataError
from tokencut.files import remove_folder
from tokencut.observers import Observer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TOKENCUT_CACHE", str(folder))
    return folder


def left_in(cache: Path) -> list[Path]:
    """What a cache holds beside its empty locks, and the lists of what was unpacked."""
    lists = [list_of(path) for path in cache.iterdir() if path.is_dir()]
    assert all(path.is_file() for path in lists)
    return [path for path in cache.iterdir() if (path.suffix != ".lock" or path.stat().st_size) and path not in lists]


def write_link(path: Path, mode: Literal["w", "w:gz"], kind: bytes = tarfile.SYMTYPE) -> Path:
    """An archive with a file and a link to it."""
    with tarfile.open(path, mode=mode) as archive:
        member = tarfile.TarInfo("cat/1.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("cat/2.jpg")
        link.type, link.linkname = kind, "cat/1.jpg"
        archive.addfile(link)
    return path


def test_scan_says_where_the_bytes_are(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"./cat/1.jpg": b"first", "/dog/2.jpg": b"second!"})
    listing = archives.scan(path)
    content = path.read_bytes()
    read = {name: content[start : start + size] for name, (start, size) in listing.files.items()}
    assert read == {"cat/1.jpg": b"first", "dog/2.jpg": b"second!"}


def test_of_a_path_that_occurs_twice_the_later_entry_counts(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"cat/1.jpg": b"old", "./cat/1.jpg": b"newer"})
    (start, size) = archives.scan(path).files["cat/1.jpg"]
    assert path.read_bytes()[start : start + size] == b"newer"


def test_scan_lists_folders_and_sets_links_apart(tmp_path: Path) -> None:
    path = write_link(tmp_path / "a.tar", "w")
    with tarfile.open(path, "a") as archive:
        for name in (".", "./dog"):
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
    listing = archives.scan(path)
    assert listing.folders == {"dog"}
    assert listing.others == ["cat/2.jpg"]
    assert set(listing.files) == {"cat/1.jpg"}


def test_an_archive_cut_between_two_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a/1.png", "b/2.png"):
            member = tarfile.TarInfo(name)
            member.size = 700
            archive.addfile(member, io.BytesIO(bytes(range(250)) * 3))
    whole = path.read_bytes()
    assert set(archives.scan(path).files) == {"a/1.png", "b/2.png"}
    packed = tmp_path / "set.tar.gz"
    for length in (3 * 512, 3 * 512 + 100, 6 * 512):  # behind a member, inside a header, before the end
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="is not a whole tar archive"):
            archives.scan(path)
        packed.write_bytes(gzip.compress(whole[:length]))  # a whole gzip of it
        with pytest.raises(DataError, match="is not a whole tar archive"):
            archives.unpack(packed)


def test_scan_of_a_truncated_archive_says_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"cat/1.jpg": bytes(5000), "cat/2.jpg": bytes(5000)})
    path.write_bytes(path.read_bytes()[:8000])
    with pytest.raises(
        DataError, match=r"a\.tar is not a whole tar archive \(unexpected end of data\); download or pack"
    ):
        archives.scan(path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_path_that_leads_out_is_refused(tmp_path: Path, cache: Path, mode: Literal["w", "w:gz"]) -> None:
    path = write_tar(tmp_path / "evil.tar", {"cat/1.jpg": b"", "cat/../../../evil.jpg": b"x"}, mode)
    read = archives.scan if mode == "w" else archives.unpack
    with pytest.raises(
        DataError, match="holds 'cat/../../../evil.jpg', a path that leads out of it; pack the images again"
    ):
        read(path)
    assert not list(tmp_path.rglob("evil.jpg"))
    assert mode == "w" or not left_in(cache)


@pytest.mark.parametrize("name", ["C:/evil.jpg", "C:evil.jpg", "cat\\..\\..\\evil.jpg"])
def test_on_windows_drives_and_backslashes_lead_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write_tar(tmp_path / "set.tar", {name: b"x"})
    assert set(archives.scan(path).files) == {name}
    monkeypatch.setattr(listing, "PurePath", PureWindowsPath)
    with pytest.raises(DataError, match="a path that leads out of it; pack the images again"):
        archives.scan(path)


def test_a_python_whose_tarfile_has_no_filters_unpacks_as_well(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python 3.10.0 to 3.10.11 and 3.11.0 to 3.11.3."""
    path = write_tar(tmp_path / "set.tar.gz", {"cat/1.jpg": b"meow"}, "w:gz")
    extract = tarfile.TarFile.extract
    monkeypatch.setattr(
        tarfile.TarFile, "extract", lambda self, member, path, set_attrs: extract(self, member, path, set_attrs)
    )
    for owner, name in ((tarfile, "data_filter"), (tarfile.TarInfo, "replace")):
        monkeypatch.delattr(owner, name, raising=False)
    assert (archives.unpack(path) / "cat/1.jpg").read_bytes() == b"meow"


@pytest.mark.parametrize("harm", ["lost", "emptied", "list lost", "list damaged"])
def test_what_lost_files_is_unpacked_anew(tmp_path: Path, cache: Path, harm: str) -> None:
    """As cleaners of temporary folders do."""
    files = {"cat/1.jpg": b"meow", "cat/2.jpg": b"purr", "dög/1.jpg": b"woof"}
    path, seen = write_tar(tmp_path / "set.tar.gz", files, "w:gz"), Seen()
    folder = archives.unpack(path)
    lists = [entry for entry in cache.iterdir() if entry.suffix == ".list"]
    if harm == "lost":
        (folder / "cat/2.jpg").unlink()
    elif harm == "emptied":
        (folder / "dög/1.jpg").write_bytes(b"")
    elif harm == "list lost":
        lists[0].unlink()
    else:
        lists[0].write_text("what")
    assert archives.unpack(path, seen) == folder
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert seen.notes == [f"{folder}, where {path} was unpacked, is no longer as it was",
                     f"unpacking {path} into {folder}, this once"]  # fmt: skip
    assert archives.unpack(path, seen) == folder
    assert len(seen.notes) == 2


@pytest.mark.parametrize("listed", [True, False])
def test_what_was_never_unpacked_is_not_removed(tmp_path: Path, cache: Path, listed: bool) -> None:
    path = write_tar(tmp_path / "set.tar.gz", {"cat/1.jpg": b"meow"}, "w:gz")
    folder = archives.unpack(path)
    (folder / "cat" / "mine.jpg").write_bytes(b"mine")
    if not listed:
        next(entry for entry in cache.iterdir() if entry.suffix == ".list").unlink()
    with pytest.raises(DataError, match="holds 'cat/mine.jpg', which it did not come with; move that away$"):
        archives.unpack(path)
    assert (folder / "cat" / "mine.jpg").read_bytes() == b"mine"


def test_modes_in_the_archive_do_not_count(tmp_path: Path, cache: Path) -> None:
    """A folder that the archive closes to everybody can be filled, and read, all the same."""
    path = tmp_path / "set.tar.gz"
    with tarfile.open(path, mode="w:gz") as archive:
        folder, file = tarfile.TarInfo("cat"), tarfile.TarInfo("cat/1.jpg")
        folder.type, folder.mode, file.mode, file.size = tarfile.DIRTYPE, 0, 0, 3
        archive.addfile(folder)
        archive.addfile(file, io.BytesIO(b"abc"))
    unpacked = archives.unpack(path)
    assert (unpacked / "cat").stat().st_mode & 0o700 == 0o700
    assert (unpacked / "cat/1.jpg").stat().st_mode & 0o600 == 0o600


def test_kinds_are_known_by_content(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "plain", {"a": b"a"})
    packed = write_tar(tmp_path / "packed", {"a": b"a"}, "w:gz")
    text = tmp_path / "text.tar"
    text.write_text("no archive")
    assert [archives.is_tar(path) for path in (plain, packed, text)] == [True, False, False]
    assert [archives.is_gzip(path) for path in (plain, packed, text)] == [False, True, False]


def test_unpacks_once(tmp_path: Path, cache: Path) -> None:
    path = write_tar(tmp_path / "set.tar.gz", {"cat/1.jpg": b"meow", "/dog/notes.txt": b"woof"}, "w:gz")
    seen = Seen()
    folder = archives.unpack(path, seen)
    assert seen.notes == [f"unpacking {path} into {folder}, this once"]
    assert {(now.task, now.total) for now in seen.told} == {("unpacking set.tar.gz", path.stat().st_size)}
    assert 0 < seen.told[-1].done <= path.stat().st_size
    assert folder.parent == cache
    assert folder.name.startswith("set-")
    assert {file.relative_to(folder).as_posix() for file in folder.rglob("*.*")} == {"cat/1.jpg", "dog/notes.txt"}
    assert archives.unpack(path, seen) == folder
    assert len(seen.notes) == 1
    assert left_in(cache) == [folder]


def test_a_changed_archive_is_unpacked_anew(tmp_path: Path, cache: Path) -> None:
    path = write_tar(tmp_path / "set.tar.gz", {"cat/1.jpg": b"old"}, "w:gz")
    before = archives.unpack(path)
    write_tar(path, {"cat/1.jpg": b"changed"}, "w:gz")
    after = archives.unpack(path)
    assert before != after
    assert (after / "cat/1.jpg").read_bytes() == b"changed"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_hard_link_is_the_file_it_names(tmp_path: Path, cache: Path, mode: Literal["w", "w:gz"]) -> None:
    """As tar packs a file that it has met before; `link` names it from the root of the archive."""
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "dog").mkdir()
    (tmp_path / "set" / "cat" / "1.jpg").write_bytes(b"meow")
    (tmp_path / "set" / "dog" / "2.jpg").hardlink_to(tmp_path / "set" / "cat" / "1.jpg")
    path = tar_of(tmp_path / "set", tmp_path / "set.tar", mode)
    with tarfile.open(path) as archive:
        assert sum(member.islnk() for member in archive) == 1
    source = open_source(path)
    found = {}
    for number in range(len(source)):
        with source.open(number) as file:
            found[source.filename(number)] = file.read()
    assert found == {"cat/1.jpg": b"meow", "dog/2.jpg": b"meow"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_hard_link_to_nothing_before_it(tmp_path: Path, cache: Path, mode: Literal["w", "w:gz"]) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, mode=mode) as archive:
        link = tarfile.TarInfo("cat/2.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "cat/1.jpg"
        archive.addfile(link)
    if mode == "w":
        assert archives.scan(path).others == ["cat/2.jpg"]
    else:
        with pytest.raises(DataError, match="holds 'cat/2.jpg', which is a link"):
            archives.unpack(path)
    with tarfile.open(path, mode=mode) as archive:
        link.linkname = "../../etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"holds '\.\./\.\./etc/passwd', a path that leads out of it"):
        (archives.scan if mode == "w" else archives.unpack)(path)


def test_archives_joined_by_cat_are_refused(tmp_path: Path, cache: Path) -> None:
    first, second = (write_tar(tmp_path / f"{name}.tar", {f"{name}/1.jpg": b"x"}) for name in ("cat", "dog"))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    packed = tmp_path / "joined.tar.gz"
    packed.write_bytes(gzip.compress(joined.read_bytes()))
    for path, read in ((joined, archives.scan), (packed, archives.unpack)):
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path} goes on behind the mark of its end, as archives that were joined by cat do; unpack it with tar "
            "-i, which goes past the mark, and give the folder"
        )
    first.write_bytes(first.read_bytes() + bytes(100_000))  # padding
    assert set(archives.scan(first).files) == {"cat/1.jpg"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_only_files_and_folders_are_unpacked(tmp_path: Path, cache: Path, kind: bytes) -> None:
    path = write_link(tmp_path / "set.tar.gz", "w:gz", kind)
    with pytest.raises(
        DataError, match="holds 'cat/2.jpg', which is a link or a device: only plain files and folders are"
    ):
        archives.unpack(path)
    assert not left_in(cache)


@pytest.mark.parametrize("damage", ["truncated", "changed", "not a tar"])
def test_a_damaged_archive_leaves_nothing(tmp_path: Path, cache: Path, damage: str) -> None:
    path = write_tar(tmp_path / "set.tar.gz", {"cat/1.jpg": os.urandom(20000)}, "w:gz")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-100:]
    elif damage == "changed":
        content[-5] ^= 1  # in the checksum at the end, which only a reader of the whole stream sees
    else:
        content[100:2000] = bytes(1900)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"set.tar.gz is not a whole tar archive \(.+\); download or pack it again"):
        archives.unpack(path)
    assert not left_in(cache)


def test_an_interrupted_unpacking_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "set.tar.gz", {"cat/1.jpg": b"1", "cat/2.jpg": b"2"}, "w:gz")
    written: list[bool] = []

    def interrupted(content: IO[bytes], file: IO[bytes]) -> None:
        file.write(content.read())
        written.append(True)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(archives.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        archives.unpack(path)
    assert len(written) == 2
    assert not left_in(cache)


def test_a_full_disk_is_told_with_a_way_out(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "set.tar.gz", {"cat/1.jpg": b"1"}, "w:gz")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archives.shutil, "copyfileobj", full)
    with pytest.raises(DataError) as caught:
        archives.unpack(path)
    assert str(caught.value) == (
        f"cannot unpack {path} into {cache}: No space left on device; set TOKENCUT_CACHE to a folder with room "
        "for it, or unpack it yourself and give the folder"
    )
    assert not left_in(cache)


def test_of_several_at_once_one_unpacks(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "set.tar.gz", {f"cat/{number}.jpg": b"1" for number in range(50)}, "w:gz")
    extract, calls = archives._extract, []

    def counted(archive: Path, folder: Path, told: Observer) -> None:
        calls.append(folder)
        time.sleep(0.2)
        extract(archive, folder, told)

    monkeypatch.setattr(archives, "_extract", counted)
    seen = Seen()
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: archives.unpack(path, seen), range(3)))
    assert len(calls) == 1
    assert sorted(note.split(" ")[0] for note in seen.notes) == ["another", "another", "unpacking"]
    assert set(folders) == set(left_in(cache))


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENCUT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tokencut"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "tokencut"


@pytest.mark.slow
def test_files_in_a_thousand_folders_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENCUT_CACHE", str(tmp_path / "cache"))
    deep = "ant/" + "d/" * 1000 + "1.png"
    path = write_tar(tmp_path / "deep.tar.gz", {deep: b"one", "bee/1.png": b"two"}, "w:gz")
    target = archives.unpack(path)
    assert (target / deep).read_bytes() == b"one"
    assert (target / "bee/1.png").read_bytes() == b"two"
    remove_folder(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
