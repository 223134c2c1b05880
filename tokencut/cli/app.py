"""The `tokencut` command: finds the command to run, and turns whatever goes wrong into one line and an exit code.

A command is a file with a function, and one line in `COMMANDS`. Nothing here imports torch or timm: help must be quick.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from tokencut.cli import completion, render
from tokencut.cli.cmd_cache import cache
from tokencut.cli.cmd_compare import compare
from tokencut.cli.cmd_compress import compress
from tokencut.cli.cmd_eval import evaluate
from tokencut.cli.cmd_export import export_file
from tokencut.cli.cmd_info import info
from tokencut.cli.cmd_models import models
from tokencut.cli.cmd_predict import predict
from tokencut.cli.cmd_profile import profile
from tokencut.cli.cmd_sweep import sweep
from tokencut.cli.cmd_visualize import visualize
from tokencut.cli.help import HelpfulCommand, HelpfulGroup
from tokencut.cli.loading import announced
from tokencut.cli.options import with_home_folders
from tokencut.cli.process import Interrupts, only_first_speaks, quiet
from tokencut.errors import TokencutError, UsageError
from tokencut.messages import nearest_known
from tokencut.version import __version__

COMMANDS: dict[str, Callable[..., None]] = {
    "compress": compress,
    "profile": profile,
    "eval": evaluate,
    "compare": compare,
    "predict": predict,
    "export": export_file,
    "sweep": sweep,
    "visualize": visualize,
    "models": models,
    "info": info,
    "cache": cache,
}

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


class _Commands(HelpfulGroup):
    """The commands; an unknown one gets the nearest offered."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and name not in self.commands:
            known = f"commands are {', '.join(self.commands)}; type tokencut --help"
            near = nearest_known(name, [*self.commands, "help"], cutoff=0.6)
            raise UsageError(f"unknown command {name!r}{near} {known}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="tokencut",
    cls=_Commands,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _function in COMMANDS.items():
    app.command(_name, cls=HelpfulCommand, help=_function.__doc__)(with_home_folders(_function))


def _print_version(wanted: bool) -> None:
    if wanted:
        render.write(f"tokencut {__version__}")
        raise typer.Exit


def _show_completion(shell: str | None) -> None:
    if shell is not None:
        render.write(*completion.script(shell).splitlines())
        raise typer.Exit


def _install_completion(shell: str | None) -> None:
    if shell is not None:
        render.note(f"wrote {completion.install(shell)}; open a new terminal for it to take effect")
        raise typer.Exit


_SHELLS: dict[str, Any] = {"metavar": "|".join(completion.PLACES), "is_eager": True}
SHOW_HELP = "Print what this shell reads to complete tokencut's words."
INSTALL_HELP = "Have this shell complete tokencut's words, in new terminals."


@app.callback()
def _tokencut(
    version: Annotated[
        bool,
        typer.Option("-V", "--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    install_completion: Annotated[
        str | None, typer.Option("--install-completion", callback=_install_completion, help=INSTALL_HELP, **_SHELLS)
    ] = None,
    show_completion: Annotated[
        str | None, typer.Option("--show-completion", callback=_show_completion, help=SHOW_HELP, **_SHELLS)
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback where something fails; may stand after a command, too.")
    ] = False,
) -> None:
    """Pretrained Vision Transformers made cheaper by reducing tokens.

    Try it, with nothing to download:

      tokencut compress digits --keep 0.6 -o digits.safetensors
      tokencut profile digits.safetensors
      tokencut eval digits.safetensors --data digits

    Then with a model and images of your own:

      tokencut compress deit_tiny --keep 0.6 -o out.safetensors
      tokencut eval out.safetensors --data /imagenet/val
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the entry point of the `tokencut` script.

    Args:
        arguments: The words behind `tokencut`; those of this process by default.

    Returns:
        The exit code: 0 done, 1 it could not be done, 2 the command line is wrong, 130 interrupted.
    """
    words, debug = _take_debug(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    no_stdout = sys.stdout is None
    with render.streams(), Interrupts() as interrupts, quiet(unless=debug), only_first_speaks(), announced():
        try:
            if completion.asked():
                completion.complete(typer.main.get_command(app))
            if no_stdout:
                raise TokencutError("stdout is closed, so no result could be printed; send it to a file or /dev/null")
            _refuse_empty(words)
            _invoke([*words] or ["--help"])  # the parser takes words out of its list
            return DONE
        except render.ReaderGoneError:
            return DONE
        except typer.Exit as done:
            return done.exit_code
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (nothing may end in a traceback)
            if debug:
                traceback.print_exc()
            # An interrupt while torch is being imported can surface as any exception.
            code, message = (INTERRUPTED, "interrupted") if interrupts.seen else _explain(error, words)
            render.error(message, code, as_json="--json" in _options(words))
            return code


def _take_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """The words without `--debug`, which may stand anywhere before a `--`, and whether it was there."""
    options = _options(words)
    kept = [word for word in options if word != "--debug"]
    return [*kept, *words[len(options) :]], len(kept) < len(options)


def _options(words: Sequence[str]) -> Sequence[str]:
    """The words among which there may be options: those before a `--`."""
    return words[: words.index("--")] if "--" in words else words


def _refuse_empty(words: Sequence[str]) -> None:
    """An empty word comes from a shell variable that is not set; as a path it would be the folder one is in."""
    for before, word in zip(("tokencut", *words), words, strict=False):
        if word.startswith("--") and "=" in word:
            before, _, word = word.partition("=")
        if not word and before != "--auto-augment":  # where it means none
            raise UsageError(f"there is an empty argument behind {before}; is a variable of your shell not set?")


def _invoke(words: list[str]) -> None:
    # Not through app(): typer's own main prints errors in boxes, and turns an EOFError (a damaged file) into "Aborted".
    command = typer.main.get_command(app)
    with command.make_context("tokencut", words) as context:
        command.invoke(context)


def _explain(error: BaseException, words: Sequence[str]) -> tuple[int, str]:
    """Exit code and message for what a command raised."""
    if isinstance(error, UsageError):
        return WRONG_USAGE, str(error)
    if isinstance(error, TokencutError):
        return FAILED, str(error)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return INTERRUPTED, "interrupted"
    if hasattr(error, "format_message"):  # the parser's own; typer moved its class between releases
        return WRONG_USAGE, _explain_parser(error, words)
    if _lacks_memory(error):
        return FAILED, "out of memory; type a smaller --batch-size, such as --batch-size 8"
    if isinstance(error, OSError) and error.strerror:
        where = f": {str(error.filename)!r}" if error.filename else ""
        return FAILED, f"{error.strerror}{where}; add --debug to see where that came from"
    return FAILED, f"unexpected {type(error).__name__}: {error}; add --debug for a traceback to report"


def _lacks_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:  # importing it takes a second and more
        return isinstance(error, MemoryError)
    from tokencut.runtime.devices import lacks_memory

    return lacks_memory(error)


# What other programs call it.
_ELSEWHERE = {
    "--epochs": "--finetune-epochs", "--finetune": "--finetune-epochs", "--learning-rate": "--lr",
    "--num-workers": "--workers", "--imgsz": "--img-size",
    "--image-size": "--img-size", "--input-size": "--img-size", "--out": "--output", "--overwrite": "--force",
    "--yes": "--force", "--dataset": "--data", "--data-dir": "--data", "--train": "--train-data", "--gpu": "--device",
    "--dtype": "--precision", "--amp": "--precision", "--ratio": "--keep", "--keep-rate": "--keep", "-r": "--reduce-by",
    "--weights": "--checkpoint", "--pretrained": "--no-pretrained", "--calib": "--calibration", "--topk": "--top",
}  # fmt: skip


def _meant(unknown: str, context: Any) -> str:
    """What may have been meant by an option that a command does not have."""
    owner = next(
        (name for name, one in getattr(context.command, "commands", {}).items() if unknown in _names(one)), None
    )
    if owner is not None:
        return f" before a command; type it behind one, as in tokencut {owner} {unknown};"
    known = _names(context.command)
    elsewhere = _ELSEWHERE.get(unknown)
    if elsewhere in known:
        return f", did you mean {elsewhere}?"
    parts = set(unknown.strip("-").split("-"))
    alike = [name for name in known if len(unknown) > 3 and parts <= set(name.strip("-").split("-"))]
    return f", did you mean {' or '.join(alike[:2])}?" if alike else nearest_known(unknown, known, cutoff=0.7)


def _names(command: Any) -> list[str]:
    return [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]


def _explain_parser(error: Any, words: Sequence[str]) -> str:
    command = "tokencut" if not words or words[0] not in COMMANDS else f"tokencut {words[0]}"
    unknown = getattr(error, "option_name", None) if hasattr(error, "possibilities") else None
    if unknown:
        return f"no such option {unknown}{_meant(unknown, error.ctx)} type {command} --help"
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]}; type {command} --help"
