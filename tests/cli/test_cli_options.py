"""How options are read: numbers, lists, pairs, and groups spelled out for typer."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import typer
from outcome import Run

from tokencut.cli.app import app
from tokencut.cli.options import (
    ReductionOptions,
    RunOptions,
    TimingOptions,
    read_keep,
    read_layers,
    read_pairs,
    with_groups,
)
from tokencut.errors import UsageError

COMMAND_LINE = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "rates"),
    [("0.7", 0.7), ("1", 1.0), ("1e-2", 0.01), ("0.9/0.7/0.5", [0.9, 0.7, 0.5]), ("0.9/1", [0.9, 1.0])],
)
def test_keep(text: str, rates: float | list[float]) -> None:
    assert read_keep(text) == rates


@pytest.mark.parametrize(
    "text", ["", "/", "0", "-1", "1.0001", "inf", "nan", "0.7/", "x", "0.7 0.5", "0.7;0.5", "0.5,"]
)
def test_keep_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        read_keep(text)


def test_layers() -> None:
    assert read_layers("4, 7,10") == [4, 7, 10]
    assert read_layers("4-7, 10") == [4, 5, 6, 7, 10]
    assert [read_layers(name) for name in ("all", "late", "gradual")] == ["all", "late", "gradual"]
    for text in ("", "4/7", "four", "4,,7", "7-4", "4-", "-4", "4-5-6", "1-99999999"):
        with pytest.raises(UsageError):
            read_layers(text)


def test_pairs() -> None:
    assert read_pairs("--o", ("a=1", "b = x=y"), "a=1") == {"a": "1", "b": "x=y"}
    with pytest.raises(UsageError, match="^--o =1 is not of the form key=value, such as --o a=1$"):
        read_pairs("--o", ("=1",), "a=1")


def test_given_names_what_was_typed() -> None:
    assert ReductionOptions().given() == ()
    assert ReductionOptions(method_option=[]).given() == ()
    assert ReductionOptions(keep="0.5", prop_attn=False, method_option=["a=1"]).given() == (
        "--keep", "--method-option", "--no-prop-attn",
    )  # fmt: skip


def test_arguments_are_those_of_compress() -> None:
    assert ReductionOptions().arguments()["keep"] == 0.7
    assert ReductionOptions(reduce_by=3).arguments()["keep"] is None
    assert ReductionOptions(layers="all", reduce_by=3).arguments()["layers"] == "all"


def test_groups_are_spelled_out_and_put_together_again() -> None:
    seen: dict[str, Any] = {}

    @with_groups
    def command(model: str = "x", *, run: TimingOptions, loud: bool = False) -> None:
        """Does it."""
        seen.update(model=model, run=run, loud=loud)

    assert list(inspect.signature(command).parameters) == [
        "model", "device", "precision", "batch_size", "seed", "loud", "help_all",
    ]  # fmt: skip
    assert command.__doc__ == "Does it."
    command(model="y", device="cpu", precision="bf16", batch_size=3, seed=1, loud=True)
    assert seen == {"model": "y", "run": TimingOptions("cpu", "bf16", 3, 1), "loud": True}
    assert RunOptions().device == "auto"


NUMBERS = {
    (name, parameter.opts[-1])
    for name, command in COMMAND_LINE.items()
    for parameter in command.params
    if parameter.metavar in ("N", "F", "G", "S", "P") and parameter.opts[-1] != "--keep"
}


@pytest.mark.parametrize("text", ["inf", "nan", "1e300", "-1e300", "9" * 400, "9" * 5000, "much"])
def test_no_number_gets_past_its_bounds(text: str) -> None:
    assert {("eval", "--limit"), ("compress", "--mixup"), ("profile", "--target-gmacs")} <= NUMBERS
    for name, option in NUMBERS:
        with pytest.raises(typer.BadParameter) as caught:
            COMMAND_LINE[name].make_context(name, ["digits", f"{option}={text}"])
        assert " is not a" in caught.value.message and ", such as " in caught.value.message
        assert len(caught.value.message) < 200


def test_a_number_out_of_bounds_is_told_before_anything_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencut.cli.subject.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    for words in (("--img-size", "65536"), ("--model-kwargs", "depth=2000"), ("--method-option", "neighbours=1e9")):
        assert run("profile", "deit_tiny", *words).code == 2
    assert run("compress", "deit_tiny", "-o", "x.safetensors", "--lr", "inf").err == (
        "error: invalid value for '--lr': inf is not a number from 1e-12 to 10, such as 5e-05; type tokencut compress "
        "--help\n"
    )
