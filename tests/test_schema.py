"""The one reader of JSON: what each rule lets through, and the line that says where it does not."""

from __future__ import annotations

from typing import Any

import pytest

from tokencut.errors import ArtifactError
from tokencut.schema import (
    COUNT,
    NUMBER,
    POSITIVE,
    TEXT,
    TRUTH,
    WHOLE,
    Check,
    Fields,
    Form,
    Items,
    Rule,
    is_list_of,
    is_whole,
    optional,
    require_format,
)

POINT = Fields({"x": NUMBER, "y": NUMBER})
FORM = Form("shape", 2, Fields({"name": TEXT, "points": Items(POINT)}), "outline", "draw it again", most=200)


@pytest.mark.parametrize(
    ("check", "fine", "wrong"),
    [
        (TEXT, ["", "a"], [None, 1, ["a"]]),
        (TRUTH, [True, False], [0, 1, "true", None]),
        (NUMBER, [0, -1.5, 10**400], [True, float("nan"), float("inf"), "1", None]),
        (POSITIVE, [1, 0.1], [0, -1, True, "1"]),
        (WHOLE, [0, -3, 10**400], [1.0, True, "1"]),
        (COUNT, [0, 3], [-1, 1.0, False]),
        (optional(TEXT), [None, "a"], [1]),
        (POINT, [{"x": 1, "y": 2.5}], [[], None, {"x": 1}, {"x": 1, "y": 2, "z": 3}, {"x": 1, "y": "2"}]),
        (Fields({"x": NUMBER}, partial=True), [{}, {"x": 1}], [{"y": 1}, {"x": "1"}]),
        (Items(WHOLE, most=2), [[], [1, 2]], [[1, 2, 3], [1.5], {"a": 1}, "ab"]),
        (Items(WHOLE, named=True), [{}, {"any": 1}], [[1], {"any": "1"}]),
        (Rule(lambda value: is_list_of(is_whole, value, 1, 2), "1 or 2"), [[1], [1, 2]], [[], [1, 2, 3], [1.0], 1]),
    ],
)  # fmt: skip
def test_what_a_check_lets_through(check: Check, fine: list[Any], wrong: list[Any]) -> None:
    assert [value for value in fine if check.problem(value)] == []
    assert [value for value in wrong if not check.problem(value)] == []


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], " is [], not an object"),
        ({"name": "a"}, " has no field points"),
        ({"name": "a", "points": [], "more": 1}, " has an unknown field more"),
        ({"name": 3, "points": []}, "'s name is 3, not a string"),
        ({"name": "a", "points": [{"x": 1, "y": 2}, {"x": 1}]}, " has no field points[1].y"),
        ({"name": "a", "points": [{"x": 1, "y": None}]}, "'s points[0].y is None, not a number"),
        ({"name": "a", "points": [1]}, "'s points[0] is 1, not an object"),
        ({"name": "a", "points": [{"x": 1, "y": 2}] * 1001},
         "'s points is [{'x': 1, 'y': 2}, {'x': 1, 'y': 2}, {'x': 1, 'y': 2}, {'..., not a list of up to 1000"),
        ({"name": "a\nb" * 100, "points": 3}, "'s points is 3, not a list"),
        ({"na\nme": 1}, " has an unknown field na\\nme"),
    ],
)  # fmt: skip
def test_a_problem_is_one_line_that_names_the_field(value: Any, problem: str) -> None:
    assert FORM.fields.problem(value) == problem


def test_what_is_written_is_read_back_and_sorted() -> None:
    values = {"points": [{"y": 2, "x": 1.5}], "name": "one"}
    text = FORM.write(values)
    assert text == '{"format":2,"name":"one","points":[{"x":1.5,"y":2}],"type":"shape"}'
    assert FORM.read(text) == values
    with pytest.raises(ValueError, match="not JSON compliant"):
        FORM.write({"name": float("nan")})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not JSON that can be read (Expecting property name enclosed in double quotes: line 1...)"),
        ("[]", "is [], not an object"),
        ('{"type":"shape","format":NaN}', "is not JSON that can be read (NaN is not JSON)"),
        (" " * 201, "has 201 characters, more than 200"),
        ("3", "is 3, not an object"),
        ("{}", "'s type is None, not 'shape'"),
        ('{"type":"other","format":9}', "'s type is 'other', not 'shape'"),
        ('{"type":"shape"}', "'s format is None, not 2"),
        ('{"type":"shape","format":1}', "'s format is 1, not 2"),
        ('{"type":"shape","format":true}', "'s format is True, not 2"),
        ('{"type":"shape","format":2.0}', "'s format is 2.0, not 2"),
        ('{"type":"shape","format":2,"name":"a"}', "has no field points"),
    ],
)
def test_a_text_that_is_something_else_is_refused_in_one_line(text: str, what: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        FORM.read(text)
    own = what if what.startswith("'s") else f" {what}"
    assert str(caught.value) == f"the file is damaged or was not written by tokencut: its outline{own}; draw it again"


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"its outline is not JSON that can be read \(nested too deep\)"):
        Form("shape", 2, FORM.fields, "outline", "draw it again").read("[" * 100_000)


def test_a_newer_format_says_how_to_get_on() -> None:
    with pytest.raises(ArtifactError) as caught:
        FORM.read('{"type":"shape","format":3,"fields":"of another kind"}')
    assert str(caught.value) == ("the file has format 3, and this tokencut reads up to 2; type pip install -U tokencut")


@pytest.mark.parametrize("found", [2, 0, "1", None, True, 1.0])
def test_another_format_is_refused(found: Any) -> None:
    require_format("state", 1, 1, "start again")
    with pytest.raises(ArtifactError) as caught:
        require_format("state", found, 1, "start again")
    assert str(caught.value) == f"state has format {found!r}, and this tokencut reads up to 1; start again"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 400 + ".0", "9" * 21, "-" + "9" * 400, "9" * 5000])
def test_a_number_that_python_would_read_as_infinity_or_compute_with_no_longer_is_refused(number: str) -> None:
    form = Form("x", 1, Fields({"n": NUMBER}), "text", "write it again")
    assert form.read(form.write({"n": 2**63 - 1})) == {"n": 2**63 - 1}
    with pytest.raises(ArtifactError, match=r"is not JSON that can be read .too large a number, "):
        form.read(f'{{"n": {number}, "type": "x", "format": 1}}')
