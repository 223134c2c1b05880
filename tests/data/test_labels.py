"""Which class a folder stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from image_files import greys, write_folder
from judged_models import small_model

from tokencut.data import labels
from tokencut.data.labels import ClassMap, classes_for, map_classes
from tokencut.data.sources import FolderSource, Subset, open_source
from tokencut.errors import DataError

ANIMALS = ("cat", "polar bear", "Dog", "horse")


def test_folders_match_label_names_whatever_their_case_and_underscores() -> None:
    folders = ["Polar_Bear", "cat", "dog", "HORSE"]
    assert map_classes(folders, ANIMALS, 4) == ClassMap((1, 0, 2, 3), ANIMALS, ())


def test_a_name_matches_however_its_accents_are_encoded() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert map_classes([decomposed], [composed, "tea"], 2).targets == (0,)


def test_a_subset_is_fine_and_said_so() -> None:
    assert map_classes(["horse", "cat"], ANIMALS, 4) == ClassMap(
        (3, 0), ANIMALS, ("2 of the model's 4 classes are present",)
    )


def test_a_single_class_is_a_subset_too() -> None:
    assert map_classes(["cat"], ANIMALS, 4).notes == ("1 of the model's 4 classes is present",)


def test_sparse_label_names_match_by_their_index() -> None:
    mapped = map_classes(["cat", "dog"], {7: "dog", 2: "cat"}, 9)
    assert mapped.targets == (2, 7)
    assert mapped.class_names == ("0", "1", "cat", "3", "4", "5", "6", "dog", "8")


@pytest.mark.parametrize(
    ("folders", "targets"),
    [
        (["n01440764", "n15075141"], (0, 999)),
        (["tench", "toilet tissue, toilet paper, bathroom tissue"], (0, 999)),
        (["Tinca_tinca", "bathroom_tissue"], (0, 999)),
        # A whole description goes before a synonym: 264 is `Cardigan, Cardigan Welsh corgi`, 474 is `cardigan`.
        (["cardigan", "Cardigan_Welsh_corgi"], (474, 264)),
    ],
)
def test_a_head_of_1000_classes_knows_imagenet(folders: list[str], targets: tuple[int, ...]) -> None:
    mapped = map_classes(folders, None, 1000)
    assert mapped.targets == targets
    assert mapped.notes == ("2 of the model's 1000 classes are present",)


def test_a_name_that_two_classes_share_does_not_match() -> None:
    # ImageNet has the bird (134) and the machine (517), both described as `crane`.
    with pytest.raises(DataError, match="'crane' match none of its label names"):
        map_classes(["crane"], None, 1000)


def test_a_model_with_other_classes_is_no_imagenet_model() -> None:
    shop = [f"article {number}" for number in range(1000)]
    with pytest.raises(DataError, match="'cup' match none"):
        map_classes(["cup"], shop, 1000)
    assert map_classes(["n01440764"], shop, 1000).targets == (0,)  # wnids are ImageNet's beyond doubt


def test_a_numbered_subset() -> None:
    mapped = map_classes(["0", "5", "007"], None, 1000)
    assert mapped.targets == (0, 5, 7)
    assert mapped.class_names[4:8] == ("4", "5", "6", "007")
    assert mapped.notes == (
        "the folders' names are taken for the numbers of the model's classes, the first of which is 0: '0', '5', '007'",
        "3 of the model's 1000 classes are present",
    )
    for folders in (["1", "2", "1000"], ["0", "five"], ["7", "07"], ["0", "²"]):
        with pytest.raises(DataError):
            map_classes(folders, None, 1000)


def test_thousands_of_folders_are_matched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of the names is made a few times in all, not for every folder."""
    made: list[int] = []
    index = labels._lookup
    monkeypatch.setattr(labels, "_lookup", lambda names: made.append(len(names)) or index(names))
    names = [f"thing {number}" for number in range(2000)]
    assert len(map_classes([*names[:-1], "other"], names, 2000).targets) == 2000
    with pytest.raises(DataError):
        map_classes([*names, "other"], names, 2000)
    assert len(made) <= 6


def test_digits_that_are_no_decimals() -> None:
    assert map_classes(["10²", "①", "9²"], None, 3).targets == (1, 2, 0)


def test_as_many_folders_as_classes_map_in_natural_order() -> None:
    mapped = map_classes(["class9", "class8", "Class1"], None, 3)
    assert mapped.targets == (2, 1, 0)
    assert mapped.class_names == ("Class1", "class8", "class9")
    assert mapped.notes == (
        "the model has no label names: the 3 folders stand for the model's classes in natural order",
    )


def test_another_order_of_the_folders_is_told_with_an_example() -> None:
    mapped = map_classes([str(number) for number in range(1, 11)], None, 10)
    assert mapped.targets == tuple(range(10))
    assert mapped.notes[1:] == (
        "in the order of strings, by which torchvision, fastai and Keras train, they are '1', '10', '2' and 7 more: "
        "'10' would be class 1, not 9; if the model was trained so, give a class map, a text file with the folders' "
        "names in that order",
    )


def test_natural_order_against_the_label_names_is_warned_of() -> None:
    mapped = map_classes(["cat", "dog", "horse", "ice bear"], ANIMALS, 4)
    assert mapped.targets == (0, 1, 2, 3)
    assert mapped.notes == (
        "folders 'ice bear' match no label name: the 4 folders stand for the model's classes in natural order",
        "the natural order contradicts the model's label names: it puts folder 'dog' on class 'polar bear'; rename the "
        "folders to the label names for a true accuracy",
    )


def test_natural_order_in_line_with_the_label_names_is_not_warned_of() -> None:
    assert len(map_classes(["a", "b", "plane"], ["a", "b", "airplane"], 3).notes) == 1


def test_the_order_that_the_user_tells(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", ["1", "10", "2"], images=1)
    order = tmp_path / "map.txt"
    order.write_text("1\n10\n2\n3\n\n")
    source = open_source(tmp_path / "set", class_map=order)
    model = timm.create_model("test_vit", num_classes=5)
    assert source.classes == ("1", "2", "10")
    for images in (source, Subset(source, [1, 2])):
        assert labels.classes_for(model, images) == ClassMap(
            (0, 2, 1), ("1", "10", "2", "3", "4"), ("3 of the model's 5 classes are present",)
        )
    for text, message in (
        ("1\n2\n", r"lacks the class folders '10'; it holds '1', '2'$"),
        ("\n".join("123456"), r"lacks the class folders '10'"),
        ("\n".join(["10", *"12345"]), r"has 6 classes and the model's head 5; give the map"),
        ("1\n2\n1\n", r"has '1' twice; give a text file"),
        ("", r"is empty; give a text file"),
    ):
        order.write_text(text)
        with pytest.raises(DataError, match=message):
            labels.classes_for(model, open_source(tmp_path / "set", class_map=order))
    order.write_bytes(b"\xff\xfe")
    for path, message in ((order, "it is not text"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(DataError, match=f"cannot read the class map {path}: {message}; give a text file"):
            open_source(tmp_path / "set", class_map=path)


def test_folders_that_match_nothing_are_named_with_what_was_expected() -> None:
    with pytest.raises(DataError) as caught:
        map_classes(["x10", "x9", "cat", "w\n1", "x2"], ANIMALS, 4)
    assert str(caught.value) == (
        "5 class folders for the model's 4 classes, and 'w\\n1', 'x2', 'x9' and 1 more match none of its label names: "
        "rename the folders to label names (such as 'cat', 'polar bear', 'Dog'), or give one folder for each of "
        "the 4 classes"
    )


def test_a_wrong_number_of_folders_for_a_model_without_label_names() -> None:
    with pytest.raises(DataError) as caught:
        map_classes(["left"], None, 2)
    assert str(caught.value) == (
        "1 class folder for the model's 2 classes, such as 'left': the model has no label names to match, so exactly "
        "2 folders are expected, in the order of its classes"
    )


def in_one_folder(tmp_path: Path, only: str, *inner: str) -> FolderSource:
    """A set whose only folder holds folders with an image each."""
    return FolderSource("set", greys(tmp_path / only, dict.fromkeys(inner, [0])).parent)


def test_an_only_class_folder_with_folders_in_it_is_one_class(tmp_path: Path) -> None:
    model = small_model(labels=["ant", "Bee", "cat"])
    source = in_one_folder(tmp_path, "bee", "left", "right")
    assert classes_for(model, source) == ClassMap(
        (1, 1),
        ("ant", "Bee", "cat"),
        (
            "the only folder with images, 'bee', is a class of the model: all images in it are of that class",
            "1 of the model's 3 classes is present",
        ),
    )
    assert source.classes == ("left", "right")


def test_class_folders_in_an_only_folder_go_before_its_own_name(tmp_path: Path) -> None:
    model = small_model(labels=["ant", "bee", "cat"])
    note = "the class folders are those in 'cat', the only folder with images"
    found = classes_for(model, in_one_folder(tmp_path, "cat", "bee", "ant"))
    assert (found.targets, found.notes[0]) == ((0, 1), note)
    # Where no name says anything, the folders do by their number.
    assert classes_for(small_model(2), in_one_folder(tmp_path / "n", "cat", "x", "y")).targets == (0, 1)


def test_an_only_class_folder_is_found_by_a_class_map_as_well(tmp_path: Path) -> None:
    source = in_one_folder(tmp_path, "b", "x", "y")
    source.class_order = ("a", "b", "c")
    found = classes_for(small_model(), source)
    assert (found.targets, found.class_names) == ((1, 1), ("a", "b", "c"))
    source.class_order = ("y", "b", "x")
    assert classes_for(small_model(), source).targets == (2, 0)
    source.class_order = ("k", "l", "m")
    with pytest.raises(DataError, match="the class map lacks the class folders 'x', 'y'; it holds 'k', 'l', 'm'"):
        classes_for(small_model(), source)
