"""dyvit: its predictor, what it does while training and while running, and its losses, worked out by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
from given_inputs import given_input
from torch import Tensor, nn

from tokencut.attention import HIDDEN
from tokencut.blocks import Stage
from tokencut.methods import StageShape, make_method, methods
from tokencut.methods.dyvit import (
    Predictor,
    prediction_distillation_loss,
    ratio_loss,
    token_distillation_loss,
)
from tokencut.model import CompressedModel, compress

DYVIT = make_method("dyvit")
# Rows that layer norm leaves as they are, up to its epsilon: mean 0, variance 1.
ROWS = [[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]


def gelu(x: float) -> float:
    return x * 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


@pytest.fixture
def predictor() -> Predictor:
    """Width 4, by hand: the embedding is the identity; the score looks at the first number of each half."""
    built = Predictor(4, seed=1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
        built.norm.weight.fill_(1.0)
        built.embed.weight.copy_(torch.eye(4))
        built.mix.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))
        built.narrow.weight.copy_(torch.tensor([[1.0, 2.0]]))
        built.score.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    return built


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=5).eval()


def margin(own: float, shared: float) -> float:
    """Log-odds of keeping a token whose embedding starts with `own`, beside an average that starts with `shared`."""
    return 2.0 * gelu(gelu(own) + 2.0 * gelu(shared))


def odds(out: Tensor) -> list[float]:
    """Log-odds of keeping each token of the first image, from what a predictor gives."""
    values: list[float] = (out[0, :, 0] - out[0, :, 1]).tolist()
    return values


def certain(predictor: Predictor, keep: bool) -> None:
    """Makes a predictor certain of keeping or of dropping every token."""
    with torch.no_grad():
        predictor.score.bias.copy_(torch.tensor([50.0, -50.0] if keep else [-50.0, 50.0]))


def predictor_of(compressed: CompressedModel, layer: str) -> Predictor:
    """The predictor of a stage."""
    learned = compressed.stages[layer].learned
    assert isinstance(learned, Predictor)
    return learned


def test_predictor_by_hand(predictor: Predictor) -> None:
    # Each token sees its own first number and the average of the third.
    average = (2 * gelu(1.0) + gelu(-1.0)) / 3
    out = predictor(torch.tensor([ROWS]))
    assert odds(out) == pytest.approx([margin(gelu(row[0]), average) for row in ROWS], abs=1e-4)
    assert out.exp().sum(2)[0].tolist() == pytest.approx([1.0] * 3)


def test_average_is_over_the_tokens_that_are_left(predictor: Predictor) -> None:
    out = predictor(torch.tensor([ROWS]), torch.tensor([[1.0, 0.0, 1.0]]))
    average = (gelu(1.0) + gelu(-1.0)) / 2
    assert odds(out)[0] == pytest.approx(margin(gelu(1.0), average), abs=1e-4)


def test_an_image_without_any_token_left_has_an_average_of_zero(predictor: Predictor) -> None:
    out = predictor(torch.tensor([ROWS]), torch.zeros(1, 3))
    assert odds(out)[0] == pytest.approx(margin(gelu(1.0), 0.0), abs=1e-4)


def test_running_drops_the_tokens_scored_lowest(predictor: Predictor) -> None:
    # Tokens 0 and 2 score alike and above token 1.
    stage = Stage(DYVIT, predictor).eval()
    left = stage(given_input(ROWS), 2)
    assert left.image[0].tolist() == [ROWS[0], ROWS[2]]
    assert left.policy is None
    assert stage(given_input(ROWS), 1).image[0].tolist() == [ROWS[0]]


def test_half_precision_weights_decide_in_fp32(predictor: Predictor) -> None:
    half = copy.deepcopy(predictor).half()
    out = half(torch.tensor([ROWS]).half())
    assert out.dtype == torch.float32
    assert torch.allclose(out, predictor(torch.tensor([ROWS])))


def test_training_hides_tokens_and_keeps_those_hidden_before(predictor: Predictor) -> None:
    certain(predictor, keep=True)
    stage = Stage(DYVIT, predictor).train()
    stage_input = given_input(ROWS)
    kept = stage(stage_input, 1)
    assert kept.policy is not None
    assert kept.policy.tolist() == [[1.0, 1.0, 1.0]]
    assert torch.equal(kept.features, stage_input.tokens.features)
    certain(predictor, keep=False)
    gone = stage(stage_input, 1)
    assert gone.policy is not None
    assert gone.policy.tolist() == [[0.0, 0.0, 0.0]]
    gone.policy.sum().backward()
    assert all(parameter.grad is not None for parameter in predictor.parameters())


def test_a_hidden_token_never_comes_back(predictor: Predictor) -> None:
    certain(predictor, keep=True)
    stage_input = given_input(ROWS)
    before = torch.tensor([[0.0, 1.0, 0.0]])
    tokens = replace(stage_input.tokens, policy=before)
    after = Stage(DYVIT, predictor).train()(replace(stage_input, tokens=tokens), 1)
    assert after.policy is not None
    assert after.policy.tolist() == before.tolist()


def test_initial_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(0)
    first, state = Predictor(8, seed=4).state_dict(), torch.get_rng_state()
    torch.manual_seed(99)
    again, other = Predictor(8, seed=4).state_dict(), Predictor(8, seed=7).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_each_reducing_block_has_a_predictor_on_the_models_device(model: nn.Module) -> None:
    compressed = compress(model, layers=[1, 3], method="dyvit")
    assert not torch.equal(predictor_of(compressed, "1").embed.weight, predictor_of(compressed, "3").embed.weight)
    on_meta = CompressedModel(model.to("meta"), compressed.recipe)
    assert {parameter.device.type for parameter in on_meta.stages.parameters()} == {"meta"}


def test_it_is_the_only_method_that_says_it_needs_training() -> None:
    assert [name for name, method in methods().items() if method.needs_training] == ["dyvit"]


def test_an_input_without_a_predictor_is_refused() -> None:
    with pytest.raises(TypeError, match="method dyvit decides by the predictor of its stage"):
        DYVIT.decide(given_input(ROWS), 1)


def test_training_with_everything_kept_is_the_dense_model(model: nn.Module) -> None:
    compressed = compress(model, keep=0.5, layers=[1, 3], method="dyvit").train()
    certain(predictor_of(compressed, "1"), keep=True)
    certain(predictor_of(compressed, "3"), keep=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(compressed(images), model(images), atol=1e-4)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_hidden_tokens_change_nothing_that_others_see(name: str) -> None:
    """Hiding all image tokens after block 1 is, for the prefix and the head, dropping them: class token and average."""
    torch.manual_seed(0)
    dense = timm.create_model(name, img_size=32, num_classes=5).eval()
    compressed = compress(dense, keep=0.5, layers=[1], method="dyvit").train()
    certain(predictor_of(compressed, "1"), keep=False)
    images = torch.randn(2, 3, 32, 32)
    logits, traces = compressed.trace(images)
    policy = traces[0].tokens.policy
    assert policy is not None
    assert policy.sum() == 0
    assert traces[-1].tokens.count == traces[0].tokens.count
    hidden = traces[0].tokens.features.clone()
    # The hidden tokens' features are replaced behind the stage; only the share HIDDEN of their weight can be seen.
    hidden[:, traces[0].tokens.num_prefix_tokens :] = torch.randn_like(hidden[:, traces[0].tokens.num_prefix_tokens :])
    loop = compressed.loop
    tokens = loop.mlp_half(1, traces[0].tokens.with_features(hidden))
    for number in range(2, loop.depth + 1):
        tokens = loop.step(number, tokens)
    prefix = slice(0, tokens.num_prefix_tokens)
    assert torch.allclose(tokens.features[:, prefix], traces[-1].tokens.features[:, prefix], atol=1e-3)
    assert torch.allclose(loop.head(tokens), logits, atol=1e-3)


def test_gradients_reach_every_predictor_through_later_blocks(model: nn.Module) -> None:
    torch.manual_seed(1)
    compressed = compress(model, keep=0.5, layers=[1, 3], method="dyvit").train()
    compressed(torch.randn(4, 3, 32, 32)).square().sum().backward()
    for name, parameter in compressed.stages.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_straight_through_gradient_of_a_hidden_token() -> None:
    # Two keys with logits 0 and a policy p for the second: its weight is (p + e) / (1 + e + p + e), whose slope at
    # p = 0 is (1 + e) / (1 + 2e)^2, nearly 1.
    policy = torch.zeros(1, requires_grad=True)
    weights = torch.stack((torch.tensor(1.0 + HIDDEN).log(), (policy[0] + HIDDEN).log())).softmax(0)
    (slope,) = torch.autograd.grad(weights[1], policy)
    assert slope.item() == pytest.approx(1.0, abs=1e-4)


def test_ratio_loss_by_hand() -> None:
    first, second = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2)
    # Kept 0.75 and 0.25 against 0.5: 0.0625 each; kept 0.25 twice against 0.25: 0.
    assert float(ratio_loss([first, second], [0.5, 0.25])) == pytest.approx(0.03125)
    with pytest.raises(ValueError, match="zip"):
        ratio_loss([first], [0.5, 0.25])


def test_token_distillation_loss_by_hand() -> None:
    teacher = torch.zeros(1, 3, 2)
    features = torch.tensor([[[1.0, 1.0], [2.0, 0.0], [9.0, 9.0]]])
    # Mean squared errors 1, 2 and 81; the last token is gone.
    assert float(token_distillation_loss(features, teacher, torch.tensor([[1.0, 1.0, 0.0]]))) == pytest.approx(1.5)
    assert float(token_distillation_loss(features, teacher, torch.zeros(1, 3))) == 0.0


def test_prediction_distillation_loss_by_hand() -> None:
    # Teacher (3/4, 1/4), model (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2); the second image agrees.
    teacher = torch.tensor([[math.log(3.0), 0.0], [1.0, 2.0]])
    model = torch.tensor([[0.0, 0.0], [2.0, 3.0]])
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert float(prediction_distillation_loss(model, teacher)) == pytest.approx(expected)


def test_costs_by_hand() -> None:
    # 192 -> 192 -> 96 -> 48 -> 2 for each of 196 tokens.
    shape = StageShape(tokens=196, budget=138, width=192, key_width=64)
    assert DYVIT.macs(shape) == 196 * (192 * 192 + 192 * 96 + 96 * 48 + 48 * 2)
    assert not DYVIT.reads_attention()
