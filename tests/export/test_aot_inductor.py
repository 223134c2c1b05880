"""AOTInductor's files: compiled, without paths, and opened only where and when that may be."""

from __future__ import annotations

import importlib
import json
import os
import platform
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import small
from model_files import names_in
from torch import Tensor, nn

from tokencut.errors import ArtifactError, ModelError, TokencutError
from tokencut.export.graph import Graph
from tokencut.export.info import KEY, describe_export
from tokencut.export.run import export_model
from tokencut.export.runtimes import open_exported, runtimes

LIBRARY = "made/data/aotinductor/model/abc.wrapper"
TOLD = {"AOTI_MACHINE": platform.machine(), "AOTI_CPU_ISA": ""}


class Mean(nn.Module):
    """The smallest model that takes images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.mean((2, 3)))
        return logits


@pytest.mark.slow
def test_a_compiled_model_gives_its_logits_for_any_number_of_images(tmp_path: Path) -> None:
    """Compiled for true, as small as can be: it takes 20 s of a processor, most of them torch's headers'."""
    model, path = Mean().eval(), tmp_path / "m.aoti.pt2"
    runtimes()["aoti"].write(Graph(model, describe_export(small(), name="mine")), path)
    assert names_in(tmp_path) == ["m.aoti.pt2"]
    content = path.read_bytes()
    assert str(Path(torch.__file__).parents[1]).encode() not in content
    assert os.fspath(Path.home()).encode() not in content
    opened = open_exported(path)
    assert opened.info.model == "mine"
    assert opened.notes == (f"{path} is machine code, which opening it loads: open only files whose author you trust",)
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for batch in (1, 5):
            torch.testing.assert_close(opened(images[:batch]), model(images[:batch]))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Has torch's compiler only write down what it was given; what the archive tells may be altered."""
    told = dict(TOLD)
    inductor = importlib.import_module("torch._inductor")
    programs: list[Any] = []

    def package(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        assert inductor_configs == {"cpp.dynamic_threads": True}
        programs.append(program)
        with zipfile.ZipFile(package_path, "w") as archive:
            archive.writestr(f"{LIBRARY}.cpp", "compiled by ...")
            archive.writestr(f"{LIBRARY}_metadata.json", json.dumps(told))
            archive.writestr(f"{LIBRARY}.so", b"\x7fELF\0" + torch.__file__.encode() + b"\0end")

    monkeypatch.setattr(inductor, "aoti_compile_and_package", package)
    monkeypatch.setattr(inductor, "aoti_load_package", lambda path: programs[-1].module())
    return told


@pytest.mark.usefixtures("compiled")
@pytest.mark.slow
def test_what_is_kept_of_the_archive(tmp_path: Path) -> None:
    report = export_model(small("topk"), tmp_path / "m.aoti.pt2", limit=4)
    assert report.agreement.largest_difference < 1e-5
    assert report.notes[-1] == "it is machine code, for processors such as this one and this version of torch"
    with zipfile.ZipFile(report.output) as archive:
        assert archive.namelist() == [
            f"{LIBRARY}.cpp", f"{LIBRARY}_metadata.json", f"{LIBRARY}.so", f"made/extra/{KEY}"
        ]  # fmt: skip
        assert archive.read(f"{LIBRARY}.cpp") == b""  # torch finds the others by its name
        library = archive.read(f"{LIBRARY}.so")
    package = torch.__file__.encode()
    assert len(library) == len(b"\x7fELF\0" + package + b"\0end") and package not in library
    assert library.endswith(b"/torch/__init__.py\0end")


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [("AOTI_MACHINE", "pdp11", "pdp11 with "), ("AOTI_CPU_ISA", "AVX512 AVX512_VNNI", "AVX512 AVX512_VNNI, and this")],
)
def test_machine_code_of_another_machine_is_not_loaded(
    key: str, value: str, shown: str, compiled: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.aoti.pt2"
    compiled[key] = value
    runtimes()["aoti"].write(Graph(Mean(), describe_export(small())), path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(
        importlib.import_module("torch._inductor"), "aoti_load_package", lambda _: pytest.fail("loaded it")
    )
    with pytest.raises(ArtifactError, match="was compiled for ") as raised:
        open_exported(path)
    assert shown in str(raised.value) and str(raised.value).endswith("; export the model again here")


def test_somebody_elses_library_and_none(
    compiled: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.aoti.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{LIBRARY}.so", b"\x7fELF")
    with pytest.raises(ArtifactError, match="was not written by tokencut"):
        open_exported(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"made/extra/{KEY}", describe_export(small()).to_text())
    with pytest.raises(ArtifactError, match="it holds no library of AOTInductor's; export the model again$"):
        open_exported(path)


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = importlib.import_module("torch._inductor.cpp_builder")
    kinds = importlib.import_module("torch._inductor.exc")

    def missing() -> str:
        raise kinds.InvalidCxxCompiler()

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    with pytest.raises(TokencutError) as raised:
        export_model(small(), tmp_path / "m.aoti.pt2")
    assert str(raised.value) == (
        f"writing {tmp_path / 'm.aoti.pt2'} needs a C++ compiler, and torch finds none; install g++ or clang++, or "
        "name one in the environment by CXX"
    )


def test_what_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(importlib.import_module("torch._inductor"), "aoti_compile_and_package", fail)
    with pytest.raises(ModelError, match=r"^AOTInductor cannot compile mine \(no such kernel\); type `path='FILE"):
        runtimes()["aoti"].write(Graph(Mean(), describe_export(small(), name="mine")), tmp_path / "m.aoti.pt2")
