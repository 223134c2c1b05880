"""What timm says of a model: label names that fit its head, and whether it has one."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tokencut.errors import ModelError
from tokencut.models.pretrained_cfg import label_names, require_head


class Head(nn.Module):
    """As much of a timm model as its labels need."""

    def __init__(self, num_classes: int, **pretrained_cfg: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = pretrained_cfg


def test_label_names_of_a_model() -> None:
    assert label_names(Head(2, label_names=["a", "b"])) == ("a", "b")
    assert label_names(Head(9, label_names={"3": "a", "8": "b"})) == {3: "a", 8: "b"}
    assert label_names(Head(2)) is None
    assert label_names(nn.Identity()) is None


@pytest.mark.parametrize("stale", [["a", "b", "c"], {"0": "a", "2": "c"}, {}, []])
def test_label_names_of_another_head_are_not_used(stale: Any) -> None:
    assert label_names(Head(2, label_names=stale)) is None


def test_a_model_without_a_head_has_no_accuracy() -> None:
    assert require_head(Head(2)) == 2
    with pytest.raises(ModelError) as caught:
        require_head(Head(0, architecture="vit_tiny"))
    assert str(caught.value) == (
        "vit_tiny has no classification head (num_classes=0), so there is no accuracy to measure; its cost is what "
        "tokencut profile tells. For a head name its architecture, with --num-classes N and a --checkpoint FILE that "
        "has one, or fine-tune it (tokencut compress --num-classes N --finetune-epochs 5 --train-data DIR)"
    )
