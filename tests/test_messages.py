"""Short texts for messages."""

from __future__ import annotations

from tokencut.messages import quoted


def test_quoted_names_the_first_three() -> None:
    assert quoted(["a"]) == "'a'"
    assert quoted(["a", "b", "c", "d", "e"]) == "'a', 'b', 'c' and 2 more"
