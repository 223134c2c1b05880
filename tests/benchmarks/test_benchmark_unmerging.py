"""The script on un-merging: its rules on trial and its figures by hand, and that it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import unmerging

from tokencut.tokens import Tokens

CELL = r"[\d.]+ \(-?[\d.]+\)"
ROW = re.compile(rf"\| (\w+) \| 0.5 \| ([\w ]+) \| {CELL} \| {CELL} \| {CELL} \| {CELL} \| ([\d.]+), ([\d.]+) \|")


def test_error_and_similarity_by_hand() -> None:
    dense = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    found = torch.tensor([[[3.0, 0.0], [3.0, 4.0]]])  # 3 off, of 5; at cosines 1 and 4 / 5
    torch.testing.assert_close(unmerging.compare(found, dense), torch.tensor([[0.6], [0.9]], dtype=torch.float64))


def test_weights_of_the_nearest_by_hand() -> None:
    points, centres = torch.tensor([[[0.0]]]), torch.tensor([[[1.0], [-2.0], [4.0]]])
    weights = unmerging.softmax_weights(points, centres, 2, 0.5)
    # Squared distances are 1, 4 and 16, 7 on average, and the two nearest count.
    shares = [math.exp(-1 / 3.5), math.exp(-4 / 3.5)]
    torch.testing.assert_close(weights[0, 0], torch.tensor([share / sum(shares) for share in shares] + [0.0]))


@pytest.mark.parametrize(("rule", "expected"), [("copy", [12, 29]), ("change", [11, 28])])
def test_a_softmax_over_one_is_the_nearest(rule: str, expected: list[float]) -> None:
    def image(*values: float) -> Tokens:
        return Tokens(torch.tensor([[[value] for value in values]]), 0, source=torch.tensor([[0, 1]]))

    softmax = unmerging.Softmax(rule, 1, 1.0)
    softmax.stage(image(1.0, 5.0), image(6.0, 2.0))  # 1 is nearest to 2, and 5 to 6
    assert softmax.full(image(29.0, 12.0)).flatten().tolist() == expected


def test_methods_with_settings() -> None:
    assert unmerging.method_of("tome") == ("tome", {})
    assert unmerging.method_of("bat:features=tokens,window=256") == ("bat", {"features": "tokens", "window": "256"})


def test_the_script_on_the_digits(benchmark: Callable[..., tuple[str, str]]) -> None:
    pytest.importorskip("sklearn")
    words = "digits --data digits --limit 8 --keep 0.5 --methods bat:window=256 topk --blocks 12 6 --device cpu"
    printed, _ = benchmark("unmerging", *words.split())
    assert printed.startswith("digits, 8 images of digits, fp32, on ")
    assert "| block 6 | normed | block 12 | normed | last over copy |" in printed
    rows = {(method, rule): float(ratio) for method, rule, ratio, _ in ROW.findall(printed)}
    assert list(rows) == [(method, rule) for method in ("bat", "topk")
                          for rule in ("copy", "change", "soft copy", "soft change")]  # fmt: skip
    assert rows["bat", "copy"] == 1 and rows["bat", "change"] < 0.9
