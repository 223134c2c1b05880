"""What an exported file says about its model, and how it is refused where that is damaged."""

from __future__ import annotations

import pytest
from export_models import small

from tokencut.errors import ArtifactError
from tokencut.export.info import describe_export, export_info_from_text

BEFORE = describe_export(small(), name="mine").to_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"format":1',
            '"format":2',
            "^the file has format 2, and this tokencut reads up to 1; type pip install -U",
        ),
        ('"format":1', '"format":true', "its metadata's format is .*, not 1; export the model again$"),
        ('"depth":1', '"depth":0', "its metadata's depth is 0, not a whole number from 1 to 1000"),
        ('"gmacs":', '"gmac":', "its metadata has .* field"),
        ('"std":[0.2,', '"std":[0,', "preprocessing.std"),
        ('"kind":"', '"kind":"made up ', "origin.kind"),
        ('"tokens":16', '"tokens":"16"', "the recipe's tokens"),
        (BEFORE, "[]", r"its metadata is \[\], not an object"),
        (BEFORE, BEFORE[:-1], r"its metadata is not JSON that can be read \(.*\); export the model again$"),
        (BEFORE, "[" * 100_000, "its metadata is not JSON"),
        (BEFORE, " " * 8_000_001, "its metadata has 8000001 characters, more than 8000000"),
    ],
    ids=str,
)
def test_damaged_metadata(old: str, new: str, message: str) -> None:
    assert old in BEFORE
    with pytest.raises(ArtifactError, match=message):
        export_info_from_text(BEFORE.replace(old, new))
