"""`tokencut predict`: the contract's keys, the table people get, the file, and wrong command lines."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from outcome import TINY, Run


def test_json_tells_each_image_and_how_it_was_run(run: Run, compressed: Path, pictures: Path) -> None:
    done = run("predict", compressed, pictures / "ant", pictures / "bee/2.jpg", "--top", "2", "-j", "0", "--json")
    assert done.code == 0
    assert set(done.json) == {
        "model", "images", "predictions", "unreadable", "seconds", "notes", "method", "keep", "layers", "device",
        "precision", "versions",
    }  # fmt: skip
    assert (done.json["model"], done.json["images"]) == (str(compressed), 5)
    assert (done.json["method"], done.json["keep"], done.json["layers"]) == ("bat", 0.5, [2, 4, 5])
    assert [one["image"] for one in done.json["predictions"]] == [
        *(str(pictures / f"ant/{number}.jpg") for number in (1, 2, 3, 4)), str(pictures / "bee/2.jpg"),
    ]  # fmt: skip
    for one in done.json["predictions"]:
        first, second = one["top"]
        assert first["probability"] >= second["probability"] > 0
        assert first["label"] == str(first["index"])


def test_people_get_a_table(run: Run, pictures: Path) -> None:
    photo = pictures / "ant/1.jpg"
    done = run("predict", *TINY, photo, "--dense", "-j", "0")
    assert done.code == 0
    lines = [line for line in done.out.splitlines() if line.strip()]
    assert lines[0].split() == ["image", "class", "probability"]
    assert len(lines) == 2 + 3
    assert lines[2].split()[0] == str(photo)
    shares = [float(line.split()[-2]) for line in lines[2:]]
    assert sum(shares) == pytest.approx(100, abs=0.02)
    assert done.notes[-1:] == ["the model has no label names, so classes are numbers, the first of which is 0; give a "
                          "--class-map"]  # fmt: skip


def test_a_table_is_never_replaced_without_force(run: Run, compressed: Path, pictures: Path, tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    words = ("predict", compressed, pictures, "-j", "0", "--top", "1", "-o", table)
    done = run(*words)
    assert (done.code, done.out) == (0, "")
    assert done.notes[-1] == f"wrote {table}: 12 images"
    with table.open(newline="") as file:
        assert [list(row) for row in csv.DictReader(file)] == [["path", "top1", "probability1"]] * 12
    table.write_text("mine")
    refused = run(*words)
    assert (refused.code, refused.err) == (1, f"error: {table} exists; add --force to replace it, or give another -o\n")
    assert table.read_text() == "mine"
    assert run(*words, "--force").code == 0


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("deit_tiny",), 2, "missing argument 'IMAGE'; type tokencut predict --help"),
        (("deit_tiny", "none.jpg"), 1,
         "cannot read 'none.jpg' (does not exist); give JPEG, PNG, WEBP, BMP or TIFF files, or the word digits, or "
         "folders of them"),
        (("deit_tiny", "none.jpg", "--top", "0"), 2,
         "invalid value for '--top': 0 is not a whole number from 1 to 1000000, such as 5; type tokencut predict "
         "--help"),
        (("deit_tiny", "none.jpg", "-o", "p.txt"), 2,
         "-o p.txt does not end in .csv, and predictions are written as CSV; type -o p.csv"),
        (("deit_tiny", "none.jpg", "-o", "no/p.csv"), 1,
         "cannot write no/p.csv: the folder no does not exist; create it first"),
    ],
)  # fmt: skip
def test_wrong_command_lines_end_before_a_model_is_loaded(
    run: Run, words: tuple[str, ...], code: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokencut.cli.subject.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    done = run("predict", *words)
    assert (done.code, done.out, done.err) == (code, "", f"error: {line}\n")
