"""The script that holds found schedules against fixed ones runs, and its figures are those of the public API."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokencut import compress, cost, evaluate
from tokencut.model import predicted_macs
from tokencut.models import digits


@pytest.mark.slow
def test_a_row_beside_the_fixed_stages(benchmark: Callable[..., tuple[str, str]]) -> None:
    pytest.importorskip("sklearn")
    words = "digits --keep 0.2 --images 16 --effort 3 --limit 30"
    printed, _ = benchmark("schedules", *words.split())
    head, _, row = (line.strip("| ").split(" | ") for line in printed.splitlines()[:3])
    cells = dict(zip(head, row, strict=True))
    dense = digits.create()
    fixed = compress(dense, keep=0.2)
    assert cells["budget"] == "keep 0.2"
    assert float(cells["GMACs"]) <= cost.total(predicted_macs(fixed)) / 1e9 + 0.00005  # it is rounded
    assert cells["fixed top-1"] == f"{evaluate(fixed, 'digits', limit=30, workers=0).top1:.2f}"
    _, keep, _, layers = cells["found"].strip("`").split()
    found = compress(dense, keep=[float(part) for part in keep.split("/")], layers=[int(b) for b in layers.split(",")])
    assert cells["found top-1"] == f"{evaluate(found, 'digits', limit=30, workers=0).top1:.2f}"
    assert f"Dense: {evaluate(dense, 'digits', limit=30, workers=0).top1:.2f} on 30 images." in printed
