"""All that is printed, and the only place that knows rich: results to stdout; notes, progress and errors to stderr.

Names and labels out of files may hold anything: every text passes `printable` on its way, so that none can clear a
screen, or add a line that looks like ours.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

from tokencut.cli.progress import Line, Pauses, Task
from tokencut.cli.wording import typed
from tokencut.errors import TokencutError
from tokencut.messages import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.console import RenderableType as RenderableType
    from rich.live import Live
    from rich.text import Text

# Where no terminal says how wide it is, nothing is wrapped: the output goes to a file or to another program.
UNBOUNDED = 1000


class Advance(Protocol):
    """Is told how a task stands."""

    def __call__(
        self, name: str, done: float, total: float, words: Sequence[str], left: float | None = None
    ) -> None: ...


class ReaderGoneError(Exception):
    """Whoever read our stdout has closed it (`| head`): there is nobody left to print for."""


class _Stdout:
    """Stands for stdout, so that whoever prints (a result, a parser's help) meets what can go wrong in one way."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        loaded()
        encoding = self._stream.encoding or "utf-8"
        with _told():
            return self._stream.write(text.encode(encoding, errors="replace").decode(encoding))

    def flush(self) -> None:
        with _told():
            self._stream.flush()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as gone:
        _discard_stdout()
        raise ReaderGoneError from gone
    except OSError as error:
        _discard_stdout()
        raise TokencutError(f"cannot print the result: {error.strerror}; free space, or send it elsewhere") from error


def _discard_stdout() -> None:
    """What is still buffered would fail once more, with a traceback, when Python ends."""
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """A context in which stdout and stderr can be written to, whatever they lead to.

    Writing to stdout raises ReaderGoneError where the other end is closed, TokencutError where there is no space. A
    stream that was closed (`2>&-`) leads nowhere, and so does its number: the next file to be opened would have it, and
    get whatever a library prints.
    """
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        if None in before:
            while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
                pass
            os.close(number)
        sys.stdout, sys.stderr = cast(TextIO, _Stdout(before[0] or nowhere)), before[1] or nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def write(*lines: str) -> None:
    """Prints lines to stdout.

    Raises:
        ReaderGoneError: The other end is closed.
        TokencutError: It cannot be written (a full disk).
    """
    _to_stdout("\n".join(map(printable, lines)))


def _to_stdout(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_json(values: Mapping[str, Any]) -> None:
    """Prints one JSON object to stdout; numbers that are not finite, which JSON does not know, as null."""
    _to_stdout(json_text(values))


def json_text(values: Mapping[str, Any]) -> str:
    """JSON for scripts: numbers that are not finite, which it does not know, are null, and notes name options."""
    return json.dumps(_for_json(values), indent=2, allow_nan=False)


def _for_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _for_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(entry) for entry in value]
    if isinstance(value, str):
        return typed(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def error(message: str, exit_code: int = 1, *, as_json: bool = False) -> None:
    """Prints one line `error: ...` to stderr, and where stdout is to be JSON, an object with it there, too."""
    told = printable(typed(message).strip())
    _to_stderr(f"error: {told}")
    if as_json:
        with contextlib.suppress(ReaderGoneError, TokencutError):  # it may be stdout that failed
            _to_stdout(json.dumps({"error": told, "exit_code": exit_code}, indent=2))


def note(message: str) -> None:
    """Prints one line `note: ...` to stderr."""
    _to_stderr(f"note: {printable(typed(message).strip())}")


def _to_stderr(line: str) -> None:
    loaded()
    with contextlib.suppress(OSError):  # nobody reads it
        print(line, file=sys.stderr, flush=True)


def show(*parts: RenderableType) -> None:
    """Prints tables and lines to stdout, as wide as the terminal or unwrapped."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else UNBOUNDED
    console = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)
    with console.capture() as captured:
        for part in parts:
            console.print(printable(part) if isinstance(part, str) else part)
    _to_stdout("\n".join(line.rstrip() for line in captured.get().rstrip().splitlines()))


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, title: str | None = None
) -> RenderableType:
    """A table; the first `left` columns are texts and stand left, the others are numbers and stand right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title and _plain_text(title), title_justify="left", pad_edge=False)
    for position, column in enumerate(columns):
        made.add_column(_plain_text(column), justify="left" if position < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(_plain_text, row))
    return made


def table_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Columns of a terminal that a table takes."""
    from rich.console import Console

    console = Console(width=UNBOUNDED)
    return console.measure(table(columns, rows)).maximum


def facts(rows: Sequence[tuple[str, str]]) -> RenderableType:
    """Names and values, one a line."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(_plain_text(name, style="bold"), _plain_text(value))
    return made


def _plain_text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(printable(text), style=style)


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values on one line, as options would have them: `depth=12 img_size=32`."""
    return " ".join(f"{name}={_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_plain, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}" if isinstance(value, float) else str(value)


def gmacs_text(gmacs: float) -> str:
    """Multiply-adds as papers write them: `1.254`, and small ones with three figures that count."""
    return f"{gmacs:.3f}" if gmacs >= 1 else f"{gmacs:.3g}"


def change_text(before: float, after: float) -> str:
    """A change in percent; nothing where nothing changed."""
    return "" if before == after else f"{100 * (after / before - 1):+.1f} %"


def keep_text(keep: float | Sequence[float] | None, reduce_by: int | None) -> str:
    """A keep rate as typed: `0.7`, `0.9/0.7/0.5`, or `reduce by 13`."""
    if keep is None:
        return f"reduce by {reduce_by}"
    return f"{keep:g}" if isinstance(keep, (int, float)) else "/".join(f"{rate:g}" for rate in keep)


def on_terminal() -> bool:
    """Whether stderr is a terminal on which progress may be drawn."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class _Screen:
    """The last lines of the terminal on stderr, drawn anew four times a second: parts one below the other."""

    def __init__(self) -> None:
        self._parts: list[RenderableType] = []
        self._live: Live | None = None
        self.waiting = contextlib.ExitStack()

    @contextlib.contextmanager
    def shown(self, part: RenderableType, *, stays: bool) -> Iterator[None]:
        """Shows a part, below those that are there; at its end it stays on the screen, or is gone."""
        from rich.console import Console, Group
        from rich.live import Live

        self.waiting.close()
        self._parts.append(part)
        if self._live is None:
            # rich takes away nothing but what it drew: what is printed to stderr meanwhile goes above.
            self._live = Live(
                get_renderable=lambda: Group(*self._parts), console=Console(file=sys.stderr), redirect_stdout=False
            )
            self._live.start(refresh=True)
        try:
            yield
        finally:
            if len(self._parts) == 1:
                self._live.transient = not stays
                self._live.stop()
                self._live = None
            self._parts.remove(part)


_SCREEN = _Screen()


class _Drawn:
    """A part of the screen that is made when it is drawn."""

    def __init__(self, draw: Callable[[ConsoleOptions], RenderableType]) -> None:
        self._draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self._draw(options)


@contextlib.contextmanager
def live() -> Iterator[Callable[[Callable[[int], RenderableType]], None]]:
    """A place on stderr that is drawn anew all the while, and stays; nothing where nothing can be drawn.

    Yields:
        A function to call with what makes that which is to stand there, for so many columns.
    """
    from rich.text import Text

    drawn: list[Callable[[int], RenderableType]] = [lambda columns: Text(end="")]

    def draw(part: Callable[[int], RenderableType]) -> None:
        drawn[0] = part

    if not on_terminal():
        yield draw
        return
    with _SCREEN.shown(_Drawn(lambda options: drawn[0](options.max_width)), stays=True):
        yield draw


@contextlib.contextmanager
def progress(title: str) -> Iterator[Advance]:
    """A line of progress on stderr: drawn on a terminal, and gone at its end; printed now and then elsewhere.

    Args:
        title: What is going on.

    Yields:
        A function to call with what is being done, how much is done, how much there is, how it stands in words, and
        the seconds left where they are known.
    """
    task = Task(printable(title), time.monotonic())
    pauses = Pauses(time.monotonic())
    drawn = on_terminal()

    def advance(name: str, done: float, total: float, words: Sequence[str], left: float | None = None) -> None:
        now = time.monotonic()
        task.update(printable(name), done, total, tuple(map(printable, words)), now, left)
        if not drawn and pauses.over(now):
            _to_stderr(task.text(now))

    if not drawn:
        yield advance
        return

    def line(options: ConsoleOptions) -> Text:
        # The last column stays free: some terminals begin a new line as soon as it is taken.
        return _bar(task.line(options.max_width - 1, time.monotonic()), ascii_only=options.ascii_only)

    with _SCREEN.shown(_Drawn(line), stays=False):
        yield advance


def loading(what: str) -> None:
    """Says at once what is being loaded: on a terminal until anything else is printed or shown."""
    if not on_terminal():
        note(f"loading {what}")
        return
    with contextlib.suppress(OSError):  # before rich is loaded, which draws over it
        sys.stderr.write(f"loading {what}\r")
        sys.stderr.flush()
    _SCREEN.waiting.enter_context(progress(f"loading {what}"))


def loaded() -> None:
    """Takes away what `loading` shows."""
    _SCREEN.waiting.close()


def _bar(line: Line, *, ascii_only: bool) -> Text:
    from rich.text import Text

    parts = [(line.name, "")]
    if line.bar:
        full, empty = ("#", "-") if ascii_only else ("\u2501", "\u2501")
        parts += [("  ", ""), (full * line.filled, "cyan"), (empty * (line.bar - line.filled), "bright_black")]
    return Text.assemble(*parts, ("  " + line.words, ""), no_wrap=True, overflow="ellipsis")
