"""`tokencut sweep`: the contract's keys and files, what people are shown, and every wrong command line."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
import threading
from pathlib import Path

import pytest
from outcome import TINY, Run

from tokencut.cli.options import RunOptions, SweepOptions
from tokencut.evaluation import accuracy
from tokencut.sweeping import run as sweep
from tokencut.sweeping.run import SweepPlan

needs_matplotlib = pytest.mark.usefixtures("_matplotlib")
KEYS = {"method", "keep", "gmacs", "top1", "top5", "images_per_second"}
QUICK = ("-j", "0", "--no-latency")


@pytest.fixture
def _matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("tokencut.visualization.plots.PNG_DPI", 30)
    monkeypatch.setattr("tokencut.visualization.grid.PANEL", 64)


@pytest.mark.slow
@needs_matplotlib
def test_json_and_files_have_the_contracts_keys(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "TIMING_SECONDS", 0.01)
    folder = tmp_path / "report"
    done = run("sweep", *TINY, "--keep", "0.5/0.5/0.25,0.5", "--methods", "bat,topk", "--data", pictures, "-j", "0",
               "-b", "4", "-o", f"{folder}/", "--json")  # fmt: skip
    assert done.code == 0
    assert set(done.json) >= {"model", "data", "images", "rows"}
    assert (done.json["data"], done.json["images"], done.json["batch_size"]) == (str(pictures), 12, 4)
    rows = done.json["rows"]
    assert all(set(row) >= KEYS and row["images_per_second"] > 0 for row in rows)
    assert [(row["method"], row["keep"]) for row in rows] == [
        ("dense", 1.0), ("bat", [0.5, 0.5, 0.25]), ("topk", [0.5, 0.5, 0.25]), ("bat", 0.5), ("topk", 0.5),
    ]  # fmt: skip
    assert json.loads((folder / "results.json").read_text()) == rows
    assert {path.name for path in folder.iterdir()} == {
        "index.html", "results.csv", "results.json", "state.json", "table.md", "tokens.pdf", "tokens.png",
        "top1-gmacs.pdf", "top1-gmacs.png", "top1-speed.pdf", "top1-speed.png",
    }  # fmt: skip


@pytest.mark.slow
@needs_matplotlib
def test_rows_are_those_of_eval_and_profile(run: Run, pictures: Path, tmp_path: Path) -> None:
    images = ("--data", pictures, "-j", "0", "--limit", "6", "--json")
    same = ("--keep", "0.5", "--layers", "3,5", "--no-prop-attn", *images)
    done = run("sweep", *TINY, "--methods", "evit", *same, "--no-latency", "-o", tmp_path / "report")
    dense, evit = done.json["rows"]
    alone = run("eval", *TINY, "--method", "evit", *same).json
    assert done.json["images"] == 6
    assert {name: evit[name] for name in ("gmacs", "top1", "top5", "loss")} == {
        name: alone[name] for name in ("gmacs", "top1", "top5", "loss")
    }
    assert dense["loss"] == run("eval", *TINY, "--dense", *images).json["loss"]
    assert evit["images_per_second"] is None


@pytest.mark.slow
@needs_matplotlib
def test_people_get_tables_with_differences(run: Run, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    done = run("sweep", *TINY, "--methods", "bat,evit", "--data", pictures, *QUICK, "-o", folder)
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert ["method", "keep", "GMACs", "top-1", "against", "dense"] in lines
    assert [line[:2] for line in lines if line[:1] in (["dense"], ["bat"], ["evit"])][:3] == [
        ["dense", "1.0"], ["bat", "0.9"], ["evit", "0.9"],
    ]  # fmt: skip
    assert ["against", "keep", "0.9", "keep", "0.7", "keep", "0.5", "average"] in lines
    assert "\n\nbat against the others\n" in done.out
    assert "± one standard error" in done.out
    assert done.notes[-1] == (
        f"wrote to {folder}: results.csv, results.json, table.md, index.html, top1-gmacs.png, top1-gmacs.pdf, "
        f"tokens.png, tokens.pdf; open {folder / 'index.html'} in a browser"
    )
    with (folder / "results.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 7


@pytest.mark.slow
@needs_matplotlib
def test_an_interrupted_sweep_says_how_to_go_on(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("sweep", *TINY, "--methods", "topk", "--keep", "0.5", "--data", pictures, *QUICK, "-o", tmp_path / "r")
    judged = 0
    real = accuracy.MetricAccumulator.add

    def add(tally: accuracy.MetricAccumulator, *batch: object) -> None:
        nonlocal judged
        judged += 1
        if judged == 2:
            raise KeyboardInterrupt
        real(tally, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(accuracy.MetricAccumulator, "add", add)
    done = run(*words)
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-2:] == [
        f"note: finished rows are kept in {tmp_path / 'r'}: type the same command again to go on",
        "error: interrupted",
    ]
    done = run(*words)
    assert done.code == 0
    assert f"1 of 2 rows were finished before and are taken from {tmp_path / 'r'}" in done.notes


@pytest.mark.slow
@needs_matplotlib
def test_the_recipe_of_a_file_does_not_count(run: Run, compressed: Path, pictures: Path, tmp_path: Path) -> None:
    done = run("sweep", compressed, "--methods", "topk", "--keep", "0.5", "--data", pictures, *QUICK, "--json",
               "-o", tmp_path / "report")  # fmt: skip
    assert f"the recipe of {compressed} (bat, keep 0.5, layers 2,4,5) does not count: a sweep starts from its dense " \
           "model" in done.notes  # fmt: skip
    dense = run("eval", compressed, "--dense", "--data", pictures, "-j", "0", "--json").json
    assert done.json["rows"][0]["loss"] == dense["loss"]


@needs_matplotlib
def test_a_file_with_trained_stages_is_refused(run: Run, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "dyvit.safetensors"
    assert run("compress", *TINY, "--method", "dyvit", "-o", path).code == 0
    done = run("sweep", path, "--data", pictures, "-o", tmp_path / "report")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: {path} was trained for its recipe (dyvit, keep 0.7, layers 2,4,5), which a sweep cannot replace; type "
        f"tokencut eval {path} --data DIR, or sweep the original model\n"
    )


def test_without_matplotlib_nothing_is_begun(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("tokencut.cli.subject.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    done = run("sweep", *TINY, "--data", pictures, "-o", tmp_path / "report")
    assert (done.code, done.out) == (1, "")
    assert done.err == "error: the plots need matplotlib, which is not installed; type pip install 'tokencut[plot]'\n"
    assert not (tmp_path / "report").exists()


SWEEP = ("sweep", *TINY, "--data", "{pictures}", "-o", "{tmp}/report")
WRONG = [
    (("sweep", "digits", "-o", "r"), 2,
     "sweep needs images; type tokencut sweep digits -o r --data DIR, a folder with one sub-folder a class or a .tar "
     "of one, or try it with tokencut sweep digits -o report --data digits"),
    (("sweep", "digits", "--data", "digits"), 2, "missing option '-o' / '--output'; type tokencut sweep --help"),
    ((*SWEEP, "--method", "bat"), 2, "no such option --method, did you mean --methods? type tokencut sweep --help"),
    ((*SWEEP, "--keep", "0.9,,0.5"), 2,
     "keep nothing is not a number in (0, 1]; it is the fraction of the image tokens that stay, such as "
     "--keep 0.7"),
    ((*SWEEP, "--keep", "0.9,1.5"), 2,
     "keep 1.5 is not a number in (0, 1]; it is the fraction of the image tokens that stay, such as --keep 0.7"),
    ((*SWEEP, "--keep", "0.7,0.70"), 2, "keep 0.7 is given twice; type --keep 0.7"),
    ((*SWEEP, "--keep", "0.7/0.5"), 2,
     "2 keep rates for 3 layers; give one number for all, or one per layer, such as --keep 0.7/0.7/0.7"),
    ((*SWEEP, "--layers", "all"), 2,
     "--layers all needs explicit rates, since 0.5 in so many blocks leaves next to nothing; add --keep 0.97,0.95"),
    ((*SWEEP, "--methods", "bat,bat"), 2, "method bat is given twice; type --methods bat"),
    ((*SWEEP, "--methods", "bat,dyvit"), 2,
     "method dyvit means nothing before it is fine-tuned, so it cannot be compared; leave it out of --methods, and "
     "type tokencut eval FILE where its stages are trained"),
    ((*SWEEP, "--device", "tpu"), 2,
     "unknown device 'tpu', expected auto, cpu, cuda, cuda:N or mps; type --device auto"),
    ((*SWEEP, "--batch-size", "0"), 2,
     "invalid value for '-b' / '--batch-size': 0 is not a whole number from 1 to 65536, such as 64; "
     "type tokencut sweep --help"),
    ((*SWEEP[:-1], "{tmp}/no/report"), 1,
     "cannot write {tmp}/no/report: the folder {tmp}/no does not exist; create it first"),
    ((*SWEEP[:-1], "{pictures}/ant/1.jpg"), 1,
     "cannot make the folder {pictures}/ant/1.jpg: it is a file; move that, or give another name"),
]  # fmt: skip


@needs_matplotlib
@pytest.mark.parametrize(
    ("words", "code", "line"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_wrong_command_line(
    run: Run, tmp_path: Path, pictures: Path, words: tuple[str, ...], code: int, line: str
) -> None:
    def fill(text: str) -> str:
        return text.replace("{tmp}", str(tmp_path)).replace("{pictures}", str(pictures))

    done = run(*map(fill, words))
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines()[-1] == f"error: {fill(line)}"
    assert list(tmp_path.iterdir()) == []


@needs_matplotlib
def test_what_can_be_checked_without_the_model_is(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokencut.cli.subject.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    for wrong in (("--methods", "evti"), ("--keep", "0.5,0.5"), ("--device", "tpu"), ("--data", tmp_path / "none")):
        assert run("sweep", "deit_base", "--data", pictures, "-o", tmp_path / "report", *wrong).code in (1, 2)


@pytest.mark.slow
@needs_matplotlib
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_shows_what_is_running_and_what_is_left(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pty

    ours, theirs = pty.openpty()
    parts: list[bytes] = []

    def read() -> None:
        """Reads all the while: a terminal holds 4 kB, and what is drawn grows with the time that a sweep takes."""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 1 << 16):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "80")
        done = run("sweep", *TINY, "--keep", "0.5", "--methods", "topk", "--data", pictures, *QUICK, "--json",
                   "-o", tmp_path / "report")  # fmt: skip
        assert len(done.json["rows"]) == 2
    reader.join()
    os.close(ours)
    drawn = b"".join(parts).decode()
    assert "sweep of test_vit" in drawn
    assert "topk, keep 0.5 " in drawn
    assert "% top-1  1 row left" in drawn
    assert "24/24" in drawn


def test_defaults_are_the_librarys() -> None:
    assert SweepOptions().arguments() == {}
    assert RunOptions().batch_size == SweepPlan().batch_size
    assert ",".join(map(str, SweepPlan().keeps)) == "0.9,0.7,0.5"
    assert list(dict.fromkeys(variant.label for variant, _ in SweepPlan().pairs())) == ["bat", "evit", "tome"]


def test_options_as_typed_are_read_for_the_plan() -> None:
    typed = SweepOptions(keep="0.9/0.7, 0.5", methods="bat,bat:pairs=0.25", layers="4,7", prop_attn=False)
    assert typed.arguments() == {
        "keeps": [[0.9, 0.7], 0.5], "methods": ["bat", "bat:pairs=0.25"], "layers": [4, 7], "prop_attn": False,
    }  # fmt: skip


def test_help_shows_every_option(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    offered = run("sweep", "--help").out.replace(",", " ").split()
    assert set(offered) >= {
        "--keep", "--methods", "--layers", "--prop-attn", "--data", "--limit", "--workers", "--device", "--precision",
        "--batch-size", "--seed", "--no-latency", "--force", "--output", "--json", "--checkpoint",
    }  # fmt: skip


def test_a_report_among_the_images_is_refused_before_any_work(run: Run, pictures: Path) -> None:
    before = sorted(pictures.rglob("*"))
    done = run("sweep", *TINY, "--methods", "topk", "--keep", "0.5", "--data", pictures, "-o", pictures / "report")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1].startswith(f"error: {pictures / 'report'} would lie among the images of")
    assert sorted(pictures.rglob("*")) == before
