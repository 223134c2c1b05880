"""Lists of images: every way of writing one, what becomes of labels, and one clear line where a list is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_files import encoded, greys, picture
from judged_models import black_or_not, small_model

from tokencut.data.labels import classes_for
from tokencut.data.sources import FolderSource, ListSource, Subset, open_source
from tokencut.errors import DataError
from tokencut.evaluation.accuracy import evaluate

EXPECTED = "a list has a line of column names, with file_name and label, or two columns, a file and its label"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg", "deep/c 1.jpg", "deep/é,2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(len(name)), "PNG" if name.endswith("png") else "JPEG"))
    return tmp_path


def listed(photos: Path, content: str | bytes, name: str = "list.csv", **options: str | Path) -> ListSource:
    data = content if isinstance(content, bytes) else content.encode()
    (photos / name).write_bytes(data)
    found = open_source(photos / name, **options)  # type: ignore[arg-type]
    assert isinstance(found, ListSource)
    return found


ROWS = [("a.jpg", "cat"), ("deep/c 1.jpg", "ant"), ("b.jpg", "cat")]


def table(delimiter: str = ",", head: tuple[str, str] | None = ("file_name", "label"), end: str = "\n") -> str:
    return end.join(delimiter.join(row) for row in ([head] if head else []) + ROWS) + end


@pytest.mark.parametrize(
    "content",
    [
        table(),
        table(head=("filename", "label")),  # as timm writes it
        table(head=("Image Path", "Class")),
        table(";"),
        table("\t"),
        table("|"),
        table(head=None),
        table(end="\r\n"),
        table(end="\r"),
        "\ufeff" + table(),  # as Excel writes UTF-8
        table("\t").encode("utf-16"),  # as Excel writes Unicode text
        "\n" + table().replace("\n", "\n\n"),
        "id,label,split,file_name\n" + "".join(f"7,{label},train,{file}\n" for file, label in ROWS),
        table().replace("deep/c 1.jpg", "deep\\c 1.jpg"),  # as Windows parts folders
        "label , file_name\n" + "".join(f'{label} , "{file}"\n' for file, label in ROWS).replace(' , "', ',"'),
    ],
)
def test_every_way_of_writing_a_list(photos: Path, content: str | bytes) -> None:
    found = listed(photos, content)
    assert (found.classes, found.notes) == (("ant", "cat"), ())
    names = [found.filename(index).replace("\\", "/") for index in range(3)]
    assert names == ["a.jpg", "b.jpg", "deep/c 1.jpg"]
    assert Subset(found, range(3)).folders() == [1, 1, 0]
    with found.open(2) as file:
        assert file.read() == (photos / "deep/c 1.jpg").read_bytes()
    assert found.filename(2, absolute=True) == str(photos / "deep/c 1.jpg")


def test_paths_are_relative_to_the_list_or_a_root(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("lists") / "l.csv"
    elsewhere.write_text(f'file_name,label\nb.jpg,x\n"deep/é,2.png",y\n{photos / "a.jpg"},x\n')
    with pytest.raises(DataError) as caught:
        open_source(elsewhere)
    assert str(caught.value) == (
        f"2 of the 3 files in {elsewhere} do not exist, such as 'b.jpg', 'deep/é,2.png'; give the folder that its "
        "paths are relative to, `image_root='DIR'`"
    )
    found = open_source(elsewhere, image_root=photos)
    assert sorted(found.filename(index, absolute=True) for index in range(3)) == sorted(
        str(photos / name) for name in ("a.jpg", "b.jpg", "deep/é,2.png")
    )


def test_a_list_of_hugging_face_in_its_folder(photos: Path) -> None:
    (photos / "metadata.csv").write_text("file_name,label\na.jpg,cat\ndeep/c 1.jpg,ant\n")
    found = open_source(photos)
    assert isinstance(found, ListSource)
    assert (found.classes, len(found)) == (("ant", "cat"), 2)
    assert found.notes == ("labels are those in metadata.csv, as Hugging Face writes it",)
    # Without labels, or of other images, it is a file like any other.
    (photos / "other").mkdir()
    (photos / "other/1.jpg").write_bytes((photos / "a.jpg").read_bytes())
    for content in (
        "file_name,caption\na.jpg,a cat\n",
        "file_name,label\nelsewhere.jpg,cat\n",
        "file_name,label\n",
        "",
    ):
        (photos / "metadata.csv").write_text(content)
        assert isinstance(open_source(photos), FolderSource)


def test_an_evaluation_goes_by_the_labels_of_the_list(tmp_path: Path) -> None:
    greys(tmp_path / "set", {"x": [0, 9], "y": [0, 9]})
    (tmp_path / "l.csv").write_text("file_name,label\nset/x/1.png,0\nset/x/2.png,1\nset/y/1.png,1\nset/y/2.png,1\n")
    report = evaluate(black_or_not(), tmp_path / "l.csv", workers=0)
    assert (report.images, report.top1) == (4, 75.0)
    assert "the model has no label names: the 2 labels stand for the model's classes in natural order" in report.notes


def test_labels_match_names_and_numbers_as_folders_do(photos: Path) -> None:
    model = small_model(labels=["Ant", "bee", "cat"])
    assert classes_for(model, listed(photos, table())).targets == (0, 2)
    numbered = classes_for(small_model(), listed(photos, "file_name,label\na.jpg,2\nb.jpg,0\n"))
    assert numbered.targets == (0, 2)
    assert numbered.notes[0] == (
        "the labels are taken for the numbers of the model's classes, the first of which is 0: '0', '2'"
    )
    with pytest.raises(DataError) as caught:
        classes_for(model, listed(photos, "file_name,label\na.jpg,dog\nb.jpg,cat\n"))
    assert str(caught.value) == (
        "2 labels for the model's 3 classes, and 'dog' match none of its label names: replace the labels in the list "
        "by label names (such as 'Ant', 'bee', 'cat'), or give one label for each of the 3 classes"
    )
    mapped = listed(photos, table())
    mapped.class_order = ("cat",)
    with pytest.raises(DataError, match="the class map lacks the labels 'ant'; it holds 'cat'"):
        classes_for(model, Subset(mapped, [0, 1, 2]))


def test_a_few_missing_files_are_images_that_cannot_be_read(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [0] * 100, "b": [9] * 100})
    rows = [f"{name}/{number}.png,{name}" for name in "ab" for number in range(1, 101)]
    (root / "a/7.png").unlink()
    (tmp_path / "l.csv").write_text("\n".join(["file_name,label", *rows]))
    report = evaluate(black_or_not(), open_source(tmp_path / "l.csv", image_root=root), workers=0)
    assert (report.images, report.unreadable) == (199, ("a/7.png",))


def test_images_listed_twice_count_once(photos: Path) -> None:
    found = listed(photos, "file_name,label\na.jpg,x\na.jpg,x\nb.jpg,y\n")
    assert (len(found), found.notes) == (2, ("images listed more than once, counted once: 1 ('a.jpg')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", f"is empty; {EXPECTED}"),
        ("\n\n", f"is empty; {EXPECTED}"),
        ("file_name,label\n", f"lists no images; {EXPECTED}"),
        ("name,kind\na.jpg,x\n", f"has no column of images among 'name', 'kind'; {EXPECTED}"),
        ("file_name,caption\na.jpg,x\n", f"has no column of labels among 'file_name', 'caption'; {EXPECTED}"),
        ("file_name,label\na.jpg,x\nb.jpg\n,y\nb.jpg,\n",
         "lacks"),
        ("file_name,label\na.jpg,x\na.jpg,y\n", "gives 'a.jpg' different labels; give each image one, since accuracies "
                                                "of one label an image are all that is measured"),
        (b"file_name,label\nb\xe9.jpg,x\n", "is not text in UTF-8; save it again as CSV in UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is not text in UTF-8; save it again as CSV in UTF-8"),
        ('file_name,label\n"a.jpg,x\n' + "y" * 200_000,
         f"is not a list in CSV (field larger than field limit (131072)); {EXPECTED}"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_list_is_one_line(photos: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        listed(photos, content)
    if message == "lacks":
        assert str(caught.value) == (
            f"3 of 4 lines in {photos / 'list.csv'} lack a file or a label, such as 'b.jpg', ',y', 'b.jpg,'; give each "
            "both, or leave them out"
        )
    else:
        assert str(caught.value) == f"{photos / 'list.csv'} {message}"
