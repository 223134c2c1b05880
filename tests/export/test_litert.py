"""LiteRT's files, as far as they can be tried without its packages, which are large."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from export_models import small

from tokencut.errors import ArtifactError, TokencutError
from tokencut.export.run import export_model
from tokencut.export.runtimes import open_exported, runtimes
from tokencut.runtime import extras


def test_it_needs_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("began"))
    path = tmp_path / "m.tflite"
    with pytest.raises(TokencutError) as raised:
        export_model(small("topk"), path)
    assert str(raised.value) == (
        f"writing {path} needs litert_torch and ai_edge_litert, which are not installed; type pip install "
        "'tokencut[litert]'"
    )
    path.write_bytes(b"")
    with pytest.raises(TokencutError, match=r"running .* needs ai_edge_litert, which is not installed; type pip"):
        open_exported(path)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: object())
    for name in ("ai_edge_litert", "ai_edge_litert.interpreter"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert importlib.import_module("ai_edge_litert.interpreter")
    path = tmp_path / "m.tflite"
    for content in (b"", b"no model", b"TFL3 too early"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"^LiteRT cannot load .*m\.tflite \(it is no \.tflite file\); export"):
            open_exported(path)


def test_it_takes_one_image_where_nothing_is_said() -> None:
    assert {kind.name for kind in runtimes().values() if kind.one_batch} == {"litert", "coreml"}
