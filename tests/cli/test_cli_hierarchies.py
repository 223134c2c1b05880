"""Hierarchical models on the command line: their own method, and the window nearest to a keep rate."""

from __future__ import annotations

from pathlib import Path

import pytest
from outcome import Run

SMALL = (
    "swin_tiny", "--no-pretrained", "--img-size", "64", "--num-classes", "10",
    "--model-kwargs", "embed_dim=8,depths=(1,1,4,1),num_heads=(1,1,1,1),window_size=4",
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "method", "told", "nearly_all", "all_of_them"),
    [
        ((), "window", "note: of each 4 x 4 tokens 3 x 3 stay, 0.562 of them, the nearest to --keep 0.5\n", "0.9",
         "note: at --keep 0.9 the nearest to that share of 4 x 4 tokens is all of them, so nothing is reduced; the "
         "next smaller is 3 x 3, --keep 0.56\n"),
        (("--method", "tomesd"), "tomesd",
         "note: the MLPs run for 4 of 16 tokens, which leaves 0.538 of a block's multiply-adds, the near", "0.95",
         "note: at --keep 0.95 the nearest to that share of a block's multiply-adds is all of them, so nothing is "
         "reduced; the next smaller is --keep 0.73\n"),
    ],
)  # fmt: skip
def test_the_nearest_that_there_is_is_told(
    run: Run, tmp_path: Path, options: tuple[str, ...], method: str, told: str, nearly_all: str, all_of_them: str
) -> None:
    small = (*SMALL, *options)
    done = run("compress", *small, "--keep", "0.5", "-o", tmp_path / "out.safetensors", "--json")
    assert told in done.err
    assert (done.json["method"], done.json["layers"]) == (method, [2])
    assert done.json["gmacs"] < done.json["dense_gmacs"]
    whole = run("compress", *small, "--keep", nearly_all, "-o", tmp_path / "whole.safetensors", "--json")
    assert whole.json["gmacs"] == whole.json["dense_gmacs"]
    assert all_of_them in whole.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--method", "tome"), "method tome leaves tokens in no grid, and Swin needs one between its stages; type "
                               "--method window, or leave it out"),
        (("--layers", "2,3"), "layers 2,3 are several, and Swin is reduced once; type the block of its third stage "
                              "where that begins, such as --layers 2"),
        (("--method-option", "reach=-1"),
         "setting reach=-1 of method window is not a whole number from 0 to 1000; the default is reach=2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(run: Run, options: tuple[str, ...], told: str) -> None:
    done = run("profile", *SMALL, "--no-latency", *options)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"error: {told.partition('; the default')[0]}")


@pytest.mark.slow
def test_a_sweep_takes_their_method(run: Run, tmp_path: Path) -> None:
    done = run("sweep", *SMALL, "--keep", "0.5", "--data", "digits", "--limit", "20", "--no-latency", "-j", "0", "-o",
               tmp_path / "report", "--json")  # fmt: skip
    assert [row["method"] for row in done.json["rows"]] == ["dense", "window"]
    drawn = run("visualize", *SMALL, "digits", "--keep", "0.5", "-o", tmp_path / "tokens.png", "--json")
    assert drawn.json["rows"][0]["stages"][0]["tokens_out"] == 9
