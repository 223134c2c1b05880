"""Building timm models: wrong arguments are told apart, and what timm says becomes a note."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import timm

from tokencut.errors import ModelError, UsageError
from tokencut.models import building


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"embed_dims": 8}, "test_vit takes no argument 'embed_dims', did you mean embed_dim? its arguments are img"),
        ({"zzz": 8}, "test_vit takes no argument 'zzz'; its arguments are img_size, "),
        ({"embed_dim": 7}, "timm cannot build test_vit with embed_dim=7: dim should be divisible by num_heads;"),
        ({"depth": "x", "num_heads": 2}, "timm cannot build test_vit with depth=x,num_heads=2: "),
    ],
)  # fmt: skip
def test_wrong_arguments(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        building.check_arguments("test_vit", args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_supported() -> None:
    with pytest.raises(ModelError, match="models are not supported; supported are: "):
        building.check_arguments("test_resnet", {})


def test_a_model_that_cannot_be_built_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(ModelError, match="^timm cannot build test_vit: no luck; "):
        building.check_arguments("test_vit", {})


def test_what_timm_says_becomes_a_note(capfd: pytest.CaptureFixture[str]) -> None:
    with building.capture_timm_messages() as lines:
        logging.getLogger("timm.models").warning("one\nthing")
        warnings.warn("another", stacklevel=1)
    assert lines == ["one thing", "another"]
    assert capfd.readouterr() == ("", "")


def test_weights_that_fit_into_no_memory_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_memory", lambda: 2**30)
    building.check_arguments("vit_base_patch16_224", {})
    with pytest.raises(UsageError, match=r"^vit_base_patch16_224 with embed_dim=12288 has .* GiB of weights, and this"):
        building.check_arguments("vit_base_patch16_224", {"embed_dim": 12288})
