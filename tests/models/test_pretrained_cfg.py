"""What timm says of a model: label names that fit its head, and whether it has one."""

from __future__ import annotations

from typing import Any

import pytest
import timm
from torch import nn

from tokencut.errors import ModelError
from tokencut.model import compress
from tokencut.models.pretrained_cfg import (
    architecture_of,
    data_config,
    label_names,
    name_of,
    require_head,
    sync_pretrained_cfg,
)


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


@pytest.mark.parametrize("stale", [["a", "b", "c"], {"0": "a", "2": "c"}, {"first": "a"}, {}, []])
def test_label_names_of_another_head_are_not_used(stale: Any) -> None:
    assert label_names(Head(2, label_names=stale)) is None


def test_a_model_without_a_head_has_no_accuracy() -> None:
    assert require_head(Head(2)) == 2
    with pytest.raises(ModelError) as caught:
        require_head(Head(0, architecture="vit_tiny"))
    assert str(caught.value) == (
        "vit_tiny has no classification head (num_classes=0), so there is no accuracy to measure; its cost is what "
        "`tokencut.profile` tells. For a head name its architecture, with `num_classes=N` and a `checkpoint='FILE'` "
        "that has one, or fine-tune a new one (`num_classes=N, epochs=5, train_data='DIR'`)"
    )


def test_what_a_model_is_called() -> None:
    assert (name_of(nn.Identity()), architecture_of(nn.Identity())) == ("Identity", "Identity")
    plain, tagged = Head(2, architecture="vit_tiny"), Head(2, architecture="vit_tiny", tag="in1k")
    assert (name_of(plain), name_of(tagged), architecture_of(tagged)) == ("vit_tiny", "vit_tiny.in1k", "vit_tiny")


def test_the_description_is_true_for_what_was_built() -> None:
    model = timm.create_model("test_vit", img_size=(32, 48), in_chans=1, num_classes=5)
    assert (model.pretrained_cfg["input_size"], data_config(model)["input_size"]) == ((3, 160, 160), (1, 32, 48))
    sync_pretrained_cfg(model, own_weights=False)
    assert (model.pretrained_cfg["input_size"], model.pretrained_cfg["num_classes"]) == ((1, 32, 48), 5)
    assert data_config(compress(model, keep=0.5)) == data_config(model)


def test_a_family_without_an_adapter_tells_its_size_as_timm_does() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(64, 96), depths=(1,), num_heads=(1,), embed_dim=8
    )
    assert data_config(model)["input_size"] == (3, 64, 96)
