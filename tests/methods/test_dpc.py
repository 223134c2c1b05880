"""dpc: clusters of all image tokens become averages; the clusters themselves are tested with the primitive."""

from __future__ import annotations

import pytest
from given_inputs import given_input, grouping

from tokencut.blocks import Stage
from tokencut.methods import StageShape, make_method
from tokencut.ops.merge_weights import WEIGHT_KINDS

IMAGE = [[0.0], [10.0], [1.0], [2.0], [11.0]]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("equal", [1.0, 10.5]),
        ("size", [(0 + 1 + 2 * 3) / 5, 10.5]),
        ("attention", [(1 * 0.25 + 2 * 0.5) / 1.0, (10 * 0.1 + 11 * 0.3) / 0.4]),
        ("product", [(1 * 0.25 + 2 * 1.5) / 2.0, (10 * 0.1 + 11 * 0.3) / 0.4]),
    ],
)
def test_a_cluster_becomes_its_average(weights: str, expected: list[float]) -> None:
    stage_input = given_input(IMAGE, attention=[0.25, 0.1, 0.25, 0.5, 0.3], sizes=[1.0, 1.0, 1.0, 3.0, 1.0])
    left = Stage(make_method("dpc", {"weights": weights, "neighbours": 2}))(stage_input, 2)
    assert left.image[0, :, 0].tolist() == pytest.approx(expected)
    assert left.sizes is not None
    assert left.sizes.tolist() == [[5.0, 2.0]]


def test_features_decide_what_is_compared() -> None:
    stage_input = given_input(IMAGE, keys=[[0.0], [1.0], [50.0], [51.0], [52.0]])
    method = make_method("dpc", {"features": "keys", "neighbours": 2})
    assert grouping(method, stage_input, 2).group.tolist() == [[0, 0, 1, 1, 1]]


def test_costs_all_pairs_of_tokens() -> None:
    shape = StageShape(tokens=16, budget=8, width=64, key_width=32)
    assert make_method("dpc").macs(shape) == 16 * 16 * 64
    assert make_method("dpc", {"features": "keys"}).macs(shape) == 16 * 16 * 32


def test_reads_attention_only_as_a_weight() -> None:
    read = {kind: make_method("dpc", {"weights": kind}).reads_attention() for kind in WEIGHT_KINDS}
    assert read == {"equal": False, "size": False, "attention": True, "product": True}
