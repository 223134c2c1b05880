"""The script on half precision: its shares by hand, and that it runs."""

from __future__ import annotations

import re
from collections.abc import Callable

import precision
import pytest
import torch

ROW = re.compile(r"\| topk \| 0.5 \| bf16 \| (?P<kept>[\d.]+) \|  \| [+-][\d.]+ \| [+-][\d.]+ ± [\d.]+ \|")


# Six patches of one image: in fp32 {0, 2}, {1}, {3, 4} with 5 dropped; in half {0}, {1, 2}, {3, 4} with 5 dropped.
FULL, HALF = torch.tensor([[0, 1, 0, 2, 2, -1]]), torch.tensor([[0, 1, 1, 2, 2, -1]])


def test_first_patches_by_hand() -> None:
    assert precision.first_patches(FULL).tolist() == [[0, 1, 0, 3, 3, -1]]
    assert precision.first_patches(HALF).tolist() == [[0, 1, 1, 3, 3, -1]]


def test_overlaps_by_hand() -> None:
    # Of the five that are left, patch 2 went elsewhere.
    assert precision.kept_overlap(FULL, HALF) == 4 / 5
    # (3, 4) in both; (0, 2) and (1, 2) in one.
    assert precision.together_overlap(FULL, HALF) == 1 / 3
    assert precision.together_overlap(torch.tensor([[0, -1, -1]]), torch.tensor([[-1, 0, -1]])) is None
    assert precision.kept_overlap(torch.tensor([[0, 1, -1, -1]]), torch.tensor([[0, -1, 1, -1]])) == 1 / 2


def test_loss_beyond_the_dense_models_by_hand() -> None:
    judged = {name: precision.Judged([torch.tensor(right)]) for name, right in {
        "full": [True, True, True, False], "half": [True, False, False, False],
        "dense": [True, True, True, True], "dense half": [True, False, True, True],
    }.items()}  # fmt: skip
    found = precision.lost_beyond(*(judged[name] for name in ("full", "half", "dense", "dense half")))
    assert found.points == 25.0  # two of four lost, where dense loses one
    assert found.standard_error == pytest.approx(50 / 4**0.5)


def test_the_script_on_the_digits(benchmark: Callable[..., tuple[str, str]]) -> None:
    pytest.importorskip("sklearn")
    words = "digits --data digits --limit 8 --keep 0.5 --methods topk --precision bf16 --device cpu"
    printed, _ = benchmark("precision", *words.split())
    assert printed.startswith("digits, 8 images of digits: dense top-1 ")
    found = ROW.search(printed)
    assert found
    assert 50 < float(found["kept"]) <= 100
