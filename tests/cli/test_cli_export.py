"""`tokencut export`, and what `profile` and `eval` make of its files; `--compile`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import TINY, Outcome, Run

from tokencut.cli.app import main
from tokencut.export.runtimes import runtimes
from tokencut.export.runtimes.torch_export import TorchExport

ENDINGS = ", ".join(sorted(kind.suffix for kind in runtimes().values()))

KEYS = {
    "output", "model", "method", "keep", "opset", "dynamic_batch", "batch_size", "with_preprocessing", "gmacs", "bytes",
    "data", "images", "largest_difference", "tolerance", "equal_top1", "notes",
}  # fmt: skip
# One block, which reduces 16 image tokens to 8.
SMALLEST = (*TINY, "--model-kwargs", "depth=1")
REDUCED = (*SMALLEST, "--layers", "1", "--keep", "0.5", "--method", "topk")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "tiny.safetensors"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["compress", *REDUCED, "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def exporting(artifact: Path, pictures: Path) -> Outcome:
    """What the command printed that wrote `exported`."""
    out, err = io.StringIO(), io.StringIO()
    path = artifact.parent / "onnx" / "model.onnx"
    path.parent.mkdir()
    words = ["export", artifact, "-o", path, "--data", pictures, "--limit", "6", "-b", "4", "--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, words)))
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def exported(exporting: Outcome) -> Path:
    """The artifact as .onnx for any number of images, to be read only."""
    return Path(exporting.json["output"])


@pytest.mark.slow
def test_json_has_its_keys(exporting: Outcome, artifact: Path, pictures: Path) -> None:
    done, path = exporting, artifact.parent / "onnx" / "model.onnx"
    assert (done.code, done.notes) == (0, [])
    assert set(done.json) >= KEYS
    assert (done.json["output"], done.json["method"], done.json["keep"]) == (str(path), "topk", 0.5)
    assert (done.json["data"], done.json["images"], done.json["equal_top1"]) == (str(pictures), 6, 100.0)
    assert (done.json["opset"], done.json["dynamic_batch"]) == (20, True)
    assert done.json["bytes"] == path.stat().st_size
    # The name of a file would lead to a path, so the file says which architecture it is.
    assert done.json["model"] == "test_vit"
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]


def test_people_get_lines(run: Run, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    done = run("export", artifact, "-o", path, "--no-dynamic-batch", "-b", "3", "--with-preprocessing", "--opset", "18")
    assert done.code == 0
    facts = dict(line.split("  ", 1) for line in done.out.splitlines())
    assert facts["wrote"].strip().endswith(" MB, ONNX opset 18)")
    assert facts["reduction"].strip() == "topk, keep 0.5, layers 1"
    assert facts["takes"].strip() == "images of 3x64x64, RGB from 0 to 1, 3 at a time"
    assert facts["checked on"].strip() == "64 images (noise)"
    assert facts["equal top-1"].strip() == "100.0 %"
    assert done.notes == [
        "checked on 64 images of noise, since no --data was given",
        f"next: tokencut profile {path}, or tokencut eval {path} --data DIR",
    ]


@pytest.mark.slow
def test_a_name_and_dense(run: Run, tmp_path: Path) -> None:
    done = run("export", *SMALLEST, "--dense", "-o", tmp_path / "m.pt2", "--limit", "2", "--json")
    assert (done.json["method"], done.json["keep"], done.json["opset"]) == (None, 1.0, None)
    assert done.json["model"] == "test_vit"
    assert not [note for note in done.notes if note.startswith("next")]
    opened = run("profile", tmp_path / "m.pt2", "--no-latency", "--json")
    assert opened.json["dense"] == opened.json["compressed"]
    assert opened.notes == [
        f"{tmp_path / 'm.pt2'} may hold code, which opening it runs: open only files whose author you trust"
    ]


def test_a_folder_of_timms(run: Run, artifact: Path, tmp_path: Path) -> None:
    done = run("export", artifact, "-o", tmp_path / "folder", "--format", "timm", "--limit", "2")
    assert done.code == 0
    assert f'next: tokencut eval {tmp_path / "folder"} --data DIR, or timm.create_model("local-dir:' in done.err
    info = run("info", tmp_path / "folder" / "model.safetensors")
    assert run("info", artifact).out.splitlines()[:6] == info.out.splitlines()[:6]
    assert run("profile", tmp_path / "folder", "--no-latency", "--json").json["method"] == "topk"


def test_eval_of_the_file_is_eval_of_the_artifact(run: Run, artifact: Path, exported: Path, pictures: Path) -> None:
    words = ("--data", pictures, "-j", "0", "--json")
    expected, found = run("eval", artifact, *words).json, run("eval", exported, *words).json
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name in ("top1", "top5", "images", "gmacs", "method", "keep", "data"):
        assert found[name] == expected[name], name
    assert found["model"] == str(exported)
    assert set(found["versions"]) - set(expected["versions"]) == {"onnxruntime"}
    both = run("compare", artifact, exported, *words).json
    assert (both["agreement"], both["versions"]) == (100.0, found["versions"])


@pytest.mark.usefixtures("short_samples")
def test_profile_of_the_file(run: Run, artifact: Path, exported: Path, tmp_path: Path) -> None:
    alone = run("profile", exported, "--no-latency", "--json").json
    expected = run("profile", artifact, "--no-latency", "--json").json
    assert alone["speedup"] is None
    assert alone["stages"] == expected["stages"]
    assert alone["compressed"]["gmacs"] == expected["compressed"]["gmacs"]
    printed = run("profile", exported, "--no-latency")
    assert "x as fast" not in printed.out
    assert "topk, keep 0.5, layers 1" in printed.out
    dense = tmp_path / "dense.onnx"
    assert run("export", artifact, "--dense", "-o", dense, "--limit", "2", "--no-dynamic-batch", "-b", "1").code == 0
    beside = run("profile", exported, "--dense-file", dense, "-b", "1")
    assert "x as fast" in beside.out
    assert "onnxruntime" in beside.out


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--keep", "0.5"), "--keep"),
        (("--dense",), "--dense"),
        (("--by-block",), "--by-block"),
        (("--checkpoint", "w.pth"), "--checkpoint"),
        (("--no-pretrained",), "--no-pretrained"),
        (("--num-classes", "3", "--img-size", "32"), "--num-classes and no --img-size"),
        (("--model-kwargs", "depth=1"), "--model-kwargs"),
        (("--compile",), "--compile"),
        (("--capture",), "--capture"),
        (("--precision", "bf16"), "--precision bf16"),
        (("--device", "cuda"), "--device cuda"),
    ],
)
def test_what_is_fixed_in_the_file(run: Run, exported: Path, words: tuple[str, ...], option: str) -> None:
    done = run("profile", exported, *words)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: {exported} is exported, so onnxruntime runs it as it is, on the CPU in fp32, and it takes no "
        f"{option}; leave that out, or name the model that it came from\n"
    )


def test_a_dense_file_is_for_a_file(run: Run, artifact: Path, exported: Path) -> None:
    done = run("profile", artifact, "--dense-file", exported)
    assert (done.code, done.err) == (
        2,
        f"error: --dense-file is for a MODEL that is an exported file, and {artifact} is none; leave it out\n",
    )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("-o", "m.bin"), 2, f"m.bin ends in none of {ENDINGS}, which say what to write; type -o m.onnx, or "
         "--format timm for a folder"),
        (("-o", "m", "--format", "timm", "--with-preprocessing"), 2,
         "--with-preprocessing is for files of one graph, such as .onnx, and a folder of timm's holds none; leave it "
         "out"),
        (("-o", "m", "--format", "timm", "--no-dynamic-batch"), 2,
         "--no-dynamic-batch is for files of one graph, such as .onnx, and a folder of timm's holds none; leave it "
         "out"),
        (("-o", "m.onnx", "--opset", "9"), 2,
         "invalid value for '--opset': 9 is not a whole number from 18 to 22, such as 20; type tokencut export --help"),
        (("-o", "m.pt2", "--opset", "18"), 2, "--opset is for .onnx files, and m.pt2 is none; leave it out"),
        (("-o", "there.onnx"), 1, "there.onnx exists; add --force to replace it, or give another -o"),
        (("-o", "no/m.onnx"), 1, "cannot write no/m.onnx: the folder no does not exist; create it first"),
        (("-o", "m.onnx", "--data", "none"), 1,
         "no images at 'none': it does not exist; expected a folder with one sub-folder a class, a .tar, .tar.gz or "
         ".zip of one, a .csv list of images, or the word digits"),
    ],
)  # fmt: skip
def test_refused_before_a_model_is_loaded(
    words: tuple[str, ...], code: int, message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokencut.cli.subject.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    Path("there.onnx").write_text("before")
    done = run("export", "deit_base", *words)
    assert (done.code, done.out, done.err) == (code, "", f"error: {message}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


def test_missing_packages_are_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    done = run("export", *TINY, "-o", tmp_path / "m.onnx")
    assert (done.code, done.err) == (
        1,
        f"error: writing {tmp_path / 'm.onnx'} needs onnxscript, which is not installed; type pip install "
        "'tokencut[onnx]'\n",
    )


def test_a_file_that_differs_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchExport, "write", lambda self, graph, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(TorchExport, "open", lambda *_: lambda images: torch.zeros(images.shape[0], 3) + 9)
    done = run("export", *REDUCED, "-o", tmp_path / "m.pt2", "--limit", "2")
    assert (done.code, done.out) == (1, "")
    assert "would not give the model's logits: 2 of 2 images differ" in done.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes `torch.compile` do nothing, and tell in which mode it was called."""
    met: list[str] = []

    def compiler(model: Any, *, mode: str, **_: object) -> Any:
        met.append(mode)
        return model

    monkeypatch.setattr(torch, "compile", compiler)
    return met


@pytest.mark.usefixtures("short_samples")
def test_profile_compiled(run: Run, artifact: Path, modes: list[str]) -> None:
    done = run("profile", artifact, "-b", "1", "--compile-mode", "reduce-overhead")
    assert (done.code, modes) == (0, ["reduce-overhead", "reduce-overhead"])
    assert "batches of 1 in fp32, compiled (reduce-overhead)" in done.out
    assert "spent in the stages" not in done.out


def test_eval_compiled(run: Run, artifact: Path, pictures: Path, modes: list[str]) -> None:
    words = ("eval", artifact, "--data", pictures, "-j", "0", "--json")
    done = run(*words, "--compile")
    assert (modes, done.notes[-1]) == (["default"], "the time includes compiling the model")
    assert done.json["top1"] == run(*words).json["top1"]


def test_eval_captured(run: Run, artifact: Path, pictures: Path) -> None:
    words = ("eval", artifact, "--data", pictures, "-j", "0", "--device", "cpu", "--json")
    done = run(*words, "--capture")
    assert "images on cpu are not captured: CUDA graphs need an NVIDIA GPU" in done.notes
    assert done.json["top1"] == run(*words).json["top1"]


def test_an_unknown_compile_mode(run: Run, artifact: Path, pictures: Path) -> None:
    for words in (("profile", artifact), ("eval", artifact, "--data", pictures)):
        done = run(*words, "--compile-mode", "fast")
        assert done.code == 2
        assert "unknown compile mode 'fast', expected one of default, reduce-overhead, max-autotune" in done.err


@pytest.mark.slow
def test_a_quantised_file_is_told_of_and_may_stand_as_model(
    run: Run, artifact: Path, pictures: Path, tmp_path: Path
) -> None:
    path = tmp_path / "int8.onnx"
    done = run("export", artifact, "-o", path, "--quantize", "int8", "--data", pictures, "--limit", "6",
               "--allow-drop", "100")  # fmt: skip
    assert done.code == 0
    facts = dict(line.split("  ", 1) for line in done.out.splitlines())
    assert facts["int8"].strip().startswith("ranges taken in each forward; ")
    assert facts["top-1 in int8"].strip().endswith(f" points) on 6 images ({pictures})")
    assert facts["the same class"].strip().endswith(" % of them")
    profiled = run("profile", path, "--no-latency", "--json")
    assert (profiled.json["precision"], profiled.json["method"]) == ("int8", "topk")
    judged = run("eval", path, "--data", pictures, "--limit", "6", "-j", "0", "--json")
    assert f"-> {judged.json['top1']:.2f} %" in facts["top-1 in int8"]
