"""`tokencut models` and `tokencut info`: what works, and what a file holds."""

from __future__ import annotations

from pathlib import Path

from outcome import Run
from safetensors import safe_open
from safetensors.torch import save_file

from tokencut.methods import methods


def test_models_lists_names_by_pattern(run: Run) -> None:
    done = run("models", "deit_t")
    assert done.code == 0
    rows = [line.split() for line in done.out.splitlines() if "deit" in line]
    assert ["deit_tiny_patch16_224", "deit_tiny", "224x224", "bat", "fb_in1k", "apache-2.0"] in rows
    assert {row[0] for row in rows} == {"deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"}


def test_models_as_json(run: Run) -> None:
    every = run("models", "--json").json["models"]
    assert len(every) >= 335
    some = run("models", "vit_*_dinov2", "--json").json["models"]
    assert {"vit_small_patch14_dinov2", "vit_base_patch14_dinov2"} <= {model["name"] for model in some}
    assert set(some[0]) == {"name", "alias", "family", "tags", "input_size", "licence", "method"}


def test_methods_come_with_source_settings_and_defaults(run: Run) -> None:
    described = {method["name"]: method for method in run("models", "--methods", "--json").json["methods"]}
    assert set(described) == set(methods())
    assert described["bat"]["source"] == "arXiv 2211.11315"
    for name, method in methods().items():
        assert {s["name"]: s["default"] for s in described[name]["settings"]} == method().options()
        assert all(setting["help"] for setting in described[name]["settings"])
    printed = run("models", "--methods").out
    for name, method in methods().items():
        assert f"{name}  ({method.source}; proportional attention" in printed
        assert all(option in printed for option in method().options())


def test_info_prints_metadata_and_tensors(run: Run, compressed: Path) -> None:
    done = run("info", compressed)
    assert (done.code, done.err) == (0, "")
    facts = {line.split("  ")[0]: line for line in done.out.splitlines()}
    assert facts["architecture"].endswith("test_vit")
    assert facts["keep"].endswith(" 0.5")
    assert facts["layers"].endswith(" 2,4,5")
    assert "fp32" in facts["tensors"]
    assert "random seed 0" in facts["weights from"]
    assert [line.split() for line in done.out.splitlines()][-3:] == [["2", "16", "8"], ["4", "8", "4"], ["5", "4", "2"]]


def test_info_as_json_is_the_files_own_metadata(run: Run, compressed: Path) -> None:
    found = run("info", compressed, "--json").json
    assert found["architecture"] == "test_vit"
    assert found["recipe"]["keep"] == 0.5
    assert set(found["measured"]) == {"dense_gmacs", "gmacs"}
    assert found["tensors"]["dtype"] == "fp32"
    assert found["tensors"]["bytes"] == compressed.stat().st_size


def test_info_says_that_weights_are_no_numbers(run: Run, compressed: Path, tmp_path: Path) -> None:
    assert run("info", compressed, "--json").json["tensors"]["not_finite"] == []
    with safe_open(compressed, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata()
    tensors["head.weight"][0, 0] = float("nan")
    tensors["blocks.1.norm1.weight"][3] = float("inf")
    save_file(tensors, broken := tmp_path / "broken.safetensors", metadata=metadata)
    done = run("info", broken)
    assert (done.code, done.notes) == (
        0, ["the weights cannot be used: 2 with numbers that are not finite: blocks.1.norm1.weight, head.weight; "
            "compress a model with other weights"],
    )  # fmt: skip
    found = run("info", broken, "--json")
    assert found.json["tensors"]["not_finite"] == ["blocks.1.norm1.weight", "head.weight"]
    refused = run("eval", broken, "--data", "digits")
    assert (refused.code, refused.err) == (
        1, f"error: cannot load {broken}: its weights cannot be used: 2 with numbers that are not finite: "
        "blocks.1.norm1.weight, head.weight; compress a model with other weights\n",
    )  # fmt: skip
