"""What a sweep keeps: it comes back as it was, damaged files are refused, and so are rows made for something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
from image_files import write_folder
from observing import Seen

from tokencut.data.image_set import open_images
from tokencut.data.sources import open_source
from tokencut.errors import ArtifactError
from tokencut.sweeping.rows import DENSE, Row
from tokencut.sweeping.state import FILE, FORM, Speed, State, conditions_of, load_state, with_speed

CONDITIONS = {"weights": "abc", "precision": "fp32"}
RECIPE = {"method": "bat", "keep": [0.9, 0.5], "layers": [2, 4]}


def state() -> State:
    made = State(dict(CONDITIONS), notes=("a note",), timed_on={"device": "here"})
    made.add(Row(DENSE, 1.0, 0.25, 50.0, 100.0, None, 2, 0.1 + 0.2, (True, False)), None)
    made.add(Row("bat", (0.9, 0.5), 0.125, 100.0, 100.0, None, 2, 1 / 3, (True, True)), RECIPE)
    made.speeds["bat", (0.9, 0.5)] = Speed(100.0, 90.5, 110.25)
    return made


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state().save(tmp_path / "report")
    assert load_state(tmp_path / "report") == state()
    assert [path.name for path in (tmp_path / "report").iterdir()] == [FILE]


def test_there_is_none_in_an_empty_or_missing_folder(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "none") is None


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match="cannot make the folder .*: No such file or directory; give another `folder`"
    ):
        state().save(tmp_path / "none" / "report")


def edited(**changes: Any) -> str:
    return FORM.write({**state()._to_json(), **changes})


def row_with(**changes: Any) -> list[dict[str, Any]]:
    return [{**state()._to_json()["rows"][0], **changes}]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "its state is not JSON that can be read (Expecting value: line 1 column 1 (char 0))"),
        ("[" * 100_000, "its state is not JSON that can be read (nested too deep)"),
        ("null", "its state is None, not an object"),
        ("{}", "its state's type is None, not 'sweep'"),
        (edited(conditions=[1]), "its state's conditions is [1], not an object"),
        (edited(conditions={"weights": 1}), "its state's conditions['weights'] is 1, not a string"),
        (edited(notes=3), "its state's notes is 3, not a list"),
        (edited(rows={"a": 1}), "its state's rows is {'a': 1}, not a list"),
        (edited(rows=row_with(correct="01x")), "its state's rows[0].correct is '01x', not 0 or 1 for each image"),
        (edited(rows=row_with(correct="")), "its state's rows[0].correct is '', not 0 or 1 for each image"),
        (edited(rows=row_with(keep="half")), "its state's rows[0].keep is 'half', not keep rates joined by /"),
        (edited(rows=row_with(keep=0.5)), "its state's rows[0].keep is 0.5, not keep rates joined by /"),
        (edited(rows=row_with(gmacs=None)), "its state's rows[0].gmacs is None, not a number"),
        (edited(rows=row_with(recipe=[])), "its state's rows[0].recipe is [], not an object or null"),
        (edited(speeds=[{"method": "bat", "keep": "0.5", "low": 1, "high": 2}]),
         "its state has no field speeds[0].median"),
    ],
    ids=lambda text: str(text[:60]),
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ArtifactError) as caught:
        load_state(tmp_path)
    assert str(caught.value) == (
        f"cannot go on with {tmp_path / FILE}: the file is damaged or was not written by tokencut: {what}; add "
        f"`force=True` to start again, or give another folder, such as `folder='{tmp_path}-2'`"
    )


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(edited().replace('"format":1', '"format":2'))
    with pytest.raises(ArtifactError) as caught:
        load_state(tmp_path)
    assert str(caught.value) == (
        f"cannot go on with {tmp_path / FILE}: the file has format 2, and this tokencut reads up to 1; add "
        f"`force=True` to start again, or give another folder, such as `folder='{tmp_path}-2'`"
    )


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(
        ArtifactError, match="cannot go on with .*Is a directory.*; add `force=True` to start again, or give"
    ):
        load_state(tmp_path)
    (tmp_path / FILE).rmdir()
    (tmp_path / FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(
        ArtifactError, match="cannot go on with .*decode.*; add `force=True` to start again, or give another"
    ):
        load_state(tmp_path)


def test_the_same_conditions_and_recipes_are_accepted(tmp_path: Path) -> None:
    state().require(CONDITIONS, {("bat", (0.9, 0.5)): RECIPE, ("evit", 0.5): {"method": "evit"}}, tmp_path)


@pytest.mark.parametrize(
    ("conditions", "recipe", "what"),
    [
        ({"weights": "xyz"}, RECIPE, "other weights (abc, not xyz)"),
        ({"weights": "x" * 64, "precision": "bf16"}, RECIPE, "other weights and other precision (fp32, not bf16)"),
        ({"layers": "new"}, RECIPE, "other layers (nothing, not new)"),
        ({}, {**RECIPE, "layers": [3]}, "other reduction options (bat, keep 0.9/0.5)"),
    ],
)
def test_rows_made_for_something_else_are_refused(conditions: dict[str, str], recipe: Any, what: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        state().require({**CONDITIONS, **conditions}, {("bat", (0.9, 0.5)): recipe}, Path("report"))
    assert str(caught.value) == (
        f"report holds rows made with {what}; add `force=True` to drop them and start again, or give another "
        "folder, such as `folder='report-2'`"
    )


def test_a_row_gets_its_speed() -> None:
    row = with_speed(state().rows[DENSE, 1.0], Speed(100.0, 90.0, 110.0))
    assert (row.images_per_second, row.images_per_second_quartiles) == (100.0, (90.0, 110.0))


def test_the_condition_on_weights_tells_heads_apart(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path / "set", ["a", "b", "c"], 1))

    def weights(model: Any) -> str:
        return conditions_of(model, open_images(model, source), Seen())["weights"]

    one, two = (timm.create_model("test_vit", img_size=32, num_classes=3, num_heads=heads) for heads in (1, 2))
    two.load_state_dict(one.state_dict())  # the same tensors, cut into other heads
    assert weights(one) == weights(one) != weights(two)
