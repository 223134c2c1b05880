"""`tokencut eval`: the contract's keys, whose accuracy it is, and what is said of the images."""

from __future__ import annotations

import csv
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
from image_files import picture
from outcome import TINY, Run
from safetensors.torch import save_file

KEYS = {"model", "data", "images", "top1", "top5", "loss", "gmacs", "seconds", "images_per_second"}


def test_json_has_the_contracts_keys(run: Run, compressed: Path, pictures: Path) -> None:
    done = run("eval", compressed, "--data", pictures, "--workers", "0", "--json")
    assert done.code == 0
    assert set(done.json) >= KEYS
    assert (done.json["model"], done.json["data"], done.json["images"]) == (str(compressed), str(pictures), 12)
    assert (done.json["method"], done.json["keep"]) == ("bat", 0.5)
    assert (done.json["layers"], done.json["precision"]) == ([2, 4, 5], "fp32")
    assert "thread" in done.json["device"]
    assert set(done.json["versions"]) == {"torch", "timm", "tokencut"}
    assert done.json["top5"] == 100.0
    assert done.json["gmacs"] == run("profile", compressed, "--no-latency", "--json").json["compressed"]["gmacs"]


def test_a_name_is_compressed_by_default_and_that_is_said(run: Run, pictures: Path) -> None:
    done = run("eval", *TINY, "--data", pictures, "-j", "0")
    assert done.code == 0
    assert "no reduction options given: taking the default, --method bat --keep 0.7" in done.notes
    facts = dict(line.split("  ", 1) for line in done.out.splitlines())
    assert facts["reduction"].strip() == "bat, keep 0.7, layers 2,4,5"
    assert facts["images"].strip() == "12"
    assert facts["top-1"].strip().endswith("%")


def test_dense_leaves_a_model_as_it_is(run: Run, pictures: Path) -> None:
    done = run("eval", *TINY, "--data", pictures, "-j", "0", "--dense", "--json")
    assert (done.json["method"], done.json["keep"]) == (None, 1.0)
    assert done.json["gmacs"] == run("profile", *TINY, "--no-latency", "--json").json["dense"]["gmacs"]


def test_keep_1_is_the_dense_model_to_the_last_digit(run: Run, pictures: Path) -> None:
    words = ("eval", *TINY, "--data", pictures, "-j", "0", "--json")
    assert run(*words, "--keep", "1.0").json["loss"] == run(*words, "--dense").json["loss"]


def test_a_folder_with_a_tokencut_file_is_that_file(run: Run, compressed: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copy(compressed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 3}))
    words = ("--data", pictures, "-j", "0", "--json")
    file, folder = (run("eval", spec, *words).json for spec in (compressed, f"local-dir:{tmp_path}"))
    timed = {"model", "seconds", "images_per_second"}
    assert {name: file[name] for name in file.keys() - timed} == {name: folder[name] for name in file.keys() - timed}
    assert folder["keep"] == 0.5


def test_a_class_map_tells_the_order_of_the_classes(run: Run, pictures: Path, tmp_path: Path) -> None:
    order = tmp_path / "map.txt"
    order.write_text("cat\nant\nbee\n")
    table = tmp_path / "out.csv"
    words = ("eval", *TINY, "--dense", "--data", pictures, "-j", "0", "--predictions", table)
    assert run(*words, "--class-map", order).code == 0
    with table.open(newline="") as file:
        mapped = {(row["label"], row["top1"]) for row in csv.DictReader(file)}
    assert run(*words, "--force").code == 0
    with table.open(newline="") as file:
        natural = {(row["label"], row["top1"]) for row in csv.DictReader(file)}
    # The same logits, under other names.
    renamed = {"ant": "cat", "bee": "ant", "cat": "bee"}
    assert mapped == {(label, renamed[top1]) for label, top1 in natural}


def test_a_checkpoint_tells_what_is_assumed_of_its_images(run: Run, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    made = timm.create_model("test_vit", img_size=64, num_classes=3)
    save_file(dict(made.state_dict()), file)
    words = ("eval", "test_vit", "--img-size", "64", "--num-classes", "3", "--checkpoint", file, "--dense",
             "--data", pictures, "-j", "0", "--json")  # fmt: skip
    done = run(*words)
    cfg = made.pretrained_cfg
    mean, std = (",".join(f"{value:g}" for value in cfg[name]) for name in ("mean", "std"))
    assumed = ("--mean", mean, "--std", std, "--crop-pct", f"{cfg['crop_pct']:g}", "--interpolation", "bicubic")
    assert any(note.startswith(f"{file} does not say how") and " ".join(assumed) in note for note in done.notes)
    again = run(*words, *assumed)
    assert not any("does not say how" in note for note in again.notes)
    assert again.json["loss"] == done.json["loss"] != run(*words, "--mean", "0.1").json["loss"]
    wrong = run(*words, "--std", "a,b")
    assert (wrong.code, wrong.err) == (
        2, "error: --std a,b is no list of numbers joined by commas; type --std 0.229,0.224,0.225\n"
    )  # fmt: skip


def test_predictions_and_limit(run: Run, compressed: Path, pictures: Path, tmp_path: Path) -> None:
    table = tmp_path / "predictions.csv"
    done = run("eval", compressed, "--data", pictures, "-j", "0", "--limit", "6", "--predictions", table)
    assert f"wrote {table}" in done.notes
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert set(rows[0]) == {"path", "label", "top1", "top2", "top3"}


def test_what_was_passed_over_is_noted(run: Run, compressed: Path, pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "val")
    (folder / "ant" / "readme.txt").write_text("not an image")
    for number in range(200):
        picture(number, (8, 8)).save(folder / "bee" / f"more{number}.png")
    (folder / "cat" / "1.jpg").write_bytes(b"\xff\xd8\xff\xe0 truncated")
    done = run("eval", compressed, "--data", folder, "-j", "0", "--json")
    assert done.code == 0
    assert done.json["images"] == 211
    assert [note for note in done.notes if "extension" in note and "'ant/readme.txt'" in note]
    assert [note for note in done.notes if "1 of 212" in note and "'cat/1.jpg'" in note]
    assert done.json["notes"] == done.notes


def test_too_many_unreadable_images_end_it(run: Run, compressed: Path, pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "val")
    (folder / "cat" / "1.jpg").write_bytes(b"\xff\xd8\xff\xe0 truncated")
    done = run("eval", compressed, "--data", folder, "-j", "0", "--json")
    assert (done.code, done.json["exit_code"]) == (1, 1)
    assert "at most 1 % may be" in done.err.splitlines()[-1]


def test_predictions_are_not_replaced_without_force(run: Run, compressed: Path, pictures: Path, tmp_path: Path) -> None:
    table = tmp_path / "precious.csv"
    table.write_text("mine")
    words = ("eval", compressed, "--data", pictures, "-j", "0", "--predictions", table)
    refused = run(*words)
    assert (refused.code, refused.err) == (
        1,
        f"error: {table} exists; add --force to replace it, or give another --predictions\n",
    )
    assert table.read_text() == "mine"
    assert run(*words, "--force").code == 0
    assert table.read_text().startswith("path,label,")


def test_predictions_are_checked_before_the_model_is_loaded(
    run: Run, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokencut.cli.subject.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    done = run("eval", "deit_base", "--data", pictures, "--predictions", tmp_path / "nowhere" / "p.csv")
    assert done.code == 1
    assert "does not exist; create it first" in done.err


def test_a_zip_and_a_list_are_judged_as_the_folder(run: Run, compressed: Path, pictures: Path, tmp_path: Path) -> None:
    files = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.jpg"))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in files:
            archive.write(pictures / name, f"val/{name}")
    (tmp_path / "set.csv").write_text("filename,label\n" + "".join(f"{name},{Path(name).parent}\n" for name in files))
    words = ("eval", compressed, "-j", "0", "--json", "--data")
    folder, packed = run(*words, pictures).json, run(*words, tmp_path / "set.zip").json
    listed = run(*words, tmp_path / "set.csv", "--image-root", pictures).json
    for found in (packed, listed):
        assert {key: found[key] for key in ("images", "top1", "loss")} == {
            key: folder[key] for key in ("images", "top1", "loss")
        }  # fmt: skip
    lost = run("eval", compressed, "-j", "0", "--data", tmp_path / "set.csv")
    assert (lost.code, lost.err.splitlines()[-1]) == (
        1, f"error: 12 of the 12 files in {tmp_path / 'set.csv'} do not exist, such as 'ant/1.jpg', 'ant/2.jpg', "
        "'ant/3.jpg' and 9 more; give the folder that its paths are relative to, --image-root DIR",
    )  # fmt: skip


def test_a_pipe_as_model_or_file_is_refused_at_once(run: Run, compressed: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    pipe = tmp_path / "pipe"
    for words, line in [
        (("info", pipe), f"{pipe} is a pipe, not a file"),
        (("eval", pipe, "--data", "digits"), f"{pipe} is a pipe, not a file"),
        (("eval", compressed, "--data", pipe), f"no images at {str(pipe)!r}: it is a pipe, not a file"),
        (("eval", compressed, "--data", "digits", "--class-map", pipe), f"class map {pipe}: it is a pipe, not a file"),
        (("eval", *TINY, "--checkpoint", pipe, "--data", "digits"), f"the checkpoint {pipe} is a pipe, not a file"),
    ]:
        done = run(*words)
        assert done.code in (1, 2)
        assert line in done.err
