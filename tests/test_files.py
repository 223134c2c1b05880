"""The atomic write: the old content or the new, never a part, and nothing left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tokencut.errors import ArtifactError
from tokencut.files import atomic_files, atomic_write, check_writable, check_writable_folder, open_plain, remove_folder


def fail_halfway(target: Path, failure: BaseException) -> None:
    with atomic_write(target) as temporary:
        temporary.write_text("half")
        raise failure


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    with pytest.raises(ArtifactError, match=r"pipe.csv: it is no file; give another name$"), atomic_write(pipe):
        pass
    assert pipe.is_fifo()


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    target.chmod(0o600)
    with atomic_write(target) as temporary:
        temporary.write_text("new")
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_link_stays_and_leads_to_the_new_content(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    with atomic_write(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert names(real.parent) == ["real.txt"]


def test_a_folder_without_permission_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # as root may write anywhere
    with pytest.raises(ArtifactError, match=f"no permission in {tmp_path}; give another folder"):
        check_writable(tmp_path / "out.txt", force=False)


def test_writes_the_whole_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    with atomic_write(target) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(tmp_path) == ["out.txt"]


def test_new_content_is_on_disk_before_it_takes_the_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    flushed: list[tuple[int, str, str]] = []

    def fsync(handle: int) -> None:
        flushed.append((os.fstat(handle).st_ino, os.pread(handle, 100, 0).decode(), target.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(target) as temporary:
        temporary.write_text("new")
    assert flushed == [(target.stat().st_ino, "new", "old")]


def test_who_reads_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    with target.open() as reader:
        with atomic_write(target) as temporary:
            temporary.write_text("new")
            written = temporary.stat().st_ino
        assert reader.read() == "old"
    assert target.stat().st_ino == written  # renamed, never copied


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "out.txt") as temporary:
        temporary.write_text("new")
    (tmp_path / "plain.txt").write_text("new")
    assert (tmp_path / "out.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_passes_through_and_leaves_the_old_content(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(type(failure)):
        fail_halfway(target, failure)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["out.txt"]


def test_disk_full_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    with pytest.raises(ArtifactError) as caught:
        fail_halfway(target, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert str(caught.value) == f"cannot write {target}: No space left on device; nothing was written"
    assert names(tmp_path) == []


def test_a_folder_that_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    target = tmp_path / "out.txt"
    with pytest.raises(ArtifactError) as caught, atomic_write(target):
        pytest.fail("the block must not run")
    assert str(caught.value) == f"cannot write {target}: Permission denied"


def test_a_name_that_can_be_written_leaves_room_for_the_temporary_one(tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 127):
        with atomic_write(tmp_path / name) as temporary:
            temporary.write_text("new")
        assert (tmp_path / name).read_text() == "new"


def test_what_could_never_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    one, two, file = tmp_path / "one", tmp_path / "two", tmp_path / "file"
    one.symlink_to(two)
    two.symlink_to(one)
    file.write_text("mine")
    lost = tmp_path / "lost"
    lost.symlink_to(tmp_path / "gone" / "out.txt")
    cases = {
        one: f"cannot write {one}: Too many levels of symbolic links; give another name",
        one / "out.txt": f"cannot write {one / 'out.txt'}: Too many levels of symbolic links; give another name",
        tmp_path / ("n" * 256): f"cannot write {tmp_path / ('n' * 256)}: File name too long; give another name",
        file / "out.txt": f"cannot write {file / 'out.txt'}: the folder {file} does not exist; create it first",
        lost: f"cannot write {lost}: the folder {tmp_path / 'gone'} does not exist; create it first",
    }
    for path, message in cases.items():
        for check in (lambda path: check_writable(path, force=True), check_writable_folder):
            with pytest.raises(ArtifactError) as caught:
                check(path)
            assert str(caught.value) == message
        with pytest.raises(ArtifactError), atomic_write(path):
            pytest.fail("the block must not run")


def test_folders(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (tmp_path, tmp_path / "new"):
        assert check_writable_folder(path) == path
    assert check_writable_folder(tmp_path / "new" / "newer", parents=True) == tmp_path / "new" / "newer"
    for path, parents, what in ((file, False, "it"), (file, True, "it"), (file / "new" / "newer", True, file)):
        with pytest.raises(ArtifactError) as caught:
            check_writable_folder(path, parents=parents)
        told = f"cannot make the folder {path}: {what} is a file; move that, or give another name"
        assert str(caught.value) == told
    assert not (tmp_path / "new").exists()


def test_refusals(tmp_path: Path) -> None:
    old = tmp_path / "old.txt"
    old.write_text("old")
    cases = {
        tmp_path / "no" / "out.txt": f"the folder {tmp_path / 'no'} does not exist; create it first",
        tmp_path: f"it is a folder; name a file in it, such as {tmp_path / 'out.safetensors'}",
        old: f"{old} exists; add `force=True` to replace it, or give another `path`",
    }
    for path, message in cases.items():
        with pytest.raises(ArtifactError) as caught:
            check_writable(path, force=False)
        assert message in str(caught.value)
        with pytest.raises(ArtifactError), atomic_write(path, force=False):
            pytest.fail("the block must not run")
    assert check_writable(old, force=True) == old
    assert old.read_text() == "old"


def test_a_folder_is_removed_with_all_in_it_but_not_what_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/mine.txt").write_text("mine")
    (tmp_path / "ours/a/b").mkdir(parents=True)
    (tmp_path / "ours/a/b/1.png").write_text("")
    (tmp_path / "ours/a/link").symlink_to(tmp_path / "precious")
    (tmp_path / "ours/file").symlink_to(tmp_path / "precious/mine.txt")
    remove_folder(tmp_path / "ours")
    remove_folder(tmp_path / "never")
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]
    assert (tmp_path / "precious/mine.txt").read_text() == "mine"


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe, not a file"):
        open_plain(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError, match="it is a folder, not a file"):
        open_plain(tmp_path)
    with pytest.raises(OSError, match="it is a device, not a file"):
        open_plain(Path(os.devnull))


def written(path: Path, *beside: Path) -> None:
    with atomic_files(path, *beside) as temporary:
        for file in (temporary, *(temporary.with_name(each.name) for each in beside)):
            file.write_text("new")
        temporary.with_name("scratch").write_text("of no use")


def test_several_files_take_their_places_together(tmp_path: Path) -> None:
    main, other, third = (tmp_path / name for name in ("m.xml", "m.bin", "m.txt"))
    written(main, other)
    assert names(tmp_path) == ["m.bin", "m.xml"]
    main.write_text("old")
    other.write_text("old")
    other.chmod(0o600)
    with pytest.raises(ArtifactError, match="m.bin exists; add `force=True`"), atomic_files(third, other, force=False):
        pytest.fail("began")
    written(main, other)
    assert (main.read_text(), other.read_text(), other.stat().st_mode & 0o777) == ("new", "new", 0o600)


def test_where_one_of_several_files_cannot_be_placed_none_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, other, third = (tmp_path / name for name in ("m.xml", "m.bin", "m.txt"))
    main.write_text("old")
    other.write_text("old")
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name == "m.xml":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(ArtifactError, match="m.xml: Input/output error; nothing was written$"):
        written(main, other, third)
    assert names(tmp_path) == ["m.bin", "m.xml"]
    assert (main.read_text(), other.read_text()) == ("old", "old")
