"""Short texts for messages."""

from __future__ import annotations

from tokencut.messages import listed, one_line, quoted, shorten


def test_quoted_names_the_first_three() -> None:
    assert quoted(["a"]) == "'a'"
    assert quoted(["a", "b", "c", "d", "e"]) == "'a', 'b', 'c' and 2 more"
    assert quoted(["a\nb"], total=9) == "'a\\nb' and 8 more"
    assert quoted([]) == ""


def test_listed_names_as_many_as_it_may() -> None:
    assert listed({"a": 1, "b": 2}.keys()) == "a, b"
    assert listed(["a", "b", "c"], most=1) == "a and 2 more"
    assert listed(list("abcdef"), most=None) == "a, b, c, d, e, f"


def test_one_line_is_one_and_short() -> None:
    assert one_line(" two\n  lines ") == "two lines"
    assert one_line(ValueError()) == "ValueError"
    assert one_line("x" * 200) == "x" * 200
    assert one_line("x" * 201) == "x" * 197 + "..."
    assert one_line("abcdef", 5) == "ab..."


def test_shorten_tells_a_value_as_python_writes_it() -> None:
    assert shorten("a\nb") == "'a\\nb'"
    assert shorten([1] * 100) == "[" + "1, " * 18 + "1," + "..."
