"""Packages of extras: what is said where they are missing."""

from __future__ import annotations

import sys

import pytest

from tokencut.errors import TokencutError
from tokencut.runtime import extras


def test_missing_packages_are_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TokencutError) as caught:
        extras.require("the plots need", "matplotlib", "torch", extra="plot")
    assert str(caught.value) == "the plots need matplotlib, which is not installed; type pip install 'tokencut[plot]'"
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(TokencutError, match="matplotlib and onnx, which are not installed"):
        extras.require("this needs", "matplotlib", "onnx", extra="dev")


def test_what_is_there_is_no_error() -> None:
    extras.require("this needs", "torch", "timm", extra="dev")
