"""Levels for images: found on calibration images, within the mean cost that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

import tokencut
from tokencut.errors import UsageError
from tokencut.model import predicted_gmacs
from tokencut.observers import Observer
from tokencut.search.levels import divergences, find_levels, levels_of
from tokencut.search.report import SearchSettings
from tokencut.search.sorting import Rule

SETTINGS = SearchSettings(images=40, batch_size=20, workers=0, device="cpu")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10).eval()


def test_they_cost_what_was_asked_for(model: nn.Module) -> None:
    pytest.importorskip("sklearn")
    dense = predicted_gmacs(model)
    report = find_levels(model, "digits", 0.8 * dense, most=3, layers=[1, 2], settings=SETTINGS)
    made = tokencut.compress(model, levels=report.levels, layers=[1, 2])
    assert 1 <= len(report.levels.keeps) <= 3
    assert predicted_gmacs(made) == pytest.approx(report.gmacs)
    assert report.gmacs <= 0.81 * dense and report.dense_gmacs == dense
    assert predicted_gmacs(tokencut.compress(model, keep=report.one_rate, layers=[1, 2])) <= 0.8 * dense
    assert (report.images, sum(report.levels.shares)) == (40, pytest.approx(1))


def test_divergences_are_those_of_each_image(model: nn.Module) -> None:
    base, images = tokencut.compress(model, keep=1.0, layers=[1, 2]), torch.randn(3, 3, 160, 160)
    with torch.no_grad():
        found = divergences(base, [base.at(0.3), base.at(1.0)], [images[:2], images[2:]], Observer())
        dense, reduced = model(images).softmax(1), base.at(0.3)(images).softmax(1)
    assert found.shape == (2, 3) and found[1].tolist() == [0, 0, 0]
    expected = (dense * (dense / reduced).log()).sum(1)
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-3, atol=1e-7)


def test_a_search_that_is_told_to_stop_stops(model: nn.Module) -> None:
    class Stopping(Observer):
        def should_stop(self) -> bool:
            return True

    with pytest.raises(KeyboardInterrupt):
        divergences(tokencut.compress(model, keep=1.0), [], [torch.zeros(1, 3, 160, 160)], Stopping())


def test_neighbouring_bins_of_a_level_are_one() -> None:
    rule = Rule(np.array([1.0, 2.0, 3.0]), np.array([0, 0, 2, 2]), 0.0)
    levels = levels_of(rule, (0.3, 0.5, 0.7), np.array([0.0, 1.5, 2.0, 4.0, 5.0]))
    assert (levels.keeps, levels.limits, levels.shares) == ((0.3, 0.7), (2.0,), (0.4, 0.6))


def test_what_cannot_be_had(model: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"keep 0.2 for every image takes .* GMACs, and 0.001 are to be the mean"):
        find_levels(model, "digits", 0.001, settings=SETTINGS)
    few = SearchSettings(images=8, workers=0, device="cpu")
    with pytest.raises(UsageError, match="8 images tell no levels apart, expected at least 32"):
        find_levels(model, "digits", 1.0, settings=few)
