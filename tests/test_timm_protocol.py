"""A compressed model answers what timm's answer: optimizers group it alike, heads are exchanged, features are had."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from model_files import compressed_model, images
from timm.layers import AttentionPoolLatent
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from tokencut.errors import ModelError
from tokencut.methods import methods
from tokencut.model import CompressedModel, compress
from tokencut.models import artifact
from tokencut.models.alterations import CLASS_AND_MEAN, Alterations, alter
from tokencut.models.pretrained_cfg import class_count
from tokencut.timm_protocol import AroundTimm

SIZES = {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
# One for each set of parameters that timm groups in its own way: class token, registers, distillation, norms before and
# behind, LayerScale, pooling with attention, a stem of convolutions.
KINDS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_base_patch16_clip_224": {},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 56},
    "vit_so150m_patch16_reg4_map_256": {},
    "vit_dlittle_patch16_reg1_gap_256": {},
    "vit_tiny_r_s16_p8_224": {},
}


def built(name: str, **changed: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SIZES, **KINDS[name], **changed}).eval()


def pixels(model: nn.Module, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def groups(model: nn.Module, **options: Any) -> list[tuple[dict[str, Any], list[str]]]:
    """The optimizer's groups: their settings, and their parameters by the names in timm's model."""
    names = {id(parameter): name.removeprefix("model.") for name, parameter in model.named_parameters()}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, **options)
    return [
        ({name: value for name, value in group.items() if name != "params"}, [names[id(p)] for p in group["params"]])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("options", [{"weight_decay": 0.05}, {"weight_decay": 0.05, "layer_decay": 0.7},
                                     {"weight_decay": 0.05, "filter_bias_and_bn": False}])  # fmt: skip
@pytest.mark.parametrize("name", KINDS)
def test_timms_optimizers_make_the_groups_of_the_dense_model(name: str, options: dict[str, Any]) -> None:
    model = built(name)
    expected = groups(model, **options)
    assert groups(compress(model, keep=0.5, layers=[2]), **options) == expected
    assert len(expected) == (12 if "layer_decay" in options else 2)


def test_layers_are_those_of_the_blocks_not_one_for_all() -> None:
    options = {"weight_decay": 0.05, "layer_decay": 0.5}
    scales = {name: group["lr_scale"] for group, names in groups(compressed_model(), **options) for name in names}
    assert scales["head.weight"] == 1.0 and scales["blocks.5.mlp.fc1.weight"] == 0.5
    assert scales["blocks.0.mlp.fc1.weight"] == 0.5**6 and scales["pos_embed"] == 0.5**7
    decays = {name: group["weight_decay"] for group, names in groups(compressed_model(), **options) for name in names}
    assert decays["pos_embed"] == decays["cls_token"] == decays["norm.weight"] == 0.0
    assert decays["head.weight"] == 0.05


def test_what_a_stage_learns_goes_with_the_head() -> None:
    options = {"weight_decay": 0.05, "layer_decay": 0.5}
    model = compressed_model(method="dyvit")
    found = groups(model, **options)
    learned = {name: group["lr_scale"] for group, names in found for name in names if name.startswith("stages.")}
    assert len(learned) > 4 and set(learned.values()) == {1.0}
    without = [(group, [name for name in names if not name.startswith("stages.")]) for group, names in found]
    assert [entry for entry in without if entry[1]] == groups(model.model, **options)


def test_a_matcher_that_is_a_function_is_asked_by_timms_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = compressed_model(method="dyvit"), set()

    def layer(name: str) -> int:
        asked.add(name)
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 7 if name.startswith("head") else 0

    monkeypatch.setattr(model.model, "group_matcher", lambda coarse=False: layer)
    matcher = model.group_matcher()
    assert callable(matcher)
    answers = {name: matcher(name) for name, _ in model.named_parameters()}
    assert asked == {name for name, _ in model.model.named_parameters()}
    assert answers["model.blocks.5.mlp.fc1.weight"] == 6 and answers["model.pos_embed"] == 0
    assert {answer for name, answer in answers.items() if name.startswith("stages.")} == {(float("inf"),)}


QUESTIONS = (
    "num_classes",
    "num_features",
    "head_hidden_size",
    "embed_dim",
    "num_prefix_tokens",
    "in_chans",
    "global_pool",
    "grad_checkpointing",
)


def test_names_and_numbers_are_timms() -> None:
    for name in KINDS:
        model = built(name)
        compressed = compress(model, keep=0.5, layers=[2])
        for question in QUESTIONS:
            assert getattr(compressed, question) == getattr(model, question), (name, question)
        for cfg in (compressed.pretrained_cfg, compressed.default_cfg):
            first, heads = cfg["first_conv"], cfg["classifier"]
            assert compressed.get_submodule(first).in_channels == 3
            for head in [heads] if isinstance(heads, str) else heads:
                assert isinstance(compressed.get_submodule(head), nn.Linear)
        own = {parameter for parameter, _ in compressed.named_parameters()}
        assert compressed.no_weight_decay() & own == {f"model.{n}" for n in model.no_weight_decay()} & own
        classifier, theirs = compressed.get_classifier(), compressed.model.get_classifier()
        assert classifier is theirs or all(one is other for one, other in zip(classifier, theirs, strict=True))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_features_and_head_make_the_logits(name: str, method: str) -> None:
    compressed = compress(built(name), keep=0.5, layers=[2], method=method).eval()
    with torch.no_grad():
        features = compressed.forward_features(pixels(compressed.model))
        assert features.shape[1] - compressed.num_prefix_tokens == compressed.recipe.stages[-1].tokens_out
        torch.testing.assert_close(compressed.forward_head(features), compressed(pixels(compressed.model)))
        pooled = compressed.forward_head(features, pre_logits=True)
    vectors = pooled if isinstance(pooled, tuple) else (pooled,)
    assert all(vector.shape == (2, compressed.head_hidden_size) for vector in vectors)


@pytest.mark.parametrize("name", KINDS)
def test_features_that_have_lost_their_sizes_are_refused_where_these_count(name: str) -> None:
    compressed = compress(built(name), keep=0.5, layers=[2], method="tome").eval()
    with torch.no_grad():
        features, whole = compressed.forward_features(pixels(compressed.model)), compressed(pixels(compressed.model))
    by_size = compressed.global_pool == "avg" or isinstance(compressed.model.attn_pool, AttentionPoolLatent)
    if by_size:
        with pytest.raises(ModelError, match="the features don't tell how many patches each token holds.*forward_head"):
            compressed.forward_head(features.clone())
    else:
        torch.testing.assert_close(compressed.forward_head(features.clone()), whole)
    assert by_size == ("map" in name or "gap" in name)


def test_nothing_reduced_is_timms_to_the_bit() -> None:
    model = built("vit_dlittle_patch16_reg1_gap_256")
    compressed = compress(model, keep=1.0).eval()
    features = compressed.forward_features(pixels(model))
    assert torch.equal(features, model.forward_features(pixels(model)))
    assert torch.equal(compressed.forward_head(features), model(pixels(model)))
    for options in ({}, {"n": [0, 2], "norm": True, "reshape": True, "return_prefix_tokens": True}):
        got = compressed.get_intermediate_layers(pixels(model), **options)
        expected = model.get_intermediate_layers(pixels(model), **options)
        assert all(torch.equal(one, other) for one, other in zip(flat(got), flat(expected), strict=True))


def flat(maps: Any) -> list[Tensor]:
    return [part for each in maps for part in (each if isinstance(each, tuple) else (each,))]


def test_intermediate_layers_of_a_reduced_model_are_whole_maps() -> None:
    compressed = compress(built("vit_tiny_patch16_224"), keep=0.5, layers=[2]).eval()
    maps = compressed.get_intermediate_layers(pixels(compressed.model), 2, reshape=True)
    assert [each.shape for each in maps] == [(2, 48, 4, 4)] * 2
    assert torch.equal(
        maps[1], compressed.forward_intermediates(pixels(compressed.model), 2, intermediates_only=True)[1]
    )


def test_a_new_head_has_its_classes_everywhere(tmp_path: Any) -> None:
    for method in ("bat", "topk"):
        compressed = compressed_model(method=method).double().train()
        compressed.reset_classifier(7)
        assert compressed.num_classes == class_count(compressed) == class_count(compressed.model) == 7
        assert compressed.model.head.weight.dtype == torch.float64 and compressed.model.head.training
        compressed = compressed.float().eval()
        artifact.save(compressed, tmp_path / f"{method}.safetensors")
        loaded = artifact.load(tmp_path / f"{method}.safetensors")
        assert loaded.num_classes == 7 and torch.equal(loaded(images()), compressed(images()))
        compressed.reset_classifier(0, "avg")
        assert compressed.num_classes == 0 and compressed.global_pool == "avg"
        assert compressed(images()).shape == (3, 64)


def test_a_head_put_there_by_hand_has_its_classes_everywhere(tmp_path: Any) -> None:
    def with_head(head: nn.Module, model: nn.Module) -> nn.Module:
        (model.model if isinstance(model, CompressedModel) else model).head = head
        return model

    for head, classes in ((nn.Linear(64, 9), 9), (nn.Sequential(nn.Dropout(), nn.Linear(64, 32), nn.Linear(32, 8)), 8),
                          (nn.Identity(), 0)):  # fmt: skip
        dense = with_head(head, copy.deepcopy(compressed_model().model))
        after, before = with_head(head, compressed_model()), compress(dense, keep=0.5, layers=(2, 4))
        for model in (dense, before, after):
            assert class_count(model) == classes, (type(model), head)
        if not isinstance(head, nn.Sequential):
            path = tmp_path / f"{classes}.safetensors"
            artifact.save(after, path)
            assert artifact.load(path).num_classes == classes
            assert torch.equal(artifact.load(path)(images()), after(images()))


def test_a_new_head_is_as_wide_as_what_is_pooled() -> None:
    compressed = compressed_model()
    alter(compressed.model, Alterations(pool=CLASS_AND_MEAN))
    compressed.reset_classifier(7)
    assert compressed.eval()(images()).shape == (3, 7) and compressed.model.head.in_features == 128


def test_another_input_size_keeps_rates_and_is_saved(tmp_path: Any) -> None:
    compressed = compressed_model()
    assert [plan.tokens_out for plan in compressed.recipe.stages] == [8, 4]
    compressed.set_input_size(96)
    assert compressed.recipe.tokens == 36 and [plan.tokens_out for plan in compressed.recipe.stages] == [18, 9]
    same = compress(compressed.model, keep=0.5, layers=(2, 4)).eval()
    assert torch.equal(compressed(images(96)), same(images(96))) and compressed.recipe == same.recipe
    artifact.save(compressed, tmp_path / "model.safetensors")
    assert torch.equal(artifact.load(tmp_path / "model.safetensors")(images(96)), compressed(images(96)))


def test_every_method_answers() -> None:
    for method in methods(keeps_grid=False):
        compressed = compressed_model(method=method)
        assert isinstance(compressed, AroundTimm)
        features = compressed.forward_features(images())
        torch.testing.assert_close(compressed.forward_head(features), compressed(images()), msg=method)


def test_the_loop_on_the_page_about_fine_tuning_runs(
    run_script: Callable[..., tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    code = page.partition("## In your own training code")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.py").write_text(code, encoding="utf-8")
    run_script(tmp_path / "loop.py")
    loaded = artifact.load(tmp_path / "out.safetensors")
    assert loaded.num_classes == 10 and loaded.recipe.layers == [2, 4]
