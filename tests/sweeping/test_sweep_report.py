"""The files of a report: what stands in them, to the letter, and the folders that are refused."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokencut.errors import ArtifactError
from tokencut.evaluation.statistics import Difference
from tokencut.sweeping.page import page
from tokencut.sweeping.picture import SweepPicture
from tokencut.sweeping.report import FILES, SweepReport, markdown
from tokencut.sweeping.rows import Row, compare
from tokencut.sweeping.writing import check_folder, write_report
from tokencut.visualization.drawing import Picture

MARKDOWN = """\
# tiny: top-1 against cost

4 images of val|set; blocks 2,4 reduce; fp32 on a chip; torch 2, timm 1.

| method | keep | GMACs | top-1 | against dense | images/s |
| --- | --- | ---: | ---: | ---: | ---: |
| dense | 1.0 | 4.599 | 75.00 |  | 1,000 |
| bat | 0.5/0.7 | 2.000 | 50.00 | none beyond chance (-25.00 ± 25.00) | 2,000 |
| evit | 0.5/0.7 | 0.1000 | 25.00 | -50.00 ± 0.50 | 3,000 |

Differences are points of top-1, paired over the images, ± one standard error; `none beyond chance` within two. Bars \
in plots are that error.

Images/s: batches of 64, the median of rounds in which all rows took turns.

## bat against the others

| against | keep 0.5/0.7 |
| --- | ---: |
| evit | none beyond chance (+25.00 ± 25.00) |

Positive where bat is ahead.
"""


PICTURE_SECTION = """
## What is left at keep 0.5/0.7

![tokens of each method](tokens.png)

Images: `ant/1.jpg`, `bee/2.jpg`. Merged patches are outlined regions in their mean colour, tokens of one patch as \
they are, dropped dark; regions with one number are one token.
"""


@pytest.fixture
def report() -> SweepReport:
    rows = (
        Row("dense", 1.0, 4.599, 75.0, 100.0, 1000.0, 4, 0.5, (True, True, True, False)),
        Row("bat", (0.5, 0.7), 2.0, 50.0, 100.0, 2000.0, 4, 0.75, (True, True, False, False), Difference(-25.0, 25.0),
            (1900.0, 2100.0)),
        Row("evit", (0.5, 0.7), 0.1, 25.0, 100.0, 3000.0, 4, 1.0, (True, False, False, False), Difference(-50.0, 0.5)),
    )  # fmt: skip
    return SweepReport("tiny", "val|set", 4, rows, compare(rows), (2, 4), "fp32", "a chip", 64,
                       {"torch": "2", "timm": "1"}, ("a note",))  # fmt: skip


def without_speed(report: SweepReport) -> SweepReport:
    return replace(report, rows=tuple(replace(row, images_per_second=None) for row in report.rows))


def test_the_markdown_page(report: SweepReport) -> None:
    assert markdown(report) == MARKDOWN


def test_a_bar_in_a_name_does_not_break_a_table(report: SweepReport) -> None:
    odd = replace(report, rows=(replace(report.rows[0], method="a|b"),), comparisons=())
    assert "| a\\|b | 1.0 |" in markdown(odd)


def test_without_speeds_nothing_is_said_of_them(report: SweepReport) -> None:
    page = markdown(without_speed(report))
    assert "images/s" not in page.lower()
    assert "| bat | 0.5/0.7 | 2.000 | 50.00 | none beyond chance (-25.00 ± 25.00) |" in page


def test_the_json_of_a_report(report: SweepReport) -> None:
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert list(values) == [
        *("model", "data", "images", "layers", "precision", "device", "batch_size", "versions", "notes"),
        *("pictured", "pictured_keep", "rows", "comparisons"),
    ]
    assert values["rows"][1]["keep"] == [0.5, 0.7]
    assert values["comparisons"] == [
        {"first": "bat", "second": "evit", "keep": [0.5, 0.7], "points": 25.0, "points_se": 25.0}
    ]


@pytest.mark.slow
def test_all_files_are_written(report: SweepReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = Picture(np.full((20, 30, 3), 200, np.uint8), (), ())
    pictured = replace(report, pictured=("ant/1.jpg", "bee/2.jpg"), pictured_keep="0.5/0.7")
    write_report(pictured, tmp_path, SweepPicture(picture, pictured.pictured, pictured.pictured_keep))
    assert {path.name for path in tmp_path.iterdir()} == set(pictured.files) == set(FILES)
    assert json.loads((tmp_path / "results.json").read_text()) == [row.to_dict() for row in report.rows]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == MARKDOWN + PICTURE_SECTION
    with Image.open(tmp_path / "tokens.png") as written:
        assert written.size == (30, 20)
    with (tmp_path / "results.csv").open(newline="") as file:
        dense, bat, _ = csv.DictReader(file)
    assert (dense["method"], dense["keep"], dense["to_dense"]) == ("dense", "1.0", "")
    assert (bat["keep"], bat["top1"], bat["images_per_second_low"]) == ("0.5/0.7", "50.0", "1900.0")


@pytest.mark.slow
def test_a_picture_that_no_report_names_goes(report: SweepReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "tokens.png").touch()
    write_report(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(report.files) == set(FILES) - {"tokens.png", "tokens.pdf"}


@pytest.mark.slow
def test_a_plot_of_speeds_that_are_no_more_known_goes(report: SweepReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_report(report, tmp_path)
    write_report(without_speed(report), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(without_speed(report).files)
    assert not (tmp_path / "top1-speed.png").exists()


def test_folders_that_will_do(tmp_path: Path) -> None:
    assert check_folder(tmp_path, force=False) == tmp_path
    assert check_folder(f"{tmp_path}/report/", force=False) == tmp_path / "report"
    (tmp_path / "results.csv").touch()
    assert check_folder(tmp_path, force=True) == tmp_path
    (tmp_path / "state.json").touch()
    assert check_folder(tmp_path, force=False) == tmp_path


def test_a_page_that_is_none_of_ours_is_not_replaced(report: SweepReport, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(page(report, {}, None))
    (tmp_path / "state.json").touch()
    assert check_folder(tmp_path, force=False) == tmp_path
    (tmp_path / "index.html").write_text("<h1>My notes</h1>")
    with pytest.raises(ArtifactError) as caught:
        check_folder(tmp_path, force=False)
    assert str(caught.value) == (
        f"{tmp_path / 'index.html'} is no report of a sweep; add `force=True` to replace it, or give another folder, "
        f"such as `folder='{tmp_path}-2'`"
    )
    assert check_folder(tmp_path, force=True) == tmp_path


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.touch()
    with pytest.raises(ArtifactError) as caught:
        check_folder(path, force=True)
    assert str(caught.value) == f"cannot make the folder {path}: it is a file; move that, or give another name"


def test_the_folder_around_it_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "no" / "report"
    with pytest.raises(ArtifactError) as caught:
        check_folder(path, force=True)
    assert str(caught.value) == f"cannot write {path}: the folder {path.parent} does not exist; create it first"


def test_results_of_unknown_origin_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "table.md").touch()
    with pytest.raises(ArtifactError) as caught:
        check_folder(tmp_path, force=False)
    assert str(caught.value) == (
        f"{tmp_path / 'table.md'} exists, but not the state.json from which a sweep could go on; add `force=True` to "
        f"replace it, or give another folder, such as `folder='{tmp_path}-2'`"
    )


@pytest.mark.parametrize("name", ["", "report"])
def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ArtifactError) as caught:
        check_folder(tmp_path / name, force=False)
    assert str(caught.value) == (f"cannot write {tmp_path / name}: no permission in {tmp_path}; give another folder")
