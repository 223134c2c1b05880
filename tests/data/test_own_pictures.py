"""Pictures that tokencut wrote are no images to judge, wherever they lie: in folders, archives, among photos."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, picture, tar_of, write_folder
from PIL import Image, PngImagePlugin

from tokencut.data.image_files import PhotoSource, find_photos, read_photos
from tokencut.data.listing import Listing
from tokencut.data.own_pictures import START, set_apart
from tokencut.data.sources import open_source

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A picture as `visualize` writes it."""
    from tokencut.visualization.saving import Label, save_picture

    path = tmp_path_factory.mktemp("own") / "tokens.png"
    save_picture(np.zeros((40, 50, 3), np.uint8), [Label("text", 20, 20, 8)], path, "png")
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path, own: bytes) -> Path:
    """Two classes of three images, with pictures of ours in one and in a folder of their own."""
    root = write_folder(tmp_path / "set", ["ant", "bee"], images=2)
    for name in ("ant", "bee"):
        (root / name / "3.PNG").write_bytes(encoded(picture(3), "PNG"))
    (root / "report").mkdir()
    for name in ("ant/tokens.png", "report/tokens.png", "report/top1.PNG"):
        (root / name).write_bytes(own)
    return root


NOTE = "pictures that tokencut wrote passed over: 3 ('ant/tokens.png', 'report/tokens.png', 'report/top1.PNG')"


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "stored", "deflated", "bzip2"])
def test_they_are_passed_over_and_counted(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENCUT_CACHE", str(tmp_path / "cache"))
    data = folder
    if kind.startswith("tar"):
        data = tar_of(folder, tmp_path / f"set.{kind}", "w:gz" if kind == "tar.gz" else "w")
    elif kind != "folder":
        method = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2}[kind]
        data = tmp_path / "set.zip"
        with zipfile.ZipFile(data, "w", method) as archive:
            for path in sorted(folder.rglob("*.*")):
                archive.write(path, path.relative_to(folder))
    source = open_source(data)
    assert (source.classes, len(source)) == (("ant", "bee"), 6)
    assert NOTE in source.notes


def test_the_plots_of_a_sweep_carry_the_mark_as_well(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from tokencut.visualization.saving import TIMELESS

    Figure().savefig(tmp_path / "plot.png", metadata=TIMELESS["png"])
    assert (tmp_path / "plot.png").read_bytes()[:START].endswith(b"tEXtSoftware\0tokencut")


def test_a_folder_of_photos_leaves_them_out_and_a_name_takes_them(folder: Path) -> None:
    source = PhotoSource([folder / "ant", folder / "ant/tokens.png"])
    assert [Path(source.filename(index)).name for index in range(len(source))] == [
        "1.jpg", "2.jpg", "3.PNG", "tokens.png",
    ]  # fmt: skip
    assert source.notes == ("pictures that tokencut wrote passed over: 1 ('tokens.png')",)
    assert read_photos(find_photos([folder / "ant/tokens.png"]), "RGB", lambda image: image.size) == [(50, 40)]


def test_other_programs_pictures_count(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "another tokencut")
    (tmp_path / "set/ant").mkdir(parents=True)
    (tmp_path / "set/bee").mkdir()
    picture(1).save(tmp_path / "set/ant/1.png", pnginfo=info)
    Image.new("RGB", (8, 8)).save(tmp_path / "set/bee/1.png")
    (tmp_path / "set/bee/cut.png").write_bytes(b"\x89PNG")
    os.mkfifo(tmp_path / "set/bee/pipe.png")
    (tmp_path / "set/bee/gone.png").symlink_to(tmp_path / "nowhere")
    source = open_source(tmp_path / "set")
    assert [source.filename(index) for index in range(len(source))] == [
        "ant/1.png", "bee/1.png", "bee/cut.png", "bee/gone.png",
    ]  # fmt: skip
    assert source.notes == ("links or special files passed over: 1 ('bee/pipe.png')",)


def test_only_pngs_are_opened() -> None:
    listing = Listing({"a/1.jpg": (0, 0), "a/2.png": (0, 0)})
    opened: list[str] = []
    set_apart(listing, lambda name: opened.append(name) or b"")  # type: ignore[func-returns-value]
    assert opened == ["a/2.png"]
