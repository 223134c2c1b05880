"""All that is printed, and the only place that knows rich: results to stdout; notes, progress and errors to stderr."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokencut.cli.wording import typed
from tokencut.errors import TokencutError

if TYPE_CHECKING:
    from rich.console import RenderableType as RenderableType

# Where no terminal says how wide it is, nothing is wrapped: the output goes to a file or to another program.
UNBOUNDED = 1000

# Called with images done, images in all, and a word on how it stands.
Advance = Callable[[int, int, str], None]


class ReaderGoneError(Exception):
    """Whoever read our stdout has closed it (`| head`): there is nobody left to print for."""


def write(text: str) -> None:
    """Prints a line, or several, to stdout.

    Raises:
        ReaderGoneError: The other end is closed.
        TokencutError: It cannot be written (a full disk).
    """
    stream = sys.stdout
    encodable = text.encode(stream.encoding or "utf-8", errors="replace").decode(stream.encoding or "utf-8")
    try:
        stream.write(encodable + "\n")
        stream.flush()
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


def write_json(values: Mapping[str, Any]) -> None:
    """Prints one JSON object to stdout; numbers that are not finite, which JSON does not know, as null."""
    write(json_text(values))


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


def error(message: str) -> None:
    """Prints one line `error: ...` to stderr."""
    _to_stderr(f"error: {typed(message)}")


def note(message: str) -> None:
    """Prints one line `note: ...` to stderr."""
    _to_stderr(f"note: {typed(message)}")


def _to_stderr(message: str) -> None:
    one_line = re.sub(r"\s*[\r\n]\s*", " ", message.strip())
    printable = "".join(character if character.isprintable() else " " for character in one_line)
    with contextlib.suppress(OSError):  # nobody reads it
        print(printable, file=sys.stderr, flush=True)


def show(*parts: RenderableType) -> None:
    """Prints tables and lines to stdout, as wide as the terminal or unwrapped."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else UNBOUNDED
    console = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    write("\n".join(line.rstrip() for line in captured.get().rstrip().splitlines()))


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, title: str | None = None
) -> RenderableType:
    """A table; the first `left` columns are texts and stand left, the others are numbers and stand right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, title=title and Text(title), title_justify="left", pad_edge=False)
    for position, column in enumerate(columns):
        made.add_column(Text(column), justify="left" if position < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def facts(rows: Sequence[tuple[str, str]]) -> RenderableType:
    """Names and values, one a line."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(name, style="bold"), Text(value))
    return made


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
    """Whether somebody watches stderr, so that progress may be drawn there."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def live() -> Iterator[Callable[[RenderableType], None]]:
    """A place on stderr that is drawn anew at every call, and stays; nothing where stderr is not a terminal.

    Yields:
        A function to call with what is to stand there.
    """
    if not on_terminal():
        yield lambda part: None
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(file=sys.stderr), refresh_per_second=4) as place:
        yield lambda part: place.update(part)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Advance]:
    """A progress bar on stderr, gone at its end; nothing where stderr is not a terminal.

    Args:
        title: What is going on.

    Yields:
        A function to call with the images done, the images in all, and a word on how it stands.
    """
    if not on_terminal():
        yield lambda done, total, status: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(title, total=None, status="")
        yield lambda done, total, status: bar.update(task, completed=done, total=total, status=status)
