"""The loop over blocks, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tokencut.attention import AttentionInfo, log_size_bias
from tokencut.model import CompressedModel, compress
from tokencut.recipe import Recipe
from tokencut.schedule import StagePlan
from tokencut.tokens import Tokens


def halved(method: str = "bat", **settings: Any) -> CompressedModel:
    """16 to 8 image tokens in block 2, 8 to 4 in block 4; six blocks."""
    torch.manual_seed(0)
    dense = timm.create_model("test_vit", img_size=64, num_classes=5)
    return compress(dense, keep=0.5, layers=[2, 4], method=method, **settings).eval()


def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


class Notes:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def stage(self, plan: StagePlan, entering: Tokens, leaving: Tokens, attention: AttentionInfo) -> None:
        self.told.append((plan, entering.count, leaving.count, tuple(attention.class_attention().shape)))

    def block(self, number: int, tokens: Tokens) -> None:
        self.told.append((number, tokens.count))


@torch.no_grad()
def test_steps_one_by_one_are_the_forward() -> None:
    model = halved()
    loop, tokens = model.loop, model.loop.embed(images())
    for number, tokens_out in enumerate((None, 8, 8, 4, None, 4), start=1):
        tokens = loop.step(number, tokens, tokens_out)
    assert loop.depth == 6 and tokens.count == 4
    assert torch.equal(loop.head(tokens), model(images()))


@pytest.mark.parametrize("tokens_out", [None, 16])
@torch.no_grad()
def test_a_step_with_nothing_to_remove_is_timms_block_without_its_stage(tokens_out: int | None) -> None:
    model = halved()
    model.stages["2"].register_forward_pre_hook(lambda *_: pytest.fail("the stage runs"))
    tokens = model.loop.embed(images())
    assert torch.equal(model.loop.step(2, tokens, tokens_out).features, model.model.blocks[1](tokens.features))


@torch.no_grad()
def test_an_observer_is_told_of_every_stage_and_block_in_order() -> None:
    loop, notes = halved("topk").loop, Notes()
    loop.run(loop.embed(images()), (StagePlan(2, 16, 8), StagePlan(4, 8, 4)), notes, depth=5)
    first, second = (StagePlan(2, 16, 8), 16, 8, (3, 16)), (StagePlan(4, 8, 4), 8, 4, (3, 8))
    assert notes.told == [(1, 16), first, (2, 8), (3, 8), second, (4, 4), (5, 4)]


@torch.no_grad()
def test_sizes_weigh_in_attention_from_the_stage_on() -> None:
    for proportional in (True, False):
        loop = halved(prop_attn=proportional).loop
        tokens = loop.embed(images(), source=True)
        assert tokens.bias is None and tokens.source is not None and tokens.source.tolist() == [list(range(16))] * 3
        left = loop.step(2, tokens, 5)
        expected = log_size_bias(left)
        assert expected is not None and expected.shape == (3, 1, 1, 6)
        assert torch.equal(left.bias, expected) if proportional else left.bias is None


@pytest.mark.parametrize(("name", "classes"), [("test_vit3", 5), ("test_vit2", 5), ("test_vit3", 0)])
@torch.no_grad()
def test_the_head_sees_a_merged_token_as_often_as_it_holds_patches(name: str, classes: int) -> None:
    # test_vit3 pools by attention, to which sizes come as a bias; test_vit2 averages.
    torch.manual_seed(0)
    dense = timm.create_model(name, img_size=64, num_classes=classes).eval()
    loop, prefix = compress(dense, keep=0.5, prop_attn=True).eval().loop, dense.num_prefix_tokens
    merged = torch.randn(2, prefix + 3, dense.embed_dim)
    places = [*range(prefix), prefix, prefix + 1, prefix + 1, prefix + 2, prefix + 2, prefix + 2]
    tokens = loop.weighed(Tokens(merged, prefix, torch.tensor([[1.0, 2.0, 3.0]] * 2)))
    expected = dense.forward_head(dense.norm(merged[:, places]))
    torch.testing.assert_close(loop.head(tokens), expected, rtol=1e-5, atol=1e-5)
    once = dense.forward_head(dense.norm(merged))
    assert (expected - once).abs().max() > 1e-3, "sizes make no difference that a test could see"


def test_hidden_tokens_weigh_next_to_nothing_from_the_stage_on() -> None:
    loop = halved("dyvit").train().loop
    left = loop.step(2, loop.embed(images()), 8)
    assert left.count == 16 and left.policy is not None and left.bias is not None
    assert torch.allclose(left.bias[:, 0, 0, 1:].exp(), left.policy, atol=1e-5)
    assert (left.bias[:, 0, 0, 0] == 0).all() and left.bias.requires_grad


@pytest.mark.parametrize("reduces", [True, False])
def test_the_schedule_is_resolved_once(reduces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = halved() if reduces else compress(halved().model, keep=1.0).eval(), []
    resolve = Recipe.stages_for
    monkeypatch.setattr(Recipe, "stages_for", lambda self, *sizes: asked.append(sizes[0]) or resolve(self, *sizes))
    for run in (model, model.trace, model.forward_intermediates):
        run(images())
        assert asked == [16]
        asked.clear()


def test_patch_dropout_has_a_schedule_of_its_own() -> None:
    torch.manual_seed(0)
    dense = timm.create_model("test_vit", img_size=64, patch_drop_rate=0.25)
    model = compress(dense, keep=0.5, layers=[2, 4]).train()
    assert [trace.tokens.count for trace in model.trace(images())[1]] == [6, 3, 3]  # of 12 patches
    assert [trace.tokens.count for trace in model.eval().trace(images())[1]] == [8, 4, 4]
