"""Images named one by one: every format, the bundled digits, and all that is wrong told at once."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
from image_files import encoded, picture, write_folder
from PIL import Image

from tokencut.data.image_files import Photo, PhotoSource, check_photos, find_photos, photo_of, read_photos
from tokencut.data.sources import open_source
from tokencut.errors import DataError


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_formats_are_known_by_content_not_by_name(form: str, tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(encoded(picture(1), form))
    photos = find_photos([tmp_path / "photo"])
    assert [photo.name for photo in photos] == [str(tmp_path / "photo")]
    assert read_photos(photos, "RGB", lambda image: image.size) == [(40, 32)]
    assert read_photos(photos, "L", lambda image: image.mode) == ["L"]


def test_digits_are_the_first_test_images() -> None:
    pytest.importorskip("sklearn")
    source = open_source("digits")
    photos = find_photos(["digits", "x.png"])
    assert [photo.name for photo in photos] == [f"digits:{source.filename(index)}" for index in range(4)] + ["x.png"]
    assert [photo.opened().read() for photo in photos[:4]] == [source.open(index).read() for index in range(4)]


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "set", ["ant"], images=1)
    Path("text.jpg").write_text("no image")
    Path("cut.png").write_bytes(encoded(picture(1), "PNG")[:200])
    Path("good.jpg").write_bytes(encoded(picture(1)))
    with pytest.raises(DataError) as caught:
        check_photos(find_photos(["none.jpg", "good.jpg", "set", "text.jpg", "cut.png"]))
    before, _, rest = str(caught.value).partition("'cut.png' (")
    assert before == (
        "4 of 5 images cannot be drawn: 'none.jpg' (does not exist), 'set' (a folder; name the files in it, such as "
        "set/*.jpg), 'text.jpg' (not a JPEG, PNG, WEBP, BMP or TIFF image), "
    )
    assert rest.endswith("); give JPEG, PNG, WEBP, BMP or TIFF files, or the word digits")


def test_a_single_image_that_may_not_be_read() -> None:
    def refuse() -> io.BytesIO:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(DataError) as caught:
        check_photos([Photo("secret.jpg", refuse)])
    assert str(caught.value) == (
        "1 of 1 image cannot be drawn: 'secret.jpg' (Permission denied); give JPEG, PNG, WEBP, BMP or TIFF files, or "
        "the word digits"
    )


def test_a_photo_is_upright_and_an_image_of_a_set_is_as_it_is_judged(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("ant/1.jpg", "bee/1.jpg"):
        (tmp_path / name).parent.mkdir()
        picture(1, (40, 32)).save(tmp_path / name, exif=exif)
    photos = [*find_photos([tmp_path / "ant/1.jpg"]), photo_of(open_source(tmp_path), 0)]
    assert read_photos(photos, "RGB", lambda image: image.size) == [(32, 40), (40, 32)]


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "photo.jpg")
    with pytest.raises(DataError, match=r"'.*photo.jpg' \(it is a pipe, not a file\)"):
        check_photos(find_photos([tmp_path / "photo.jpg"]))


def test_sources_go_to_other_processes(tmp_path: Path) -> None:
    """As loaders need where processes are not forked."""
    folder = write_folder(tmp_path / "set", ["ant", "bee"], images=1)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.rglob("*.jpg"):
            archive.write(path, path.relative_to(folder))
    (tmp_path / "l.csv").write_text("file_name,label\nset/ant/1.jpg,ant\nset/bee/1.jpg,bee\n")
    for source in (PhotoSource([folder]), open_source(tmp_path / "set.zip"), open_source(tmp_path / "l.csv")):
        sent = pickle.loads(pickle.dumps(source))  # noqa: S301 (our own bytes)
        for index in range(2):
            with sent.open(index) as file, (folder / ("ant", "bee")[index] / "1.jpg").open("rb") as plain:
                assert file.read() == plain.read()
