"""`tokencut visualize`: the file and what is told of it, methods in rows, and every wrong command line."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from outcome import TINY, Run
from PIL import Image

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencut.visualization.drawing.PANEL", 64)


@pytest.fixture
def photo(pictures: Path) -> Path:
    return pictures / "ant" / "1.jpg"


def test_json_names_the_file_and_its_rows(run: Run, compressed: Path, pictures: Path, tmp_path: Path) -> None:
    path, images = tmp_path / "tokens.png", [pictures / "ant" / "1.jpg", pictures / "bee" / "2.jpg"]
    done = run("visualize", compressed, *images, "-o", path, "--json")
    assert (done.code, done.notes) == (0, [])
    assert set(done.json) >= {"output", "model", "width", "height", "rows"}
    assert (done.json["output"], done.json["model"]) == (str(path), str(compressed))
    with Image.open(path) as written:
        assert written.size == (done.json["width"], done.json["height"])
    for row, image in zip(done.json["rows"], images, strict=True):
        assert (row["image"], row["method"], row["keep"], row["layers"]) == (str(image), "bat", 0.5, [2, 4, 5])
        assert [(stage["block"], stage["tokens_in"], stage["tokens_out"]) for stage in row["stages"]] == [
            (2, 16, 8), (4, 8, 4), (5, 4, 2),
        ]  # fmt: skip
        told = run("predict", compressed, image, "--top", "1", "-j", "0", "--json").json["predictions"][0]["top"][0]
        assert (row["predicted"]["label"], row["predicted"]["index"]) == (told["label"], told["index"])
        assert all(stage["merged"] >= 1 and stage["dropped"] == 0 for stage in row["stages"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokens.png"]


def test_people_get_lines(run: Run, compressed: Path, photo: Path, tmp_path: Path) -> None:
    done = run("visualize", compressed, photo, "--method", "evit", "--keep", "0.5", "-o", tmp_path / "t.svg")
    assert done.code == 0
    facts = {line[:15].strip(): line[15:].strip() for line in done.out.splitlines()}
    assert facts["wrote"].startswith(f"{tmp_path / 't.svg'} (")
    assert facts["reduction"] == "evit, keep 0.5, layers 2,4,5"
    assert facts["tokens"] == "16 -> 8 (block 2), 8 -> 4 (block 4), 4 -> 2 (block 5)"
    assert facts["images"] == "1"
    assert facts["taken for"].endswith(f" %): {photo}")
    assert facts["how to read it"].startswith("outlined: merged, one token, in its mean colour; ")
    assert [note.partition(" of ")[0] for note in done.notes] == ["--keep and --method replace the recipe"]
    assert (tmp_path / "t.svg").read_text().startswith("<?xml")


def test_attention_and_what_is_dropped_are_explained(run: Run, photo: Path, tmp_path: Path) -> None:
    words = ("visualize", *TINY, photo, "--method", "topk", "-o", tmp_path / "t.png")
    done = run(*words)
    assert done.out.splitlines()[-1].endswith("plain: a token of one patch; dark: dropped")
    plain = (tmp_path / "t.png").read_bytes()
    done = run(*words, "--attention", "--force")
    assert done.out.splitlines()[-1].endswith("dark: dropped; class attention on tokens that entered, least to most")
    assert (tmp_path / "t.png").read_bytes() != plain


def test_methods_in_rows(run: Run, compressed: Path, photo: Path, tmp_path: Path) -> None:
    words = ("visualize", compressed, photo, "--compare", "bat,bat:preset=paper,topk", "-o", tmp_path / "t.png")
    done = run(*words, "--keep", "0.25", "--layers", "3", "--json")
    assert done.notes == [
        f"the recipe of {compressed} (bat, keep 0.5, layers 2,4,5) does not count: --compare starts from its dense "
        "model"
    ]
    assert [(row["method"], row["keep"], row["layers"]) for row in done.json["rows"]] == [
        ("bat", 0.25, [3]), ("bat:preset=paper", 0.25, [3]), ("topk", 0.25, [3]),
    ]  # fmt: skip
    assert [row["stages"][0]["dropped"] for row in done.json["rows"]] == [0, 0, 12]
    assert "row bat:preset=paper" in run(*words, "--force").out


def test_nothing_reduced_is_noted(run: Run, photo: Path, tmp_path: Path) -> None:
    done = run("visualize", *TINY, photo, "--keep", "1", "-o", tmp_path / "t.png")
    assert (done.code, done.notes[-1]) == (
        0, "nothing is reduced, so there are only the images; type a lower rate, such as --keep 0.5",
    )  # fmt: skip
    assert "how to read it" not in done.out


def test_digits_need_nothing_else(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    done = run("visualize", "digits", "digits", "--keep", "0.5", "-o", tmp_path / "t.png", "--json")
    assert [row["image"].partition("/")[0] for row in done.json["rows"]] == [
        "digits:7", "digits:9", "digits:5", "digits:8",
    ]  # fmt: skip


WRONG = [
    (("deit_tiny",), 2, "missing argument 'IMAGE'; type tokencut visualize --help"),
    (("deit_tiny", "{photo}", "-o", "t.jpg"), 2,
     "t.jpg ends in none of .png, .pdf and .svg, which say what to write; type -o t.png"),
    (("deit_tiny", "{photo}", "-o", "there.png"), 1,
     "there.png exists; add --force to replace it, or give another -o"),
    (("deit_tiny", "there.png", "-o", "there.png", "--force"), 2,
     "there.png is one of the images; give another -o, or leave that image out"),
    (("deit_tiny", "{photo}", "-o", "no/t.png"), 1,
     "cannot write no/t.png: the folder no does not exist; create it first"),
    (("deit_tiny", "none.jpg", "there.png", ".", "{photo}", "-o", "t.png"), 1,
     "3 of 4 images cannot be drawn: 'none.jpg' (does not exist), 'there.png' (not a JPEG, PNG, WEBP, BMP or TIFF "
     "image), '.' (a folder; name the files in it, such as *.jpg); give JPEG, PNG, WEBP, BMP or TIFF files, or the "
     "word digits"),
    (("deit_tiny", "{photo}", "-o", "t.png", "--compare", "bat,evti"), 2, "unknown method 'evti', did you mean evit"),
    (("deit_tiny", "{photo}", "-o", "t.png", "--compare", "bat,bat"), 2,
     "method bat is given twice; type --compare bat"),
    (("deit_tiny", "{photo}", "-o", "t.png", "--compare", "dyvit"), 2,
     "method dyvit means nothing before it is fine-tuned, so it cannot be compared; leave it out of --compare, and "
     "type tokencut eval FILE where its stages are trained"),
    (("deit_tiny", "{photo}", "-o", "t.png", "--compare", "bat", "--method", "evit"), 2,
     "--compare bat names the methods, beside which --method cannot stand; put settings behind colons, as in --compare "
     "bat,bat:preset=paper"),
    (("deit_tiny", "{photo}", "-o", "t.png", "--device", "tpu"), 2,
     "unknown device 'tpu', expected auto, cpu, cuda, cuda:N or mps; type --device auto"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "line"), WRONG, ids=lambda value: str(value))
def test_refused_before_a_model_is_loaded(
    words: tuple[str, ...], code: int, line: str, run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokencut.cli.subject.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    Path("there.png").write_text("before")
    given = [word.replace("{photo}", str(photo)) for word in words]
    done = run("visualize", *given, *([] if "-o" in given else ["-o", "t.png"]))
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"error: {line}")
    assert len(done.err.splitlines()) == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there.png", "before")]


def test_a_bad_reduction_is_refused_with_and_without_compare(run: Run, photo: Path, tmp_path: Path) -> None:
    for more in ((), ("--compare", "bat")):
        done = run("visualize", *TINY, photo, "-o", tmp_path / "t.png", "--keep", "1.5", *more)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: keep 1.5 is not a number in (0, 1]")


def test_trained_stages_are_not_compared(run: Run, photo: Path, tmp_path: Path) -> None:
    path = tmp_path / "dyvit.safetensors"
    assert run("compress", *TINY, "--method", "dyvit", "-o", path).code == 0
    done = run("visualize", path, photo, "--compare", "bat", "-o", tmp_path / "t.png")
    assert (done.code, done.err) == (
        2,
        f"error: {path} was trained for its recipe (dyvit, keep 0.7, layers 2,4,5), which --compare cannot replace; "
        "leave --compare out, or name the original model\n",
    )
    assert run("visualize", path, photo, "-o", tmp_path / "t.png").code == 0


def test_without_matplotlib_one_line_says_what_to_type(
    run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("visualize", "deit_tiny", photo, "-o", tmp_path / "t.png")
    assert (done.code, done.err) == (
        1, "error: pictures need matplotlib, which is not installed; type pip install 'tokencut[plot]'\n",
    )  # fmt: skip


def test_a_picture_in_a_class_folder_is_no_image_of_the_next_run(
    run: Run, compressed: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pictures, tmp_path / "val")
    words = ("eval", compressed, "--data", folder, "-j", "0", "--json")
    before = run(*words).json
    for place in ("ant/tokens.png", "tokens.png"):
        assert run("visualize", compressed, folder / "ant/1.jpg", "-o", folder / place).notes == []
    after = run(*words)
    assert {key: after.json[key] for key in ("images", "top1", "loss")} == {
        key: before[key] for key in ("images", "top1", "loss")
    }  # fmt: skip
    assert "pictures that tokencut wrote passed over: 2 ('ant/tokens.png', 'tokens.png')" in after.notes
