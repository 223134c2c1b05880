"""Help that fits the screen: what most need with `--help`, all there is with `--help-all`, and every default."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

# Shown by --help-all only: what few ever change; of one command where it stands before it.
RARE = frozenset((
    "--accumulate", "--tensorboard", "--distill", "--distill-weight", "--temperature", "--alpha", "--beta",
    "--lr-scaling", "--min-lr", "--warmup-epochs", "--keep-warmup", "--weight-decay", "--layer-decay", "--clip-grad",
    "--ema-decay", "--label-smoothing", "--mixup", "--cutmix", "--crop-scale", "--hflip", "--color-jitter",
    "--auto-augment", "--random-erasing", "--mean", "--std", "--crop-pct", "--interpolation", "--image-root",
    "--calibration-limit", "--search-effort", "--front", "--select", "compress --compile", "compress --allow-drop",
    "compress --compile-mode",
    "--target-form", "--mean-gmacs", "--levels", "--frame-stride", "--frames", "--static-keep", "--views",
))  # fmt: skip

NONE = "none"
# What an option comes to that is not typed, where the parser does not know; of one command where it stands before it.
DEFAULTS: Mapping[str, str] = {
    "--keep": "0.7", "sweep --keep": "0.9,0.7,0.5",
    "--layers": "4,7,10 of 12", "--method": "bat", "--method-option": "the method's own", "--reduce-by": NONE,
    "--prop-attn": "by method", "sweep --methods": "bat,evit,tome", "compare --methods": NONE, "--compare": NONE,
    "--target-gmacs": NONE, "--target-speedup": NONE, "--target-latency": NONE, "--max-drop": NONE,
    "--calibration": NONE, "--mean-gmacs": NONE, "--levels": "4", "--target-form": "eager", "--quantize": NONE,
    "--allow-drop": "1",
    "export --calibration-limit": "128", "--calibration-limit": "512", "--search-effort": "40",
    "compress --front": "beside the output", "--front": NONE,
    "--finetune-epochs": "the recipe's", "--train-data": NONE, "--recipe": "short", "--select": "last",
    "--accumulate": "1", "--tensorboard": NONE, "--distill": "soft", "--distill-weight": "0.5", "--temperature": "1",
    "--alpha": "0", "--beta": "0", "--lr": "5e-5; paper: 4e-5", "--lr-scaling": "rms; paper: none",
    "--min-lr": "0.05", "--warmup-epochs": "0", "--keep-warmup": "0", "--weight-decay": "0.05; paper: 1e-6",
    "--layer-decay": "1", "--clip-grad": "1; paper: 0", "--ema-decay": "0", "--label-smoothing": "0; paper: 0.1",
    "--mixup": "0; paper: 0.8", "--cutmix": "0; paper: 1", "--crop-scale": "0.67; paper: 0.08",
    "--hflip": "0; paper: 0.5", "--color-jitter": "0; paper: 0.3",
    "--auto-augment": "none; paper: rand-m9-mmax9-mstd0.5-inc1", "--random-erasing": "0; paper: 0.25",
    "--checkpoint": NONE, "--model-kwargs": NONE, "--num-classes": "the weights'", "--img-size": "the weights'",
    "--mean": "the weights'", "--std": "the weights'", "--crop-pct": "the weights'", "--interpolation": "the weights'",
    "--compile-mode": "default", "--dense-file": NONE,
    "--data": NONE, "--limit": "all", "export --limit": "64", "--workers": "one a core, up to 4",
    "--class-map": "by name", "--image-root": "the list's own folder", "--predictions": NONE, "predict --output": NONE,
    "--frame-stride": "4", "--frames": NONE, "--static-keep": "all", "--views": "1",
    "--opset": "20", "--format": "as -o ends", "--install-completion": NONE, "--show-completion": NONE,
    "PATTERN": "all", "OTHER": "the same, dense",
}  # fmt: skip

# Narrower, and a description stands below its option instead of beside it.
TWO_COLUMNS, WIDEST = 76, 100
NAMES = 31

# Pieces of a line, and whether each is in bold letters.
Line = Sequence[tuple[str, bool]]


class HelpfulCommand(TyperCommand):
    """A command with our help."""

    def get_help(self, ctx: Any) -> str:
        return _text(self, ctx, whole=False)


class HelpfulGroup(TyperGroup):
    """A group of commands with our help."""

    def get_help(self, ctx: Any) -> str:
        return _text(self, ctx, whole=False)


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(_text(context.command, context, whole=True))
        raise typer.Exit


# An option of every command that has rare ones.
HelpAllFlag = Annotated[
    bool,
    typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show all options, and all that they do."),
]


def _text(command: Any, context: Any, *, whole: bool) -> str:
    """The page as wide as the terminal; the parser takes bold letters out again where there is no terminal."""
    lines = page(command, context, min(shutil.get_terminal_size().columns, WIDEST), whole=whole)
    bold = "" if os.environ.get("TERM") == "dumb" else "\x1b[1m"
    end = bold and "\x1b[0m"
    return "\n".join("".join(f"{bold}{text}{end}" if strong else text for text, strong in line) for line in lines)


def page(command: Any, context: Any, width: int, *, whole: bool) -> list[Line]:
    """The lines of a help text.

    Args:
        command: What the parser makes of a command or of the app.
        context: Its context.
        width: Columns there are.
        whole: Whether to show rare options, and more than the first sentence of each.
    """
    lines: list[Line] = [*_usage(command, context, width), []]
    lines += [[(line, False)] for line in _description(inspect.cleandoc(command.help or ""), width)]
    parameters = command.get_params(context)
    shown = [one for one in parameters if whole or not _is_rare(one, context.info_name)]
    entries: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for one in shown:
        argument = one.param_type_name == "argument"
        panel = "Arguments" if argument else getattr(one, "rich_help_panel", None) or "Options"
        entries.setdefault(panel, []).append((_names(one), _told(one, context, whole=whole)))
    commands = {name: context.command.get_command(context, name) for name in getattr(command, "commands", {})}
    entries["Commands"] = [(name, _summary(inspect.cleandoc(one.help or ""))) for name, one in commands.items()]
    for heading, rows in entries.items():
        if rows:
            lines += [[], [(f"{heading}:", True)], *_rows(rows, width)]
    if len(shown) < len(parameters):
        lines += [[], [(f"More options: {context.command_path} --help-all", False)]]
    return lines


def _is_rare(one: Any, command: str) -> bool:
    return any(option in RARE or f"{command} {option}" in RARE for option in one.opts)


def _usage(command: Any, context: Any, width: int) -> Iterator[Line]:
    words = []
    for one in command.get_params(context):
        if one.param_type_name == "argument":
            name = _argument(one) + ("..." if one.nargs == -1 else "")
            words.append(name if one.required else f"[{name}]")
        elif one.required:
            words.append(f"{one.opts[0]} {one.metavar}")
    words.append("[OPTIONS]")
    if getattr(command, "commands", None):
        words.append("COMMAND ...")
    text = f"{context.command_path} {' '.join(words)}"
    first, *others = _wrapped(text, width - 7)
    yield [("Usage: ", True), (first, False)]
    yield from ([(f"       {line}", False)] for line in others)


def _description(text: str, width: int) -> Iterator[str]:
    """A docstring: paragraphs filled, and examples, which are indented, as they are where they fit."""
    for number, paragraph in enumerate(text.split("\n\n")):
        if number:
            yield ""
        for example, group in _grouped(paragraph.splitlines()):
            if example:
                yield from _example(group, width)
            else:
                yield from _wrapped(" ".join(group), width)


def _grouped(lines: Sequence[str]) -> Iterator[tuple[bool, list[str]]]:
    """Lines of text together, and every command with the lines in which it goes on."""
    group: list[str] = []
    for line in lines:
        example = line.startswith(" ")
        goes_on = bool(group) and (group[-1].endswith("\\") if example else not group[0].startswith(" "))
        if group and not goes_on:
            yield group[0].startswith(" "), group
            group = []
        group.append(line)
    if group:
        yield group[0].startswith(" "), group


def _example(lines: Sequence[str], width: int) -> Iterator[str]:
    if all(len(line) <= width for line in lines):
        yield from lines
        return
    words = " ".join(line.strip().removesuffix("\\").strip() for line in lines)
    # An option and its value stay on one line.
    bound = re.sub(r"(--?[a-z-]+) (?=[^-])", "\\1\N{NO-BREAK SPACE}", words)
    parts = textwrap.wrap(
        bound, width - 4, initial_indent="  ", subsequent_indent="      ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    for number, part in enumerate(parts):
        yield part.replace("\N{NO-BREAK SPACE}", " ") + (" \\" if number < len(parts) - 1 else "")


def _argument(one: Any) -> str:
    return str(one.metavar or one.name.upper())


def _names(one: Any) -> str:
    """What is typed: `-o, --output FILE`."""
    if one.param_type_name == "argument":
        return _argument(one)
    if one.secondary_opts:
        return ", ".join((*one.opts, *one.secondary_opts))
    flag = one.is_flag or one.count
    return ", ".join(sorted(one.opts, key=len)) + ("" if flag else f" {one.metavar}")


def _told(one: Any, context: Any, *, whole: bool) -> str:
    text = one.help or ""
    default = default_of(one, context.info_name)
    shown = default and (whole or default != NONE)
    # The default stays on one line.
    bracket = f" [default: {default}]".replace(" ", "\N{NO-BREAK SPACE}").replace("\N{NO-BREAK SPACE}", " ", 1)
    return f"{text if whole else _summary(text)}{bracket if shown else ''}"


def _summary(text: str) -> str:
    """The first sentence."""
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]


def default_of(one: Any, command: str) -> str:
    """What an option or argument comes to where it is not typed; empty for one that must be, and for plain switches."""
    if one.required or (getattr(one, "is_flag", False) and not one.secondary_opts):
        return ""
    if one.secondary_opts and one.default is not None:
        return "on" if one.default else "off"
    if one.default is not None:
        return str(one.default)
    name = max(one.opts, key=len) if one.param_type_name == "option" else _argument(one)
    return DEFAULTS.get(f"{command} {name}") or DEFAULTS.get(name, NONE)


def _rows(rows: Sequence[tuple[str, str]], width: int) -> Iterator[Line]:
    """Names and what they mean, side by side or, where the screen is narrow, one below the other."""
    if width < TWO_COLUMNS:
        for name, text in rows:
            yield [(f"  {name}", True)]
            yield from ([(f"      {line}", False)] for line in _wrapped(text, width - 6))
        return
    column = min(NAMES, max(len(name) for name, _ in rows) + 4)
    for name, text in rows:
        first, *others = _wrapped(text, width - column) or [""]
        if len(name) > column - 4:
            yield [(f"  {name}", True)]
            yield [(" " * column + first, False)]
        else:
            yield [(f"  {name:<{column - 2}}", True), (first, False)]
        yield from ([(" " * column + line, False)] for line in others)


def _wrapped(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
