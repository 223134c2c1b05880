"""A method from outside the package: by decorator, by entry point, and the example that shows both."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from given_inputs import given_input, kept
from torch import nn

import tokencut.methods
from tokencut.cost import total
from tokencut.errors import TokencutError, UsageError
from tokencut.methods import base, make_method, methods
from tokencut.model import compress, predicted_macs

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "custom_method.py"


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Methods registered in a test are forgotten behind it."""
    methods()
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    tokencut.methods._load_all.cache_clear()
    yield
    tokencut.methods._load_all.cache_clear()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=5).eval()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Makes a folder look like an installed package `outside` that declares a method `norm`."""
    (folder / "norm_method.py").write_text(code)
    about = folder / "outside-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[tokencut.methods]\nnorm = norm_method\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "norm_method", raising=False)


def test_a_decorated_method_is_found_by_make_method_and_compress(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="unknown method 'norm'"):
        make_method("norm")
    runpy.run_path(str(EXAMPLE), run_name="norm_method")
    assert "norm" in methods()
    assert make_method("norm", {"largest": "false"}).options() == {"largest": False}
    compressed = compress(model, keep=0.5, layers=[2], method="norm")
    assert compressed.recipe.method_options == {"largest": True}
    with torch.no_grad():
        assert compressed(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    # It says that it reads no attention: the stage costs nothing, and the blocks behind it cost less.
    assert sum(row.stage_macs for row in predicted_macs(compressed)) == 0
    assert total(predicted_macs(compressed)) < total(predicted_macs(compress(model, keep=1.0, method="norm")))


def test_the_examples_method_keeps_the_largest_norms() -> None:
    runpy.run_path(str(EXAMPLE), run_name="norm_method")
    stage_input = given_input([[1.0, 0.0], [0.0, -3.0], [2.0, 2.0], [0.5, 0.5]])
    assert kept(make_method("norm"), stage_input, 2) == [[1, 2]]
    assert kept(make_method("norm", {"largest": False}), stage_input, 2) == [[0, 3]]


def test_an_entry_point_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    install(tmp_path, monkeypatch, EXAMPLE.read_text())
    assert make_method("norm").name == "norm"
    assert compress(model, keep=0.5, layers=[2], method="norm").recipe.method == "norm"


def test_a_package_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "raise ImportError('needs something else')\n")
    with pytest.raises(TokencutError) as caught:
        make_method("bat")
    assert str(caught.value) == (
        "the method 'norm' of the package outside cannot be loaded (needs something else); update it, or type: "
        "pip uninstall outside"
    )


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    code = EXAMPLE.read_text().replace('name = "norm"', 'name = "bat"')
    with pytest.raises(UsageError) as caught:
        runpy.run_path(_written(tmp_path, code), run_name="norm_method")
    assert str(caught.value) == (
        "the method name 'bat' is taken by tokencut.methods.bat.Bat; write another one into "
        "norm_method.LargestNorm, such as name = 'my_bat'"
    )


def _written(folder: Path, code: str) -> str:
    path = folder / "norm_method.py"
    path.write_text(code)
    return str(path)


def test_the_same_class_may_be_registered_again() -> None:
    for _ in range(2):
        runpy.run_path(str(EXAMPLE), run_name="norm_method")
    assert "norm" in methods()


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "block 4: 196 -> 138 image tokens"
    # 0.812 GMACs is DeiT-T at keep 0.7 before any cost of the stages; this method has none.
    assert "0.812 GMACs of 1.254" in out
