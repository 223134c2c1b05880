"""How options are read: numbers, lists, pairs, and groups spelled out for typer."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

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
        "--keep", "--method-option", "--prop-attn",
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

    assert list(inspect.signature(command).parameters) == ["model", "device", "precision", "batch_size", "seed", "loud"]
    assert command.__doc__ == "Does it."
    command(model="y", device="cpu", precision="bf16", batch_size=3, seed=1, loud=True)
    assert seen == {"model": "y", "run": TimingOptions("cpu", "bf16", 3, 1), "loud": True}
    assert RunOptions().device == "auto"
