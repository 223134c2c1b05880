"""The bundled images: the split stays as it was written down."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter

import pytest

from tokencut.data import digits
from tokencut.errors import DataError, UsageError


def test_split_sizes_and_classes() -> None:
    train, train_labels = digits.images("train")
    test, test_labels = digits.images("test")
    assert (len(train), len(test)) == (1197, 600)
    # scikit-learn's classes hold 178 182 177 183 181 182 181 179 174 180 images; a third of each is 58.1 to 61.1.
    assert set(Counter(test_labels).values()) <= {58, 59, 60, 61, 62}
    assert set(train_labels) == set(test_labels) == set(range(10))
    assert {(image.mode, image.size) for image in train + test} == {("RGB", (8, 8))}
    assert max(high for image in test for _, high in image.getextrema()) == 255


def test_split_never_changes() -> None:
    """The test images and labels, to the byte: accuracies stay comparable between versions."""
    images, labels = digits.images("test")
    content = hashlib.sha256(b"".join(image.tobytes() for image in images) + bytes(labels)).hexdigest()
    assert content == "1162c576a9575433469f3d499bcc310ee900b820b1863dd04a3be44643cffa7c"


def test_unknown_split() -> None:
    with pytest.raises(UsageError) as error:
        digits.images("val")
    assert str(error.value) == (
        "unknown split 'val' of the digits, expected 'train' or 'test'; type digits.images('test')"
    )


def test_missing_scikit_learn_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError) as error:
        digits.images("test")
    assert str(error.value) == (
        "the digits images come with scikit-learn, which is not installed; type pip install 'tokencut[digits]'"
    )
