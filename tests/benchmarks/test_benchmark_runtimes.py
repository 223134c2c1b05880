"""The scripts that run exported files in their runtimes and in a browser, and the page that shows tokens.

What runs a runtime is a process of its own: thread pools of several runtimes in one process outlive what used them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import runtimes
import torch
from export_models import normalised, pixels, small
from image_files import write_folder

import tokencut
from tokencut.errors import TokencutError

EXAMPLES = Path(browser.__file__).parents[1]
# Runs a file on images and keeps all that it gives.
RUN = """
import sys
import numpy
import onnxruntime

model, given, found = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
made = session.run(None, {"images": numpy.load(given)})
numpy.savez(found, **dict(zip([output.name for output in session.get_outputs()], made, strict=True)))
"""


def printed(*words: object) -> str:
    """What a process of Python's printed."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.slow
def test_files_are_compared_and_timed(tmp_path: Path) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(name)
    folder, table = write_folder(tmp_path / "val", ["ant", "bee"], images=2), tmp_path / "table.md"
    words = ["test_vit", "--no-pretrained", "--data", folder, "--methods", "first", "--keep", "0.5",
             "--batch-size", "3", "--kinds", "onnx", "openvino-onnx", "--rounds", "3", "-o", table]  # fmt: skip
    assert printed(EXAMPLES / "benchmarks/run.py", "runtimes", *words).startswith("test_vit, ")
    rows = [line.split(" | ") for line in table.read_text().splitlines() if line.startswith("| ")]
    compared = {(row[0].strip("| "), row[1]): row[-1].strip("| ") for row in rows if len(row) == 6}
    assert compared[("onnx", "first 0.5")] == compared[("openvino-onnx", "dense")] == "yes"
    kept = {(row[0].strip("| "), row[1]): row[-1].strip("| ") for row in rows if len(row) == 7}
    assert len(kept) == 1 + 2 * 2 and kept[("onnx", "dense")] == "1.00"


def test_unknown_kinds_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["runtimes", "digits", "--data", "digits", "--kinds", "onyx", "onnx"])
    with pytest.raises(SystemExit):
        runtimes.parse()
    assert "unknown kinds onyx, expected some of aoti, " in capsys.readouterr().err


@pytest.mark.slow
def test_the_pages_file_tells_where_patches_went(tmp_path: Path) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    model = small("bat")
    tokencut.save(model, tmp_path / "model.safetensors")
    printed(EXAMPLES / "browser/make.py", tmp_path / "model.safetensors", "--folder", tmp_path)
    told = json.loads((tmp_path / "model.json").read_text())
    assert told["stages"] == [{"output": "stage1", "block": 1, "tokens": 8}]
    images = pixels(1)
    with torch.no_grad():
        expected, traces = model.trace(normalised(model, images))
        dense = model.model(normalised(model, images))
    np.save(tmp_path / "images.npy", (images / 255).numpy())
    found = {}
    for name in ("compressed", "dense"):
        printed("-c", RUN, tmp_path / f"{name}.onnx", tmp_path / "images.npy", tmp_path / f"{name}.npz")
        found[name] = np.load(tmp_path / f"{name}.npz")
    torch.testing.assert_close(torch.from_numpy(found["compressed"]["logits"]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(found["dense"]["logits"]), dense, rtol=1e-4, atol=1e-5)
    assert found["dense"].files == ["logits"] and traces[0].tokens.source is not None
    assert torch.equal(torch.from_numpy(found["compressed"]["stage1"]).long(), traces[0].tokens.source)


class StandIn:
    """In place of the browser's process: it fetches the runner, and answers as its page would."""

    posted = ""

    def __init__(self, words: list[str], **_: Any) -> None:
        self.address, self.ended = words[-1], False
        self.thread = threading.Thread(target=self.look)
        self.thread.start()

    def look(self) -> None:
        assert b"index.html" in urllib.request.urlopen(self.address).read()
        if self.posted:
            urllib.request.urlopen(self.address.replace("runner.html", "found"), data=self.posted.encode())

    def terminate(self) -> None:
        self.ended = True

    def wait(self) -> None:
        assert self.ended
        self.thread.join()


@pytest.mark.slow
def test_what_the_browser_found_is_had_and_it_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runner.html").write_text(browser.RUNNER)
    monkeypatch.setattr(browser.subprocess, "Popen", StandIn)
    monkeypatch.setattr(StandIn, "posted", '{"files": {"a": 1}}')
    assert browser.browsed(tmp_path, "browser", 50) == {"files": {"a": 1}}
    monkeypatch.setattr(StandIn, "posted", '{"error": "Error: no model"}')
    with pytest.raises(TokencutError, match="^the page failed: Error: no model$"):
        browser.browsed(tmp_path, "browser", 50)
    monkeypatch.setattr(StandIn, "posted", "")
    with pytest.raises(TokencutError, match=r"told nothing within 0\.5 s; type more --seconds"):
        browser.browsed(tmp_path, "browser", 0.5)


def test_a_page_that_shows_other_tokens_is_refused() -> None:
    model = small()
    page = {"captions": ["what the model sees", "behind block 1: 8 tokens"], "rows": 2}
    browser._check_page(page, model)
    with pytest.raises(TokencutError, match="expected .'behind block 1: 8 tokens'. under two rows"):
        browser._check_page({**page, "captions": ["what the model sees", "behind block 1: 9 tokens"]}, model)
