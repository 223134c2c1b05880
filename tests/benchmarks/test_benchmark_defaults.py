"""The script for bat's defaults runs, on training images, and its figures are those of the public API."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tokencut import compress
from tokencut.data.image_set import open_images
from tokencut.data.sources import open_source
from tokencut.models import digits

ROW = re.compile(r"\| (?P<setting>[^|]+) \| (?P<top1>[\d.]+) \((?P<kl>[\d.]+)\) \| [\d.]+ \((?P<mean>[\d.]+)\) \|")


def test_a_small_grid_on_the_training_digits(benchmark: Callable[..., tuple[str, str]]) -> None:
    pytest.importorskip("sklearn")
    words = "digits --data digits --limit 20 --grid pairs=0,0.25 neighbours=5 --methods topk --keep 0.2 --device cpu"
    printed, _ = benchmark("defaults", *words.split())
    assert printed.startswith("digits, 20 training images of digits: dense top-1 ")
    rows = {found["setting"]: found for found in ROW.finditer(printed)}
    assert list(rows) == sorted(rows, key=lambda name: float(rows[name]["mean"]))
    assert set(rows) == {
        "bat", "bat preset=paper --no-prop-attn", "topk",
        *(f"bat pairs={pairs} neighbours=5 --{no}prop-attn" for pairs in ("0", "0.25") for no in ("", "no-")),
    }  # fmt: skip

    dense = digits.create()
    images = open_images(dense, open_source("digits", split="train"), limit=20)
    [batch] = images.batches(20, workers=0)
    pixels = images.prepared.normalise(batch.images, torch.device("cpu"))
    with torch.no_grad():
        wanted, found = dense(pixels), compress(dense, keep=0.2, method="topk")(pixels)
    probabilities = wanted.softmax(dim=1)
    divergence = (probabilities * (wanted.log_softmax(dim=1) - F.log_softmax(found, dim=1))).sum(dim=1).mean()
    assert float(rows["topk"]["kl"]) == pytest.approx(1000 * float(divergence), abs=0.06)
    ahead = re.search(r"^\| topk \|.*\| (\S+) ± \S+ \| (\S+) ± \S+ \|$", printed, re.MULTILINE)
    assert ahead
    assert float(ahead[1]) == pytest.approx(float(rows["topk"]["top1"]) - float(rows["bat"]["top1"]), abs=0.011)
    assert float(ahead[2]) == pytest.approx(float(rows["topk"]["kl"]) - float(rows["bat"]["kl"]), abs=0.11)
    right = (found.argmax(dim=1) == batch.targets).float().mean()
    assert float(rows["topk"]["top1"]) == pytest.approx(100 * float(right))
