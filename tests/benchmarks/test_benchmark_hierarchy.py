"""The benchmark of hierarchical models: what it tries, and what it says of that."""

from __future__ import annotations

import timm
import torch
from hierarchy import CONTROLS, Point, reduced, summary, varied

from tokencut.model import predicted_gmacs


def test_one_setting_is_changed_at_a_time_unless_two_are_joined() -> None:
    assert varied([]) == [()]
    assert varied(["nearest=1,4", "reach=2+rounds=3"]) == [
        (),
        (("nearest", "1"),),
        (("nearest", "4"),),
        (("reach", "2"), ("rounds", "3")),
    ]


def test_a_summary_pairs_settings_over_the_images() -> None:
    # Means over two points: 1, 2, 3 and 3, 4, 5 of three images; 2 more on each, so without any error.
    table = summary({
        (): [torch.tensor([0.0, 2, 4]), torch.tensor([2.0, 2, 2])],
        (("reach", "2"),): [torch.tensor([2.0, 4, 6]), torch.tensor([4.0, 4, 4])],
    })  # fmt: skip
    assert table.splitlines()[2:] == ["| as it comes | 2.0 | +0.00 ± 0.00 |", "| reach=2 | 4.0 | +2.00 ± 0.00 |"]


def test_controls_cost_less_than_clusters() -> None:
    with torch.device("meta"):
        dense = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=96, depths=(1, 1, 4, 1))
    costs = [
        predicted_gmacs(reduced(dense, Point(2, 0.5), options)) for options in (*CONTROLS, (("method", "window"),))
    ]
    whole = predicted_gmacs(reduced(dense, None, ()))
    assert costs[0] == costs[1] < costs[2] < whole
    assert predicted_gmacs(reduced(dense, Point(2, 0.5), ())) < whole
