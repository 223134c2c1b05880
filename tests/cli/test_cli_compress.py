"""`tokencut compress`: the file, the figures, and nothing left behind when it does not come to its end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from image_files import greys
from outcome import TINY, Run

from tokencut.models import artifact

WRITTEN = {"output", "model", "method", "keep", "layers", "dense_gmacs", "gmacs"}


def test_json_has_the_contracts_keys_and_the_file_loads(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = run("compress", *TINY, "--keep", "0.9/0.5", "--layers", "2,4", "-o", output, "--json")
    assert done.code == 0
    assert set(done.json) == WRITTEN
    assert done.json["output"] == str(output)
    assert (done.json["method"], done.json["keep"], done.json["layers"]) == ("bat", [0.9, 0.5], [2, 4])
    assert 0 < done.json["gmacs"] < done.json["dense_gmacs"]
    loaded = artifact.load(output)
    assert [(stage.block, stage.tokens_in, stage.tokens_out) for stage in loaded.recipe.stages] == [
        (2, 16, 15),
        (4, 15, 8),
    ]
    timm.create_model("test_vit", img_size=64, num_classes=3, checkpoint_path=output)


def test_every_reduction_option_reaches_the_recipe(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    words = ("--method", "evit", "--method-option", "normalized=true", "--reduce-by", "2", "--prop-attn")
    done = run("compress", *TINY, *words, "-o", output, "--json")
    assert (done.code, done.json["method"], done.json["keep"], done.json["layers"]) == (
        0,
        "evit",
        None,
        [1, 2, 3, 4, 5, 6],
    )
    recipe = artifact.read_info(output).recipe
    assert recipe.schedule.reduce_by == 2
    assert recipe.prop_attn is True
    assert recipe.method_options["normalized"] is True


def test_quantised_weights_are_judged_and_stored(run: Run, tmp_path: Path) -> None:
    images = greys(tmp_path / "set", {"a": [0, 51], "b": [102, 153], "c": [204, 255]})
    output, words = tmp_path / "out.safetensors", ("--keep", "0.5", "--quantize", "int8")
    done = run("compress", *TINY, *words, "--data", images, "-j", "0", "-o", output, "--json")
    assert done.code == 0
    assert set(done.json) == WRITTEN | {
        "quantize", "dense_top1", "top1", "dense_top5", "top5", "images", "top1_before_quantizing", "agreement",
        "quantize_difference", "quantize_standard_error",
    }  # fmt: skip
    assert done.json["top1"] - done.json["top1_before_quantizing"] == pytest.approx(done.json["quantize_difference"])
    info = artifact.read_info(output)
    assert (info.quantized, info.measured["top1"]) == ("int8", done.json["top1"])
    judged = run("eval", output, "--data", images, "-j", "0", "--json")
    assert judged.json["top1"] == done.json["top1"]
    assert "fp32+int8" in run("info", output).out
    again = run("compress", *TINY, *words, "-o", output, "--force")
    assert again.notes[-2] == "nothing was judged: what int8 costs is not known; type --data DIR to measure it"
    assert "int8 in the blocks" in again.out


def test_people_get_lines_with_what_changed(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = run("compress", *TINY, "-o", output)
    assert done.code == 0
    assert done.notes == [
        "test_vit has random weights (seed 0)",
        "no reduction options given: taking the default, --method bat --keep 0.7",
        f"next: tokencut profile {output}, or tokencut eval {output} --data DIR",
    ]
    lines = dict(line.split("  ", 1) for line in done.out.splitlines())
    assert lines["wrote"].strip() == str(output)
    assert lines["reduction"].strip() == "bat, keep 0.7, layers 2,4,5"
    assert "->" in lines["GMACs per image"]


def test_with_data_the_accuracies_are_printed_and_stored(run: Run, tmp_path: Path, pictures: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = run("compress", *TINY, "--keep", "0.5", "--data", pictures, "-j", "0", "-o", output, "--json")
    assert set(done.json) == WRITTEN | {"dense_top1", "top1", "dense_top5", "top5", "images"}
    assert done.json["images"] == 12
    measured = artifact.read_info(output).measured
    assert {name: done.json[name] for name in measured} == measured
    again = run("eval", output, "--data", pictures, "-j", "0", "--json")
    assert again.json["top1"] == done.json["top1"]
    assert (
        run("eval", output, "--dense", "--data", pictures, "-j", "0", "--json").json["top1"] == done.json["dense_top1"]
    )


def test_same_seed_same_bytes_and_another_seed_others(run: Run, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "c")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        assert run("compress", *TINY, "--seed", seed, "-o", file).code == 0
    first, second, third = (file.read_bytes() for file in files)
    assert first == second != third


def test_dtype_halves_the_file(run: Run, tmp_path: Path, compressed: Path) -> None:
    output = tmp_path / "half.safetensors"
    assert run("compress", compressed, "--dtype", "bf16", "-o", output).code == 0
    assert output.stat().st_size < 0.6 * compressed.stat().st_size
    assert artifact.read_info(output).dtype == "bf16"
    assert artifact.read_info(output).recipe == artifact.read_info(compressed).recipe


def test_force_replaces_a_file_and_nothing_else_does(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_text("mine")
    refused = run("compress", *TINY, "-o", output)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == f"error: {output} exists; add --force to replace it, or give another -o\n"
    assert output.read_text() == "mine"
    assert run("compress", *TINY, "-o", output, "--force").code == 0
    assert artifact.read_info(output).architecture == "test_vit"


def test_the_output_is_checked_before_anything_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokencut.cli.subject.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    done = run("compress", "deit_base", "-o", tmp_path / "nowhere" / "out.safetensors")
    assert done.code == 1
    assert "does not exist; create it first" in done.err


def test_a_full_disk_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifact, "save_file", fill)
    output = tmp_path / "out.safetensors"
    done = run("compress", *TINY, "-o", output)
    assert done.code == 1
    assert done.err.splitlines()[-1] == f"error: cannot write {output}: No space left on device; nothing was written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_request_to_end_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def write_half(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), number)

    monkeypatch.setattr(artifact, "save_file", write_half)
    done = run("compress", *TINY, "-o", tmp_path / "out.safetensors")
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


INTERRUPTED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from pathlib import Path
from tokencut.cli.app import main
from tokencut.models import artifact

def write_half(tensors, path, metadata):
    Path(path).write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)

artifact.save_file = write_half
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, "compress", *TINY, "-o", str(tmp_path / "out.safetensors")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 1  # the temporary file
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []
