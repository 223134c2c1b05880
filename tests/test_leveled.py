"""Models with a keep rate for each image: each level is the static model, and what needs one schedule says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import tokencut
from tokencut.cost import total
from tokencut.errors import ArtifactError, UsageError
from tokencut.model import CompressedModel, predicted_gmacs, predicted_macs
from tokencut.models.artifact import load, save
from tokencut.ops.spread import SPREAD_MACS, spread
from tokencut.recipe import Levels, recipe_from_json
from tokencut.runtime.capturing import capture
from tokencut.runtime.compiling import compile_model

LEVELS = Levels((0.3, 0.6, 0.9), (5.0, 20.0), (0.2, 0.5, 0.3))


@pytest.fixture(scope="module")
def model() -> CompressedModel:
    torch.manual_seed(0)
    return tokencut.compress(timm.create_model("test_vit").eval(), levels=LEVELS, layers=[2, 4])


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Plain ones, smooth ones and noise, mixed."""
    chance = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.randn(2, 3, 20, 20, generator=chance), 160, mode="bilinear")
    kinds = torch.cat((torch.zeros(2, 3, 160, 160), smooth, torch.randn(3, 3, 160, 160, generator=chance)))
    return kinds[torch.randperm(7, generator=chance)]


@torch.no_grad()
def test_each_image_gets_what_its_level_gives(model: CompressedModel, images: Tensor) -> None:
    level = model.levels_of(images)
    assert level.tolist() == [int(each >= 5) + int(each >= 20) for each in spread(images)]
    assert set(level.tolist()) == {0, 1, 2}
    logits = model(images)
    for number, keep in enumerate(LEVELS.keeps):
        static = tokencut.compress(model.model, keep=keep, layers=[2, 4])
        torch.testing.assert_close(logits[level == number], static(images[level == number]))
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


def test_levels_share_the_weights(model: CompressedModel) -> None:
    levels = model.at_levels()
    assert [one.recipe.keep for one in levels] == [0.3, 0.6, 0.9]
    assert all(one.model is model.model and one.recipe.levels is None and not one.training for one in levels)
    assert levels[0].at_levels() == [levels[0]]


def test_multiply_adds_are_the_mean_by_shares(model: CompressedModel) -> None:
    each = [total(predicted_macs(one)) for one in model.at_levels()]
    assert predicted_gmacs(model) * 1e9 == pytest.approx(0.2 * each[0] + 0.5 * each[1] + 0.3 * each[2] + SPREAD_MACS)


def test_a_file_keeps_them(model: CompressedModel, images: Tensor, tmp_path: Path) -> None:
    save(model, tmp_path / "levels.safetensors")
    again = load(tmp_path / "levels.safetensors")
    assert again.recipe == model.recipe
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("limits", [5.0], "has 3 rates, 1 limits and 3 shares"),
        ("limits", [20.0, 5.0], "has limits that do not ascend"),
        ("shares", [0.5, 0.5, 0.5], "has shares that do not add up to 1"),
        ("keeps", [0.3, 0.6, 0.8], "has 0.8 as its highest rate, and the schedule keeps 0.9"),
        ("keeps", [0.3, 0.6, 1.8], "levels.keeps[2] is 1.8, not a number in (0, 1]"),
    ],
)
def test_a_file_is_not_believed(model: CompressedModel, field: str, value: list[float], problem: str) -> None:
    data = model.recipe.to_json()
    data["levels"] = {**data["levels"], field: value}
    with pytest.raises(ArtifactError) as error:
        recipe_from_json(data, 6)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, images: model.trace(images),
        lambda model, images: model.forward_features(images),
        lambda model, images: model.forward_intermediates(images),
        lambda model, images: tokencut.profile(model, latency=False),
        lambda model, images: tokencut.features_only(model),
        lambda model, images: tokencut.finetune(model, "digits"),
        lambda model, images: tokencut.export_model(model, "out.onnx"),
        lambda model, images: capture(model, images),
        lambda model, images: compile_model(model),
        lambda model, images: predicted_macs(model),
    ],
)  # fmt: skip
def test_what_needs_one_schedule_says_so(
    model: CompressedModel, images: Tensor, use: Callable[[CompressedModel, Tensor], Any]
) -> None:
    with pytest.raises(UsageError, match=r"`model\.at_levels\(\)\[0\]`"):
        use(model, images)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"levels": Levels((), (), ())}, "has 0 rates"),
        ({"levels": LEVELS, "method": "dyvit"}, "is trained for one schedule"),
        ({"levels": LEVELS, "reduce_by": 8}, "hold keep rates, and `reduce_by` takes their place"),
    ],
)
def test_levels_that_cannot_be(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        tokencut.compress(timm.create_model("test_vit"), **given)
