"""`tokencut profile`: the contract's keys, the table, and the options that choose what is measured."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from outcome import TINY, Run
from torch import Tensor

from tokencut.cli.options import RunOptions, TimingOptions
from tokencut.evaluation import accuracy
from tokencut.profiling import measuring
from tokencut.profiling.latency import Timing

KEYS = {
    "model", "method", "keep", "dense", "compressed", "flops_reduction", "speedup", "stages", "device", "precision",
    "batch_size", "versions",
}  # fmt: skip


@pytest.mark.slow
def test_json_has_the_contracts_keys(run: Run) -> None:
    done = run("profile", *TINY, "--keep", "0.5", "--batch-size", "2", "--json")
    report = done.json
    assert done.code == 0
    assert set(report) >= KEYS
    assert (report["method"], report["keep"], report["batch_size"], report["precision"]) == ("bat", 0.5, 2, "fp32")
    for side in ("dense", "compressed"):
        assert set(report[side]) >= {"gmacs", "params", "latency_ms", "images_per_second"}
    assert report["flops_reduction"] == pytest.approx(1 - report["compressed"]["gmacs"] / report["dense"]["gmacs"])
    assert report["stages"][0] == {"block": 2, "tokens_in": 16, "tokens_out": 8}
    assert set(report["versions"]) == {"torch", "timm", "tokencut"}


def test_without_a_model_it_is_deit_tiny_and_nothing_is_downloaded(run: Run) -> None:
    done = run("profile", "--no-latency", "--json")
    assert done.json["model"].startswith("deit_tiny_patch16_224")
    assert done.json["dense"]["gmacs"] == pytest.approx(1.254, rel=1e-3)
    assert done.json["keep"] == 0.7
    assert "latency_ms" not in done.json["dense"]
    assert "costs do not depend on weights, so none are downloaded" in done.notes
    assert "no reduction options given: taking the default, --method bat --keep 0.7" in done.notes


@pytest.mark.usefixtures("short_samples")
def test_people_get_a_table_with_both_sides(run: Run) -> None:
    done = run("profile", *TINY, "--keep", "0.5", "--batch-size", "2")
    assert done.code == 0
    lines = {line.strip().split("  ")[0]: line for line in done.out.splitlines()}
    assert "bat, keep 0.5, layers 2,4,5" in lines["reduction"]
    assert "%" in lines["GMACs per image"]
    assert "±" in lines["latency, ms a batch"]
    assert "x as fast" in lines["latency, ms a batch"]
    assert lines["peak memory, MiB"].endswith("%")
    assert lines["2"].split() == ["2", "16", "8"]
    assert "% of the time is spent in the stages" in done.out


@pytest.mark.slow
def test_by_block_lists_blocks_and_what_is_not_counted(run: Run) -> None:
    words = ("profile", *TINY, "--keep", "0.5", "--no-latency", "--by-block")
    report = run(*words, "--json").json
    assert [row["block"] for row in report["blocks"]] == ["embedding", 1, 2, 3, 4, 5, 6, "head"]
    assert sum(row["macs"] for row in report["blocks"]) == round(report["compressed"]["gmacs"] * 1e9)
    assert "layer_norm" in [operator for group in report["not_counted"].values() for operator in group]
    printed = run(*words).out
    assert "of which stage" in printed
    for group, operators in report["not_counted"].items():
        assert f"not counted, by convention: {group} ({', '.join(operators)})" in printed
    assert "blocks" not in run(*words[:-1], "--json").json


def test_dense_is_the_untouched_model(run: Run, compressed: Path) -> None:
    words = ("profile", compressed, "--no-latency")
    dense = run(*words, "--dense", "--json").json
    assert dense["method"] is None
    assert dense["compressed"]["gmacs"] == dense["dense"]["gmacs"] == run(*words, "--json").json["dense"]["gmacs"]
    printed = run(*words, "--dense").out
    assert "none: the dense model" in printed
    assert "compressed" not in printed.replace(str(compressed), "")


def test_a_file_is_profiled_by_its_own_recipe(run: Run, compressed: Path) -> None:
    done = run("profile", compressed, "--no-latency", "--json")
    assert (done.json["model"], done.json["keep"], done.notes) == (str(compressed), 0.5, [])


def test_options_replace_the_recipe_of_a_file_and_say_so(run: Run, compressed: Path) -> None:
    done = run("profile", compressed, "--no-latency", "--method", "topk", "--layers", "3", "--json")
    assert (done.json["method"], done.json["keep"]) == ("topk", 0.7)
    assert [stage["block"] for stage in done.json["stages"]] == [3]
    assert done.notes == [
        f"--layers and --method replace the recipe of {compressed} (bat, keep 0.5, layers 2,4,5) by topk, keep 0.7, "
        "layers 3"
    ]


def test_reduce_by_has_no_keep(run: Run) -> None:
    report = run("profile", *TINY, "--reduce-by", "2", "--no-latency", "--json").json
    assert report["keep"] is None
    assert [stage["tokens_out"] for stage in report["stages"]] == [14, 12, 10, 8, 6, 4]


@pytest.mark.usefixtures("short_samples")
def test_no_speed_up_is_said_plainly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "speedup", lambda slow, fast: (0.5, (0.4, 0.6)))
    done = run("profile", *TINY, "--keep", "0.5", "--batch-size", "2")
    assert "no speed-up on this machine" in done.out
    assert "0.50 x as fast" in done.out


@pytest.mark.slow
@pytest.mark.usefixtures("short_samples")
def test_captured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("profile", *TINY, "--keep", "0.5", "--batch-size", "1", "--capture")
    assert "images on cpu are not captured: CUDA graphs need an NVIDIA GPU" in run(*words).out.splitlines()
    monkeypatch.setattr(measuring, "_captured", lambda sides, images: (sides, ()))
    done = run(*words)
    assert "batches of 1 in fp32, captured as CUDA graphs" in done.out
    assert "spent in the stages" not in done.out


@pytest.mark.slow
@pytest.mark.usefixtures("short_samples")
def test_what_holds_a_gpu_up_is_said_in_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("profile", *TINY, "--keep", "0.5", "--batch-size", "1")
    for share, sentence in (
        (0.5, r"launch-bound: the GPU works \S+ of \S+ ms a batch, and else waits for kernels to be started; "
              r"type --capture for CUDA graphs \(1.00 times as fast as dense\), or a larger --batch-size"),
        (1.0, "compute-bound: the GPU works all the time, which a lower --keep or --precision bf16 shortens, and "
              "--capture would not"),
    ):  # fmt: skip

        def replayed(sides: object, images: Tensor, observer: object, task: str, share: float = share) -> object:
            timed = Timing(share * 1e-9 if share < 1 else 1e9, (0.0, 0.0), 1.0)
            return {"dense": timed, "compressed": timed}

        monkeypatch.setattr(measuring, "_replayed", replayed)
        assert re.fullmatch(sentence, run(*words).out.splitlines()[-1])


def test_untrained_stages_are_named(run: Run) -> None:
    done = run("profile", *TINY, "--method", "dyvit", "--no-latency")
    assert "the stages of method dyvit are untrained: its cost is true, its accuracy is not" in done.notes


def test_batch_sizes_are_the_librarys() -> None:
    assert TimingOptions().batch_size == measuring.DEFAULT_BATCH_SIZE
    assert RunOptions().batch_size == inspect.signature(accuracy.evaluate).parameters["batch_size"].default
