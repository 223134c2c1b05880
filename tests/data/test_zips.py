"""Zip archives of images: read as the folder they were made from, and every archive that cannot be."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from image_files import encoded, picture, tar_of, write_folder

from tokencut.data import zips
from tokencut.data.sources import ZipSource, open_source
from tokencut.errors import DataError

IMAGE = encoded(picture(1))


def zip_of(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def packed(folder: Path, path: Path, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    files = {prefix + str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return zip_of(path, files, method)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_an_archive_is_read_as_the_folder_it_was_made_from(method: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", ["ant", "bee"], images=3)
    (folder / "bee/notes.txt").write_text("text")
    found, plain = open_source(packed(folder, tmp_path / "set.zip", method=method)), open_source(folder)
    assert isinstance(found, ZipSource)
    assert (found.classes, found.notes, len(found)) == (plain.classes, plain.notes, 6)
    for index in range(6):
        assert found.filename(index) == plain.filename(index)
        with plain.open(index) as file:
            assert found.open(index).read() == file.read()
        assert found[index][1] == index // 3


def test_an_archive_is_known_by_its_content(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", ["ant", "bee"], images=1)
    assert len(open_source(packed(folder, tmp_path / "no-suffix"))) == 2
    # A tar whose last member is a zip ends as a zip does.
    (folder / "ant/z.zip").write_bytes((tmp_path / "no-suffix").read_bytes())
    assert not isinstance(open_source(tar_of(folder, tmp_path / "set.zip")), ZipSource)


def test_what_systems_leave_behind_is_passed_over_and_one_folder_is_stepped_into(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", ["ant", "bee"], images=2)
    with zipfile.ZipFile(packed(folder, tmp_path / "mac.zip", prefix="photos/"), "a") as archive:
        archive.writestr("__MACOSX/photos/ant/._1.jpg", b"resource fork")
        archive.writestr("photos/.DS_Store", b"")
        archive.writestr("photos/empty/", b"")
    found = open_source(tmp_path / "mac.zip")
    assert (found.classes, found.wrapper, len(found)) == (("ant", "bee"), ("photos",), 4)
    assert found.notes == (
        "files passed over for their extension: 1 ('photos/.DS_Store')",
        "folders that systems leave behind passed over: 1 ('__MACOSX')",
        "folders without images passed over: 1 ('photos/empty')",
    )


def test_backslashes_of_windows_part_folders(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("placeholder")
    info.filename, info.create_system = "ant\\1.jpg", 0
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr(info, IMAGE)
        archive.writestr("bee/1.jpg", IMAGE)
    assert open_source(tmp_path / "w.zip").classes == ("ant", "bee")


def test_links_are_told_and_of_equal_names_the_later_counts(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("ant/link.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as archive:
        archive.writestr(link, "1.jpg")
        archive.writestr("bee/1.jpg", IMAGE)
        archive.writestr("ant/1.jpg", b"old")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("ant/1.jpg", IMAGE)
    found = open_source(tmp_path / "l.zip")
    assert found.notes == ("links or special files passed over: 1 ('ant/link.jpg')",)
    assert [found.open(index).read() for index in range(len(found))] == [IMAGE, IMAGE]


def test_archives_that_were_joined_are_refused_for_only_the_last_would_be_read(tmp_path: Path) -> None:
    one, other = zip_of(tmp_path / "1.zip", {"ant/1.jpg": IMAGE}), zip_of(tmp_path / "2.zip", {"bee/1.jpg": IMAGE})
    joined = tmp_path / "joined.zip"
    joined.write_bytes(one.read_bytes() + other.read_bytes())
    with pytest.raises(DataError) as caught:
        open_source(joined)
    assert str(caught.value) == (
        f"{joined} has something in front of its files, as archives that were joined by cat have, of which only the "
        "last would be read; unpack each of them yourself and give the folder"
    )


@pytest.mark.parametrize("name", ["../out.jpg", "ant/../../out.jpg"])
def test_a_path_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    path = zip_of(tmp_path / "slip.zip", {"ant/1.jpg": IMAGE, name: IMAGE})
    with pytest.raises(DataError) as caught:
        open_source(path)
    assert (
        str(caught.value) == f"{path} holds {name!r}, a path that leads out of it; pack the images again without '..'"
    )


def patched(path: Path, at: bytes, offset: int, value: bytes) -> Path:
    """The archive with bytes behind each header changed: `at` is the header's mark."""
    content = bytearray(path.read_bytes())
    start = content.find(at)
    while start >= 0:
        content[start + offset : start + offset + len(value)] = value
        start = content.find(at, start + 1)
    path.write_bytes(content)
    return path


# Where the fields of an entry of the central directory are.
DIRECTORY, FLAGS, METHOD, SIZE = b"PK\x01\x02", 8, 10, 24


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    path = patched(zip_of(tmp_path / "e.zip", {"ant/1.jpg": IMAGE}), DIRECTORY, FLAGS, b"\x01\x00")
    with pytest.raises(DataError) as caught:
        open_source(path)
    assert str(caught.value) == f"{path} is encrypted ('ant/1.jpg'); unpack it with its password and give the folder"


def test_another_packing_is_refused_with_its_number(tmp_path: Path) -> None:
    path = patched(zip_of(tmp_path / "d.zip", {"ant/1.jpg": IMAGE}), DIRECTORY, METHOD, b"\x09\x00")
    with pytest.raises(DataError) as caught:
        open_source(path)
    assert str(caught.value) == (
        f"{path} is packed in a way that is not read here ('ant/1.jpg (method 9)'); unpack it yourself and give the "
        "folder"
    )


def test_a_bomb_is_refused_by_its_size(tmp_path: Path) -> None:
    path = patched(
        zip_of(tmp_path / "b.zip", {"ant/1.jpg": IMAGE}), DIRECTORY, SIZE, (4_000_000_000).to_bytes(4, "little")
    )
    with pytest.raises(
        DataError, match=r"holds files larger than any image: 'ant/1.jpg \(4.0 GB, packed into 0.0 MB\)'"
    ):
        open_source(path)


def test_a_bomb_that_lies_about_its_size_becomes_no_larger_than_it_says(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "lie.zip", {"ant/1.bmp": bytes(50_000_000)})
    patched(path, DIRECTORY, SIZE, (1000).to_bytes(4, "little"))
    found = open_source(path)
    with pytest.raises(
        OSError, match="damaged in the archive: its checksum or length is another than the archive says"
    ):
        found.open(0)


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "cut.zip", {"ant/1.jpg": IMAGE, "bee/1.jpg": IMAGE})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        DataError, match=r"cut.zip is not a whole zip archive \(File is not a zip file\); download or pack"
    ):
        open_source(path)


@pytest.mark.parametrize("where", [5, 60])
def test_a_damaged_member_is_an_image_that_cannot_be_read(where: int, tmp_path: Path) -> None:
    path = zip_of(tmp_path / "hurt.zip", {"ant/1.jpg": IMAGE, "bee/1.jpg": IMAGE})
    content = bytearray(path.read_bytes())
    if where == 5:
        content[0:2] = b"XX"
    else:
        content[where] ^= 0xFF
    source = open_source(path) if where != 5 else ZipSource("hurt", _written(path, bytes(content)))
    _written(path, bytes(content))
    with pytest.raises(OSError, match="damaged in the archive"):
        source.open(0)
    assert source.open(1).read() == IMAGE


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_an_archive_of_something_else_says_that_it_holds_no_images(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "model.pth", {"archive/data.pkl": b"", "archive/version": b"3"})
    with pytest.raises(DataError, match=r"holds no images \(other files: 2\)"):
        open_source(path)
    with pytest.raises(DataError, match=r"holds no images \(other files: 0\)"):
        open_source(zip_of(tmp_path / "empty.zip", {}))


def test_the_lengths_in_a_member_are_its_own(tmp_path: Path) -> None:
    """A member's own header may have another extra field than the directory's entry of it."""
    path = zip_of(tmp_path / "x.zip", {"ant/1.jpg": IMAGE}, zipfile.ZIP_STORED)
    content = path.read_bytes()
    extra = b"\x99\x99\x04\x00abcd"
    moved = content[:28] + len(extra).to_bytes(2, "little") + content[30:39] + extra + content[39:]
    (tmp_path / "m.bin").write_bytes(moved)
    member = zips.scan_zip(path)[1]["ant/1.jpg"]
    with (tmp_path / "m.bin").open("rb") as file:
        assert zips.read_member(file, member) == IMAGE
