"""Names: aliases, renamed and misspelt ones, and the listing."""

from __future__ import annotations

import pytest
import timm

from tokencut.errors import ModelError, TokencutError, UsageError
from tokencut.models.names import aliases, architectures, list_supported, resolve_name


def test_aliases_are_names_without_their_patch_and_size() -> None:
    assert aliases()["deit_tiny"] == "deit_tiny_patch16_224"
    assert aliases()["deit_tiny_distilled"] == "deit_tiny_distilled_patch16_224"
    assert not set(aliases()) & set(timm.list_models())
    assert str(resolve_name("deit_small.fb_in1k")) == "deit_small_patch16_224.fb_in1k"


def test_a_renamed_model_is_followed() -> None:
    name = resolve_name("vit_base_patch16_224_dino")
    assert (name.architecture, name.tag) == ("vit_base_patch16_224", "dino")
    assert name.notes == ("timm calls vit_base_patch16_224_dino vit_base_patch16_224.dino now",)


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        (
            "diet_tiny",
            UsageError,
            "unknown model 'diet_tiny', did you mean deit_tiny or vit_tiny or convit_tiny? 'tokencut models'",
        ),
        ("DeiT-Tiny", UsageError, "unknown model 'DeiT-Tiny', did you mean deit_tiny"),
        ("digit", UsageError, "unknown model 'digit', did you mean digits? 'tokencut models' lists the names"),
        ("zzzzzzzz", UsageError, "unknown model 'zzzzzzzz'; 'tokencut models' lists the names"),
        ("deit_tiny.in1k", UsageError, "deit_tiny_patch16_224 has no weights tagged 'in1k'; its tags are fb_in1k"),
        ("vit_gap.x", UsageError, "unknown model 'vit_gap.x'"),
        ("resnet50", ModelError, "resnet50 is of timm's family resnet, which is not supported; supported are: "),
        ("efficientnet_b3_pruned", ModelError, "which is not supported"),
    ],
)
def test_what_is_not_a_name(spec: str, kind: type[TokencutError], message: str) -> None:
    with pytest.raises(kind) as caught:
        resolve_name(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_architecture_without_weights_has_no_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencut.models.names.get_arch_pretrained_cfgs", lambda _: {})
    with pytest.raises(UsageError, match="test_vit has no weights tagged 'x'; it has none, type test_vit"):
        resolve_name("test_vit.x")


def test_a_model_that_timm_has_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencut.models.names.get_deprecated_models", lambda: {"vit_old": None})
    with pytest.raises(ModelError, match="^timm has removed vit_old; 'tokencut models' lists the names there are$"):
        resolve_name("vit_old")


def test_listing() -> None:
    everything = list_supported()
    assert [model.name for model in everything] == list(architectures())
    assert len({model.name for model in everything}) == len(everything) >= 335
    tiny = next(model for model in everything if model.name == "deit_tiny_patch16_224")
    assert (tiny.alias, tiny.family, tiny.tags) == ("deit_tiny", "ViT / DeiT", ("fb_in1k",))
    assert (tiny.input_size, tiny.licence) == ((224, 224), "apache-2.0")
    assert [model.name for model in list_supported("deit_TINY")] == [
        "deit_tiny_distilled_patch16_224",
        "deit_tiny_patch16_224",
    ]
    assert {model.name for model in list_supported("vit_*_patch14_DINOv2")} == {
        f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant")
    }
    assert list_supported("convnext") == []
