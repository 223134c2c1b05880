"""What eight bits may cost: paired over the images, and refused beyond what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokencut.errors import ArtifactError
from tokencut.evaluation.accuracy import EvaluationReport
from tokencut.evaluation.quantized import quantized_beside

TARGET = Path("out.safetensors")


def report(predicted: str, truth: str = "0000111122") -> EvaluationReport:
    correct = tuple(said == true for said, true in zip(predicted, truth, strict=True))
    top1 = 100 * sum(correct) / len(truth)
    return EvaluationReport(
        "m", "d", len(truth), top1, top1, 0.0, None, 1.0, 1.0, correct=correct, numbers=tuple(range(len(truth))),
        predicted=tuple(map(int, predicted)),
    )  # fmt: skip


def test_the_difference_is_paired_and_agreement_counts_wrong_answers_too() -> None:
    # The fourth image is lost and the last one won; of the fifth both say the same wrong class.
    found = quantized_beside(
        report("0000211120"), report("0001211122"), kind="int8", allowed=1.0, target=TARGET
    )  # fmt: skip
    assert found.difference.points == 0.0
    assert found.difference.standard_error == pytest.approx(100 * (2 / 9) ** 0.5 / 10**0.5)
    assert found.agreement == 80.0


def test_more_than_is_allowed_is_refused() -> None:
    plain, quantized = report("0000111122"), report("0000111100")
    assert quantized_beside(plain, quantized, kind="fp8", allowed=20.0, target=TARGET).difference.points == -20.0
    with pytest.raises(ArtifactError) as caught:
        quantized_beside(plain, quantized, kind="fp8", allowed=19.9, target=TARGET)
    assert str(caught.value) == (
        "fp8 costs 20.00 ± 13.33 points of top-1 on 10 images (100.00 to 80.00 %), and 19.9 are allowed, so "
        "out.safetensors was not written; type `allow_drop=20.1` to have it all the same, or leave out `quantize`"
    )
