"""What a command does to its process while it runs, all of it undone at its end: signals, warnings, logging."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from tokencut.runtime.quiet import quiet_libraries

# What ends a command: Ctrl-C, a polite request, a closed terminal.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupts:
    """A context in which Ctrl-C, and a polite request to end or a closed terminal, raise KeyboardInterrupt.

    So that a command ends the same way in all three cases: what it was writing is removed. A signal that was ignored
    on purpose (`nohup`) stays ignored.

    Attributes:
        seen: Whether a signal has come.
    """

    def __init__(self) -> None:
        self.seen = False
        self._process = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # it came from signal.signal

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker process that has not set its own handlers yet
            os._exit(128 + number)
        self.seen = True
        raise KeyboardInterrupt


class StopRequest:
    """A context in which a signal that would end the command asks it to stop at the next good moment instead.

    It is acknowledged at once. A second one ends the command, as outside. What `Interrupts` leaves ignored stays so.

    Attributes:
        requested: Whether a signal has come.
    """

    def __init__(self, acknowledge: Callable[[], None] = lambda: None) -> None:
        """Prepares to wait for one.

        Args:
            acknowledge: Called when the first comes: says what will be kept.
        """
        self.requested = False
        self._acknowledge = acknowledge
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and callable(signal.getsignal(number)):
                    self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker process
            os._exit(128 + number)
        if self.requested:
            self._before[number](number, frame)
        self.requested = True
        with contextlib.suppress(RuntimeError):  # it came in the middle of another line
            self._acknowledge()


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """Of the processes that `torchrun` started, lets the first alone print."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0":
        yield
        return
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def quiet(*, unless: bool) -> Iterator[None]:
    """Keeps off stderr, where people look for one line of ours, what libraries warn of, log, or fail to clean up.

    Args:
        unless: Let them through.
    """
    if unless:
        yield
        return
    unraisable = sys.unraisablehook
    # An interrupt that reaches the processes that load images, too, ends in a traceback of torch's loader.
    sys.unraisablehook = lambda _: None
    try:
        with quiet_libraries():
            yield
    finally:
        sys.unraisablehook = unraisable
