"""`tokencut compare`: two files, two methods, a model and its dense one; the keys, the table, wrong command lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from outcome import TINY, Run


def test_two_files(run: Run, compressed: Path, pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    assert run("compress", *TINY, "--method", "topk", "--keep", "0.75", "-o", other).code == 0
    done = run("compare", compressed, other, "--data", pictures, "-j", "0", "--json")
    assert done.code == 0
    assert set(done.json) == {
        "data", "images", "first", "second", "difference", "standard_error", "clear", "agreement", "both_right",
        "only_first_right", "only_second_right", "notes", "device", "precision", "versions",
    }  # fmt: skip
    for name, file, method, keep in (("first", compressed, "bat", 0.5), ("second", other, "topk", 0.75)):
        found, alone = done.json[name], run("eval", file, "--data", pictures, "-j", "0", "--json").json
        assert (found["model"], found["method"], found["keep"], found["layers"]) == (str(file), method, keep, [2, 4, 5])
        assert {key: found[key] for key in ("top1", "loss", "gmacs")} == {
            key: alone[key] for key in ("top1", "loss", "gmacs")
        }  # fmt: skip
    assert done.json["difference"] == pytest.approx(done.json["first"]["top1"] - done.json["second"]["top1"])
    assert done.json["images"] == 12


def test_one_model_is_compared_with_its_dense_one(run: Run, compressed: Path, pictures: Path) -> None:
    done = run("compare", compressed, "--data", pictures, "-j", "0")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[:2] == [
        f"first   {compressed} (bat, keep 0.5, layers 2,4,5)", f"second  {compressed}, dense (none: the dense model)",
    ]  # fmt: skip
    assert {line[:16].strip() for line in lines} >= {"GMACs per image", "top-1", "top-5", "loss", "right alone"}
    assert any(line.startswith("difference in top-1  ") and " ± " in line for line in lines)
    assert any(line.startswith("same class") for line in lines)


def test_two_methods_of_one_model_share_its_weights(run: Run, compressed: Path, pictures: Path) -> None:
    words = ("compare", compressed, "--methods", "topk,topk", "--data", pictures, "-j", "0", "--json")
    assert run(*words).code == 2
    done = run(*words[:3], "topk,evit", *words[4:], "--keep", "1.0")
    assert (done.json["first"]["method"], done.json["second"]["method"]) == ("topk", "evit")
    # At keep 1.0 both are the dense model.
    assert done.json["first"]["loss"] == done.json["second"]["loss"]
    assert (done.json["agreement"], done.json["difference"], done.json["clear"]) == (100.0, 0.0, False)
    assert any("does not count: --methods starts from its dense model" in note for note in done.notes)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("a", "b"), "compare needs images; type tokencut compare a b --data DIR, a folder with one sub-folder a class "
                     "or a .tar of one, or try it with tokencut compare digits --data digits"),
        (("a", "b", "--methods", "bat,evit", "--data", "d"),
         "--methods bat,evit are of one model, beside which b cannot stand; leave one out"),
        (("a", "--dense", "--data", "d"),
         "--dense beside one model would compare a with itself; name another one, or leave --dense out"),
        (("a", "--methods", "bat", "--data", "d"),
         "--methods bat is 1 method, and compare takes two, such as --methods bat,tome; for more type tokencut sweep"),
        (("a", "--methods", "bat,evit", "--method", "bat", "--data", "d"),
         "--methods bat,evit names the methods, beside which --method cannot stand; put settings behind colons, as in "
         "--methods bat,bat:preset=paper"),
    ],
)  # fmt: skip
def test_wrong_command_lines(run: Run, words: tuple[str, ...], line: str) -> None:
    done = run("compare", *words)
    assert (done.code, done.out, done.err) == (2, "", f"error: {line}\n")
