"""Class folders and images among what a folder or an archive holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokencut.data.listing import Layout, Listing, find_classes, path_order, scan_folder
from tokencut.errors import DataError


def layout(*files: str, folders: tuple[str, ...] = (), others: tuple[str, ...] = ()) -> Layout:
    """The layout of the given paths."""
    return find_classes("set", Listing(dict.fromkeys(files, (0, 0)), set(folders), list(others)))


def test_classes_and_images_stand_in_natural_order() -> None:
    found = layout("b/10.jpg", "b/9.JPEG", "A/1.png", "a10/1.webp", "a9/1.tif")
    assert found.classes == ("A", "a9", "a10", "b")
    # By their paths, as timm sorts them: `a` goes before `a/`.
    assert found.images == (("a9/1.tif", 1), ("a10/1.webp", 2), ("A/1.png", 0), ("b/9.JPEG", 3), ("b/10.jpg", 3))
    assert found.notes == ()


def test_names_that_differ_only_in_case_have_an_order_of_their_own() -> None:
    assert layout("b/x.jpg", "b/X.jpg") == layout("b/X.jpg", "b/x.jpg")


@pytest.mark.parametrize("extension", [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".TIFF"])
def test_formats(extension: str) -> None:
    assert len(layout(f"a/1{extension}").images) == 1


def test_other_files_are_counted_and_a_few_named() -> None:
    found = layout("a/1.jpg", "a/b.gif", "notes.txt", "a/c.jpg.part", "a/Thumbs.db")
    assert found.notes == (
        "files passed over for their extension: 4 ('a/b.gif', 'a/c.jpg.part', 'a/Thumbs.db' and 1 more)",
    )


def test_hidden_files_and_folders_are_no_images_and_no_classes() -> None:
    found = layout("a/1.jpg", "a/._1.jpg", ".git/x.jpg", ".ipynb_checkpoints/a/2.jpg", folders=(".cache", "a/.hidden"))
    assert found.classes == ("a",)
    assert found.notes == ("hidden images passed over: 1 ('a/._1.jpg')",)


def test_links_in_archives_are_told() -> None:
    assert layout("a/1.jpg", others=("a/2.jpg",)).notes == ("links or special files passed over: 1 ('a/2.jpg')",)


def test_a_folder_without_images_is_no_class() -> None:
    found = layout("b/1.jpg", "c/notes.txt", "c/old/notes.txt", "d/1.jpg", folders=("a", "b", "b/none"))
    assert found.classes == ("b", "d")
    assert found.images == (("b/1.jpg", 0), ("d/1.jpg", 1))
    assert found.notes == ("files passed over for their extension: 2 ('c/notes.txt', 'c/old/notes.txt')",
                           "folders without images passed over: 2 ('a', 'c')")  # fmt: skip


@pytest.mark.parametrize("name", ["__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information"])
def test_what_systems_leave_behind_is_no_class_and_no_image(name: str) -> None:
    found = layout("cat/1.jpg", f"{name}/cat/1.jpg", f"dog/{name}/1.jpg", "dog/1.jpg", f"dog/x/{name}/y/2.jpg",
                   folders=(name,))  # fmt: skip
    assert found.classes == ("cat", "dog")
    assert found.images == (("cat/1.jpg", 0), ("dog/1.jpg", 1))
    assert [note.partition(" (")[0] for note in found.notes] == ["folders that systems leave behind passed over: 3"]


def test_an_archive_made_on_a_mac_is_stepped_into() -> None:
    found = layout("lfw/ann/1.jpg", "lfw/bob/1.jpg", "__MACOSX/lfw/ann/._1.jpg", "__MACOSX/._lfw", "notes/x.txt")
    assert (found.classes, found.wrapper) == (("ann", "bob"), ("lfw",))
    assert found.notes == (
        "files passed over for their extension: 1 ('notes/x.txt')",
        "folders that systems leave behind passed over: 1 ('__MACOSX')",
        "folders without images passed over: 1 ('notes')",
    )


def test_what_a_system_left_behind_is_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "cat").mkdir()
    scandir = os.scandir

    def guarded(folder: Path) -> Any:
        if Path(folder).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    assert scan_folder(tmp_path).folders == {"cat", "lost+found"}


def test_images_below_a_class_folder_belong_to_it() -> None:
    found = layout("cat/2020/1.jpg", "cat/2.jpg", "dog/images/x/1.jpg")
    assert found.classes == ("cat", "dog")
    assert found.images == (("cat/2.jpg", 0), ("cat/2020/1.jpg", 0), ("dog/images/x/1.jpg", 1))


def test_folders_around_the_class_folders_are_stepped_into() -> None:
    found = layout("imagenet/val/cat/1.jpg", "imagenet/val/dog/1.jpg", "imagenet/README.txt", folders=("imagenet",))
    assert found.classes == ("cat", "dog")
    assert layout("val/cat/1.jpg").classes == ("cat",)


def test_a_single_class_is_no_wrapper() -> None:
    assert layout("cat/1.jpg").classes == ("cat",)
    assert layout("cat/1.jpg", "cat/old/2.jpg").classes == ("cat",)


def test_images_beside_the_class_folders_are_told() -> None:
    found = layout("cat/1.jpg", "dog/1.jpg", "preview.jpg")
    assert found.classes == ("cat", "dog")
    assert found.notes == ("images passed over outside the class folders: 1 ('preview.jpg')",)


def test_images_without_class_folders_are_an_error() -> None:
    with pytest.raises(DataError) as caught:
        layout("1.jpg", "2.jpg", "3.jpg", "4.jpg")
    assert str(caught.value) == (
        "'set' holds images ('1.jpg', '2.jpg', '3.jpg' and 1 more) but not in class folders: expected one sub-folder a "
        "class; move them into folders named after their classes"
    )


def test_no_images_are_an_error() -> None:
    with pytest.raises(DataError) as caught:
        layout("cat/1.txt", folders=("cat",))
    assert str(caught.value) == (
        "'set' holds no images (other files: 1): expected one sub-folder a class with .jpg, .jpeg, .png, .webp, .bmp, "
        ".tif, .tiff files"
    )


def test_scan_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "set/cat").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1.jpg").touch()
    (tmp_path / "set/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/cat/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/cat/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "set/cat/pipe.jpg")
    listing = scan_folder(tmp_path / "set")
    assert set(listing.files) == {"dog/1.jpg", "cat/gone.jpg"}
    assert listing.folders == {"cat", "dog", "cat/up"}
    assert listing.others == ["cat/pipe.jpg"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(DataError) as caught:
        scan_folder(tmp_path)
    assert str(caught.value) == (
        f"cannot read the folder '{tmp_path}': Permission denied; give a folder that you may read"
    )


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """An image in 1,200 folders, each in the other; taken away again, which pytest itself would fail to do."""
    before = Path.cwd()
    os.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")  # noqa: PTH102 (relative to where the loop has come: the whole path is long)
        os.chdir("d")
    Path("1.png").write_text("")
    os.chdir(before)
    yield tmp_path
    os.chdir(tmp_path / ("d/" * 1200))
    Path("1.png").unlink()
    for _ in range(1200):
        os.chdir("..")
        os.rmdir("d")  # noqa: PTH106
    os.chdir(before)


@pytest.mark.slow
def test_folders_in_each_other_are_read_however_deep(deep: Path) -> None:
    listing = scan_folder(deep)
    assert list(listing.files) == ["d/" * 1200 + "1.png"]
    assert len(listing.folders) == 1200
    assert len(find_classes("set", listing).images) == 1


def test_folders_that_link_to_each_other_come_to_an_end(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(9)]
    for name in names:
        (tmp_path / name).mkdir()
        for other in names:
            if other != name:
                (tmp_path / name / other).symlink_to(tmp_path / other)
    with pytest.raises(DataError) as caught:
        scan_folder(tmp_path)
    assert str(caught.value).startswith(f"the folders in '{tmp_path}' link to each other: ")
    assert str(caught.value).endswith(" is one of over 100 paths to one folder; remove links between them")


def test_a_class_that_is_a_link_to_another_has_its_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_text("")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert set(scan_folder(tmp_path).files) == {"a/1.png", "b/1.png"}


def test_links_in_circles_are_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.png").symlink_to(tmp_path / "a/two.png")
    (tmp_path / "a/two.png").symlink_to(tmp_path / "a/one.png")
    (tmp_path / "a/up").symlink_to(tmp_path)
    listing = scan_folder(tmp_path)
    assert set(listing.files) == {"a/one.png", "a/two.png"}
    assert listing.folders == {"a", "a/up"}


def test_names_with_thousands_of_digits_have_an_order() -> None:
    small, large = "a" + "8" * 5_000, "a" + "9" * 5_000
    assert sorted([large, "a10", small, "a9"], key=path_order) == ["a9", "a10", small, large]
