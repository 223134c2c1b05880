"""Help: it fits the screen, tells every default, and keeps what few need for --help-all."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import typer
from outcome import Run

from tokencut.cli import app
from tokencut.cli.help import DEFAULTS, NONE, RARE, _example, _summary, default_of
from tokencut.training.recipe import PAPER, SHORT, TrainingRecipe

PROGRAM: Any = typer.main.get_command(app.app)
OPTIONS = [(name, one) for name, command in PROGRAM.commands.items() for one in command.params]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_help_fits_the_screen(run: Run, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ("", *app.COMMANDS):
        for word in ("--help", "--help-all") if any(_rare(one) for of, one in OPTIONS if of == name) else ("--help",):
            done = run(*filter(None, (name, word)))
            assert done.code == 0
            assert max(map(len, done.out.splitlines())) <= width, (name, word)
    # No column of a few letters: what an option means has half the screen at least.
    texts = [line.strip() for line in run("compress", "--help-all").out.splitlines() if line.startswith("      ")]
    assert sum(map(len, texts)) / len(texts) > 0.3 * min(width, 100)


def _rare(one: Any) -> bool:
    return "--help-all" in one.opts


def test_the_longest_help_is_a_screen_and_a_half(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lengths = {name: len(run(name, "--help").out.splitlines()) for name in app.COMMANDS}
    assert max(lengths.values()) <= 85
    assert lengths["compress"] <= 80


def test_what_few_need_is_behind_help_all_and_works_all_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = (run("compress", word).out.replace(",", " ") for word in ("--help", "--help-all"))
    assert short.splitlines()[-1] == "More options: tokencut compress --help-all"
    assert "More options" not in whole
    every = {max(one.opts, key=len) for name, one in OPTIONS if name == "compress"} - {"model"}
    assert every == {option for option in every if f"{option} " in f"{whole} "}
    hidden = {option for option in every if f"{option} " not in f"{short} "}
    assert {"--mixup", "--alpha", "--crop-pct", "--search-effort", "--select"} <= hidden
    assert not {"--keep", "--train-data", "--lr", "--checkpoint", "--data", "--device"} & hidden
    # More than the first sentence of each.
    assert "It grows with the square" not in short
    assert "It grows with the square" in " ".join(whole.split())
    # Typed without --help-all, a rare option is one as any other.
    assert run("compress", "digits", "-o", "x.safetensors", "--mixup", "0.5").err.startswith(
        "error: --mixup needs images to fine-tune on"
    )


def test_every_option_tells_its_default() -> None:
    for name, one in OPTIONS:
        if not one.required:
            plain_switch = getattr(one, "is_flag", False) and not one.secondary_opts
            assert bool(default_of(one, name)) is not plain_switch, (name, one.opts)
            if not plain_switch and one.default is None:
                option = max(one.opts, key=len) if one.param_type_name == "option" else one.metavar
                assert {option, f"{name} {option}"} & set(DEFAULTS), f"add {option} to DEFAULTS in tokencut/cli/help.py"
    known = {option for _, one in OPTIONS for option in (*one.opts, one.metavar)} | {"--install-completion"}
    assert {key.rpartition(" ")[2] for key in (*DEFAULTS, *RARE)} - known == {"--show-completion"} & set(DEFAULTS)


def test_defaults_of_a_fine_tune_are_its_recipes() -> None:
    for entry in fields(TrainingRecipe):
        told = DEFAULTS.get("--" + entry.name.replace("_", "-"))
        if told is not None and entry.name != "epochs":
            short, paper = (getattr(recipe, entry.name) for recipe in (SHORT, PAPER))
            first, _, second = told.partition("; paper: ")
            assert type(short)(NONE if short == "" else first) == (short or type(short)(first))
            assert type(paper)(second or first) == paper


def test_help_shows_defaults(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = run("compress", "--help").out
    for text in ("[default: 0.7]", "[default: 4,7,10 of 12]", "[default: bat]", "[default: fp32]", "[default: 64]",
                 "[default: short]"):  # fmt: skip
        assert text in shown
    assert "[default: none]" not in shown
    assert "[default: 0.9,0.7,0.5]" in run("sweep", "--help").out
    assert "[default: deit_tiny]" in run("profile", "--help").out
    assert "[default: none; paper: rand-m9-mmax9-mstd0.5-inc1]" in run("compress", "--help-all").out


def test_the_first_sentence() -> None:
    assert _summary("As .pth or .bin, in (0, 1]. One number, or more.") == "As .pth or .bin, in (0, 1]."
    assert _summary("No end") == "No end"


def test_an_example_too_long_for_the_screen_is_broken_where_a_shell_allows() -> None:
    lines = ["  tokencut compress deit_small --keep 0.7 \\", "      --data /imagenet/val -o out.safetensors"]
    assert list(_example(lines, 80)) == lines
    broken = list(_example(lines, 40))
    assert all(len(line) <= 40 for line in broken)
    assert all(line.endswith(" \\") for line in broken[:-1])
    joined = " ".join(line.strip().removesuffix(" \\") for line in broken)
    assert joined == "tokencut compress deit_small --keep 0.7 --data /imagenet/val -o out.safetensors"
    assert any("--data /imagenet/val" in line for line in broken)
