"""`features_only`: a compressed backbone in place of timm's own, and the example that feeds a segmentation head."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from model_files import compressed_model, images
from PIL import Image
from timm.data import resolve_model_data_config
from timm.models._features import FeatureGetterNet
from torch import nn

import tokencut
from tokencut.backbone import features_only
from tokencut.errors import ArtifactError, UsageError

ROW = re.compile(r"^(?P<block>\d+) +(?P<map>\S+) +(?P<patch>\d+) +(?P<similarity>[\d.]+)$", re.MULTILINE)
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "dense_features.py"


def timms(**options: Any) -> nn.Module:
    """timm's backbone of the same architecture."""
    return timm.create_model("test_vit", img_size=64, features_only=True, **options).eval()


@pytest.mark.parametrize("options", [{}, {"out_indices": (1, -2)}, {"out_indices": 2}])
def test_it_describes_itself_as_timms_does(options: dict[str, Any]) -> None:
    got, expected = features_only(compressed_model(), **options), timms(**options)
    assert isinstance(got, FeatureGetterNet) and not got.training
    for question in ("channels", "reduction", "module_name", "get_dicts"):
        assert getattr(got.feature_info, question)() == getattr(expected.feature_info, question)()
    assert (got.out_indices, len(got.feature_info)) == (expected.out_indices, 6)
    assert set(got.pretrained_cfg) == set(expected.pretrained_cfg) and got.in_chans == expected.in_chans == 3
    assert resolve_model_data_config(got) == resolve_model_data_config(expected)
    assert [each.shape for each in got(images())] == [each.shape for each in expected(images())]


def test_maps_of_all_blocks() -> None:
    backbone = features_only(compressed_model(), out_indices=None)
    assert len(backbone(images())) == len(backbone.feature_info) == 6


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("prune", [False, True])
def test_the_maps_are_those_of_the_whole_model(norm: bool, prune: bool) -> None:
    model = compressed_model(method="topk")
    backbone = features_only(model, out_indices=(0, -3), norm=norm, prune=prune)
    with torch.no_grad():
        got = backbone(images())
        expected = model.forward_intermediates(images(), (0, -3), norm=norm, intermediates_only=True)
    assert len(got) == 2 and all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert len(backbone.model.model.blocks) == (4 if prune else 6) and len(model.model.blocks) == 6


def test_with_nothing_reduced_it_is_timms_to_the_bit() -> None:
    dense, model = timms(), compressed_model()
    dense.model.load_state_dict(model.model.state_dict(), strict=False)
    with torch.no_grad():
        got = features_only(tokencut.compress(model.model, keep=1.0))(images())
        assert all(torch.equal(one, other) for one, other in zip(got, dense(images()), strict=True))


def test_features_in_timms_other_format() -> None:
    assert [each.shape for each in features_only(compressed_model(), output_fmt="NLC")(images())] == [(3, 16, 64)] * 3


@pytest.mark.parametrize("unmerge", ["change", "copy"])
def test_it_un_merges_as_it_is_told_and_leaves_the_model_alone(unmerge: str) -> None:
    model = compressed_model()
    backbone = features_only(model, unmerge=unmerge)
    assert (backbone.model.unmerge, model.unmerge) == (unmerge, "change")
    assert features_only(backbone.model, prune=False).model.unmerge == unmerge
    with torch.no_grad():
        expected = model.forward_intermediates(images(), 3, intermediates_only=True, unmerge=unmerge)
        assert all(torch.equal(one, other) for one, other in zip(backbone(images()), expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bat", "topk", "evit"])
def test_it_exports_in_one_graph(method: str) -> None:
    backbone, x = features_only(compressed_model(method=method), norm=True), images()
    with torch.no_grad():
        exported = torch.export.export(backbone, (x,))
        torch.testing.assert_close(exported.module()(x), backbone(x))


def test_pruning_takes_the_stages_behind_the_last_block_with_it() -> None:
    backbone = features_only(compressed_model(method="dyvit"), out_indices=(0, 1))
    assert set(backbone.model.stages) == {"2"}
    assert isinstance(backbone.model.model.norm, nn.Identity) and isinstance(backbone.model.model.head, nn.Identity)
    kept = compressed_model()
    assert kept.prune_intermediate_layers([3, 1], prune_head=False) == [3, 1]
    assert len(kept.model.blocks) == 4 and kept.model.head.out_features == 5 and set(kept.stages) == {"2", "4"}


def test_what_was_pruned_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="would not load again"):
        tokencut.save(features_only(compressed_model()).model, tmp_path / "pruned.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (6,)}, "there is no block 6: this model has blocks 0 to 5 (or -6 to -1, from the end); give "
                                "such as [1, 3, 5]"),
        ({"out_indices": 9, "prune": False}, "9 last blocks cannot be taken of 6; give a number from 1 to 6, such as "
                                             "3, or blocks from 0 on, such as [1, 3, 5]"),
        ({"output_fmt": "NHWC"}, "output_fmt 'NHWC' is not known; give 'NCHW' or 'NLC'"),
        ({"unmerge": "mean"}, "unmerge 'mean' is not known; give 'change' or 'copy'"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_refused_before_anything_is_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        features_only(compressed_model(), **options)
    assert str(caught.value) == message


def test_a_model_that_is_not_compressed_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        features_only(compressed_model().model)
    assert str(caught.value) == (
        "features_only takes a compressed model, and this VisionTransformer is none; type `model = "
        "tokencut.compress(model, keep=0.7)` and then tokencut.features_only(model, ...)"
    )


def test_the_example_on_the_digits(run_script: Callable[..., tuple[str, str]]) -> None:
    pytest.importorskip("sklearn")
    words = "digits --limit 20 --keep 0.5 --method topk --blocks 3 11 --steps 20"
    printed, _ = run_script(EXAMPLE, *words.split())
    assert re.match(r"digits, topk, keep 0.5: 0.0\d+ of 0.0\d+ GMACs; 20 images\n", printed)
    rows = [match.groupdict() for match in ROW.finditer(printed)]
    assert [(row["block"], row["map"], row["patch"]) for row in rows] == [("3", "48x8x8", "4"), ("11", "48x8x8", "4")]
    early, late = (float(row["similarity"]) for row in rows)
    assert 0.5 < late < early < 1
    right = re.search(r"bright pixels: ([\d.]+) % right from the dense model's, ([\d.]+) %", printed)
    assert right and all(60 < float(share) <= 100 for share in right.groups())


def test_the_example_on_a_file_and_a_picture(run_script: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    file, photo = tmp_path / "out.safetensors", tmp_path / "photo.png"
    tokencut.save(compressed_model(), file)
    Image.linear_gradient("L").save(photo)
    printed, _ = run_script(EXAMPLE, file, photo, "--steps", "1")
    assert printed.startswith(f"{file}, bat, keep 0.5: ") and "; 1 images\n" in printed
    assert [match["map"] for match in ROW.finditer(printed)] == ["64x4x4"] * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_vit", "--no-pretrained"], "no image to show test_vit; name one behind it, such as photo.jpg"),
        (["digits", "nix.jpg"], "cannot read nix.jpg (No such file or directory); name an image file, such as "
                                "photo.jpg"),
    ],
)  # fmt: skip
def test_the_example_without_an_image(
    run_script: Callable[..., tuple[str, str]], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script(EXAMPLE, *words)
    assert caught.value.code == f"error: {message}"


def test_the_examples_parts_by_hand() -> None:
    parts = runpy.run_path(str(EXAMPLE))
    pixels = torch.tensor([[0.0, 1.0], [2.0, 9.0]]).expand(1, 3, 2, 2)  # their average is 3
    assert parts["bright_pixels"](pixels).tolist() == [[[0, 0], [0, 1]]]
    one, other = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    maps = [each.T.reshape(1, 2, 2, 1) for each in (one, other)]  # two channels of two patches: alike, and at angles
    assert parts["similarity"](*maps) == 0.5
    assert parts["SegmentationHead"]([2, 2], 5, 8)(maps).shape == (1, 5, 16, 8)
