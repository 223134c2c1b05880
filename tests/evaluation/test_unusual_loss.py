"""What counts as out of the ordinary, from results written down by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import timm
from torch import nn

from tokencut import compress
from tokencut.evaluation.accuracy import EvaluationReport
from tokencut.evaluation.unusual_loss import unusual_loss
from tokencut.model import CompressedModel

IMAGES = 400


def report(wrong: int) -> EvaluationReport:
    """A report in which the first images are wrong and all others right."""
    correct = tuple(index >= wrong for index in range(IMAGES))
    top1 = 100 * (IMAGES - wrong) / IMAGES
    return EvaluationReport("m", "d", IMAGES, top1, 100.0, 0.1, None, 1.0, 1.0, correct=correct)


@pytest.fixture(scope="module")
def model() -> CompressedModel:
    return compress(timm.create_model("test_vit", num_classes=3), keep=0.5, layers=[2, 4])


def judging(found: EvaluationReport, asked: list[nn.Module]) -> object:
    def judge(model: nn.Module, name: str) -> EvaluationReport:
        asked.append(model)
        return found

    return judge


def told(
    model: CompressedModel, dense: int, compressed: int, topk: int | None
) -> tuple[str | None, Sequence[nn.Module]]:
    asked: list[nn.Module] = []
    judge = None if topk is None else judging(report(topk), asked)
    return unusual_loss(model, report(dense), report(compressed), judge), asked  # type: ignore[arg-type]


def test_chance_asks_nobody(model: CompressedModel) -> None:
    # 3 of 400 images: 0.75 ± 0.43 points.
    assert told(model, 0, 3, 0) == (None, [])
    assert told(model, 3, 0, 0) == (None, [])


def test_a_clear_loss_that_is_less_than_topks_is_ordinary(model: CompressedModel) -> None:
    loss, asked = told(model, 0, 12, 20)  # 3 points, topk 5
    assert loss is None
    (plain,) = asked
    assert isinstance(plain, CompressedModel)
    assert (plain.recipe.method, plain.recipe.keep, plain.recipe.layers) == ("topk", 0.5, [2, 4])


def test_more_than_topk_loses(model: CompressedModel) -> None:
    # 12 of 400 are 3 points, their standard error 100 * sqrt(0.03 * 0.97 / 399) = 0.85; topk 1 point.
    loss, _ = told(model, 0, 12, 4)
    assert loss == ("the loss is out of the ordinary: 3.00 ± 0.85 points of top-1 on 400 images, where topk, which "
                    "merges nothing, loses 1.00")  # fmt: skip


def test_over_five_points_whatever_topk_loses(model: CompressedModel) -> None:
    loss, _ = told(model, 0, 40, 60)  # 10 points, 100 * sqrt(0.1 * 0.9 / 399) = 1.50
    assert loss == "the loss is out of the ordinary: 10.00 ± 1.50 points of top-1 on 400 images"
    assert told(model, 0, 40, None)[0] == loss


def test_topk_is_not_held_against_itself() -> None:
    topk = compress(timm.create_model("test_vit", num_classes=3), keep=0.5, layers=[2, 4], method="topk")
    assert told(topk, 0, 12, 0) == (None, [])
