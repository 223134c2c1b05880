"""Opening a source of images by what the user wrote."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from image_files import tar_of, write_folder
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from tokencut.data.sources import (
    FolderSource,
    Source,
    Subset,
    TarSource,
    check_apart,
    hold_out,
    open_source,
)
from tokencut.errors import DataError

EXPECTED = (
    "a folder with one sub-folder a class, a .tar, .tar.gz or .zip of one, a .csv list of images, or the word digits"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of two images; archives of it are unpacked in this test's own cache."""
    monkeypatch.setenv("TOKENCUT_CACHE", str(tmp_path / "cache"))
    return write_folder(tmp_path / "set", ["c2", "c10", "c1"], 2)


def content(source: Source) -> list[tuple[str, str, bytes]]:
    """All that a source gives: class, name and bytes of each image."""
    listed = []
    for index in range(len(source)):
        file, target = source[index]
        with file:
            listed.append((source.classes[target], source.filename(index), file.read()))
    return listed


def test_a_folder_a_tar_and_a_tar_gz_give_the_same(folder: Path, tmp_path: Path) -> None:
    sources = [
        open_source(folder),
        open_source(str(tar_of(folder, tmp_path / "set.tar"))),
        open_source(tar_of(folder, tmp_path / "set.tar.gz", "w:gz")),
    ]
    assert [type(source) for source in sources] == [FolderSource, TarSource, FolderSource]
    expected = [
        (name, f"{name}/{image}.jpg", (folder / name / f"{image}.jpg").read_bytes())
        for name in ("c1", "c2", "c10")
        for image in (1, 2)
    ]
    for source in sources:
        assert source.classes == ("c1", "c2", "c10")
        assert content(source) == expected


def test_a_source_is_called_what_the_user_wrote(folder: Path, tmp_path: Path) -> None:
    packed = tar_of(folder, tmp_path / "set.tar.gz", "w:gz")
    assert open_source(str(packed)).name == str(packed)


def test_an_open_source_passes_through(folder: Path) -> None:
    source = open_source(folder)
    assert open_source(source) is source


def test_a_source_crosses_processes(folder: Path, tmp_path: Path) -> None:
    source = open_source(tar_of(folder, tmp_path / "set.tar"))
    assert content(pickle.loads(pickle.dumps(source))) == content(source)  # noqa: S301 - its own bytes


def test_names_as_timm_gives_them(folder: Path) -> None:
    source = open_source(folder)
    assert source.filename(0) == "c1/1.jpg"
    assert source.filename(0, basename=True) == "1.jpg"
    assert source.filename(0, absolute=True) == str(folder / "c1/1.jpg")
    assert source.filenames()[-1] == "c10/2.jpg"


def test_timm_keeps_its_own_extensions(folder: Path) -> None:
    before = get_img_extensions(as_set=True).copy()
    Image.new("RGB", (4, 4)).save(folder / "c1/3.webp")
    assert len(open_source(folder)) == 7
    assert get_img_extensions(as_set=True) == before


def test_outputs_lie_outside_of_the_images(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, archive = open_source(folder), open_source(tar_of(folder, tmp_path / "set.tar"))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for output in (folder / "report", folder / "c1" / "report", folder, Path("report"), tmp_path / "link" / "report"):
        with pytest.raises(DataError, match=f"^{output} would lie among the images of '{folder}', .* give a place out"):
            check_apart(output, None, source)
    for output in (tmp_path / "report", tmp_path / "settled"):
        check_apart(output, None, source, archive)


def test_digits_are_a_source() -> None:
    pytest.importorskip("sklearn")
    source = open_source("digits")
    assert (source.name, source.classes, len(source)) == ("digits", tuple("0123456789"), 600)
    assert len(open_source("digits", split="train")) == 1197
    file, target = source[5]
    with file, Image.open(file) as image:
        assert image.size == (8, 8)
    assert source.filename(5) == f"{target}/0005.png"


def test_a_folder_called_digits_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "digits", ["a"], 1)
    monkeypatch.chdir(tmp_path)
    assert open_source("./digits").classes == ("a",)


@pytest.mark.parametrize(
    ("name", "made", "message"),
    [
        ("missing", None, "no images at 'missing': it does not exist; expected {expected}"),
        ("set.7z", b"7z\xbc\xaf\x27\x1c", "'set.7z' is a file of an unknown kind: expected {expected}"),
        ("empty.tar", b"", "'empty.tar' is a file of an unknown kind: expected {expected}"),
    ],
)
def test_what_is_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, made: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if made is not None:
        Path(name).write_bytes(made)
    with pytest.raises(DataError) as caught:
        open_source(name)
    assert str(caught.value) == message.format(expected=EXPECTED)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.tar"
    path.write_bytes(b"x")

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(DataError) as caught:
        open_source(path)
    assert str(caught.value) == f"cannot read '{path}': Permission denied; give a file that you may read"


def test_held_out_images_are_a_seeded_share_of_every_class() -> None:
    source = open_source("digits", split="train")
    kept, held = hold_out(source, 0.1, seed=0)
    names = [[part.filename(i) for i in range(len(part))] for part in (kept, held)]
    assert len(names[0]) + len(names[1]) == 1197 == len({*names[0], *names[1]})
    counts = np.bincount(held.folders(), minlength=10)
    assert (len(held), counts.min(), counts.max()) == (120, 12, 12)
    assert hold_out(source, 0.1, seed=0)[1].indices == held.indices != hold_out(source, 0.1, seed=1)[1].indices
    with held[0][0] as first, source[held.indices[0]][0] as second:
        assert first.read() == second.read()
    with pytest.raises(DataError, match="are too few to hold some out for choosing an epoch; type `select='last'`"):
        hold_out(Subset(source, [0, 1]), 0.1, seed=0)
