"""Arguments of architectures: how they are typed, and which are refused."""

from __future__ import annotations

import pytest

from tokencut.errors import UsageError
from tokencut.models.model_args import parse_model_kwargs


def test_model_kwargs() -> None:
    assert parse_model_kwargs(["img_size=32,patch_size=4", "mlp_ratio=2.5", "act_layer=gelu"]) == {
        "img_size": 32,
        "patch_size": 4,
        "mlp_ratio": 2.5,
        "act_layer": "gelu",
    }
    assert parse_model_kwargs(["img_size=(32,64), qkv_bias=False,qk_norm=true,x=None"]) == {
        "img_size": (32, 64),
        "qkv_bias": False,
        "qk_norm": True,
        "x": None,
    }
    assert parse_model_kwargs([]) == {}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["img_size"], "`model_kwargs` 'img_size' is not key=value; type `model_kwargs='img_size=384'`"),
        (["=3"], "`model_kwargs` '=3' is not key=value"),
        (["img_size="], "`model_kwargs` 'img_size=' is not key=value"),
        (["img_size=3", "img_size=4"], "`model_kwargs` gives img_size twice; give it once, such as img_size=4"),
        (["pretrained=True"], "pretrained is not an argument of the architecture; use `pretrained=False` for"),
        (["checkpoint_path=x.pth"], "checkpoint_path is not an argument of the architecture; use `checkpoint='FILE'`"),
        (["features_only=True"], "features_only is not an argument of the architecture; leave it out"),
        (["depth=99999999"], "`depth=99999999` is not a whole number from 1 to 128; type `depth=12`"),
        (["depth=1e999"], "`depth=inf` is not a whole number from 1 to 128; type `depth=12`"),
        (["depth={1}"], "the model's argument depth is {1}, which is a set, not a plain value"),
        (["depth={1: 2}"], "the model's argument depth is {1: 2}, which is a dict whose keys are not strings"),
        (["depth=" + "x" * 1001], "which is too long a string"),
    ],
)  # fmt: skip
def test_wrong_model_kwargs(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_model_kwargs(texts)
    assert message in str(caught.value)
