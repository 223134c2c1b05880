"""The table of eight bits beside fewer tokens: its differences and ratios by hand."""

from __future__ import annotations

import pytest
import quantised
from quantised import Form

from tokencut.evaluation.accuracy import EvaluationReport


def judged(right: str) -> EvaluationReport:
    correct = tuple(each == "1" for each in right)
    top1 = 100 * sum(correct) / len(correct)
    return EvaluationReport("m", "d", len(right), top1, top1, 0.0, None, 1.0, 1.0, correct=correct)


def test_each_is_set_beside_dense_and_beside_itself_without_eight_bits() -> None:
    forms = [
        Form("dense", "onnx fp32", "onnx fp32", 8.0, judged=judged("1110")),
        Form("dense", "onnx int8, static", "onnx fp32", 2.0, judged=judged("1100")),
        Form("bat", "onnx fp32", "onnx fp32", 8.1, judged=judged("1011")),
        Form("bat", "onnx int8, static", "onnx fp32", 2.1, judged=judged("1111")),
    ]
    # Seconds of three rounds: the ratio of each is taken round by round, so that what slows a round down cancels.
    timings = {16: [[0.4, 0.8, 0.4], [0.2, 0.4, 0.4], [0.2, 0.4, 0.2], [0.1, 0.2, 0.1]]}
    found = quantised.rows(forms, timings)
    assert [dict(zip(quantised.COLUMNS, row, strict=True)) for row in found] == [
        {"model": "dense", "form": "onnx fp32", "MB": "8.0", "top-1, %": "75.00", "beside dense": "",
         "by eight bits": "", "batch": "16", "ms": "400.00", "times as fast": "1"},
        {"model": "dense", "form": "onnx int8, static", "MB": "2.0", "top-1, %": "50.00",
         "beside dense": "-25.00 ± 25.00", "by eight bits": "-25.00 ± 25.00", "batch": "16", "ms": "400.00",
         "times as fast": "2.00 (1.50 to 2.00)"},
        {"model": "bat", "form": "onnx fp32", "MB": "8.1", "top-1, %": "75.00", "beside dense": "+0.00 ± 40.82",
         "by eight bits": "", "batch": "16", "ms": "200.00", "times as fast": "2.00 (2.00 to 2.00)"},
        {"model": "bat", "form": "onnx int8, static", "MB": "2.1", "top-1, %": "100.00",
         "beside dense": "+25.00 ± 25.00", "by eight bits": "+25.00 ± 25.00", "batch": "16", "ms": "100.00",
         "times as fast": "4.00 (4.00 to 4.00)"},
    ]  # fmt: skip


def test_forms_that_were_not_judged_have_no_accuracy() -> None:
    forms = [Form("dense", "bf16", "bf16", 44.0), Form("dense", "fp8", "bf16", 22.0)]
    first, second = quantised.rows(forms, {1: [[0.002, 0.002], [0.001, 0.001]]})
    assert first[3:6] == second[3:6] == ["", "", ""]
    assert second[-1] == "2.00 (2.00 to 2.00)"


@pytest.mark.parametrize("words", [["m", "--device", "cuda"], ["m", "--runtimes", "onnx", "openvino"]])
def test_its_command_line_is_read(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["quantised", *words])
    args = quantised.parse()
    assert (args.model, args.keep, args.method, args.batch_size) == ("m", 0.5, "bat", [16])
