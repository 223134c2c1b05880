"""What an observer does that overrides nothing."""

from __future__ import annotations

import logging

import pytest
from observing import Seen

from tokencut.observers import Observer


def test_notes_that_nobody_takes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tokencut"):
        for observer in (Seen(), Observer()):
            observer.note("100 % logged")
            observer.warning("mended")
            observer.progress("a task", 1, 2, {})
    assert caplog.record_tuples == [("tokencut", logging.INFO, "100 % logged"), ("tokencut", logging.WARNING, "mended")]
    assert not Observer().should_stop()
