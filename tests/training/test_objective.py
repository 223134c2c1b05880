"""The objective: terms against values worked by hand, gradients that flow, nothing computed that does not count."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from model_files import SIZE, compressed_model, images
from torch import Tensor, nn

from tokencut.errors import UsageError
from tokencut.methods import make_method
from tokencut.model import CompressedModel, compress
from tokencut.training.objective import (
    DYVIT_PREDICTIONS,
    DYVIT_RATIO,
    DYVIT_TOKENS,
    Objective,
    ObjectiveSettings,
    diversity_loss,
    feature_distillation,
    hard_distillation,
    importance_loss,
    soft_distillation,
    without_teacher_logits,
)

TARGETS = torch.tensor([0, 3, 1])


def shaken(model: CompressedModel) -> CompressedModel:
    """The same model, no longer equal to its teacher, in train mode."""
    with torch.no_grad():
        for index, weight in enumerate(model.parameters()):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
            weight.add_(0.05 * noise)
    return model.train()


def test_importance_by_hand() -> None:
    # Attentive are 0.4 and 0.2 of 0.8, and 0.3 and 0.1 of 0.5: shares 3/4 and 4/5.
    attention = torch.tensor([[0.1, 0.4, 0.1, 0.2], [0.3, 0.05, 0.05, 0.1]])
    assert importance_loss(attention, 2).item() == pytest.approx((math.log(4 / 3) + math.log(5 / 4)) / 2, rel=1e-6)
    assert importance_loss(attention, 4).item() == pytest.approx(0.0, abs=1e-6)


def test_importance_draws_attention_to_the_attentive() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5]], requires_grad=True)
    importance_loss(logits.softmax(1), 1).backward()
    assert logits.grad is not None
    share = math.exp(1.0) / (1.0 + math.exp(1.0) + math.exp(0.5))
    assert logits.grad[0, 1].item() == pytest.approx(share - 1, rel=1e-5)  # d(-log softmax)
    assert (logits.grad[0, [0, 2]] > 0).all()


def test_importance_is_finite_where_nothing_is_attended_to() -> None:
    assert importance_loss(torch.zeros(1, 3), 1).item() == 0.0


def test_diversity_by_hand() -> None:
    # Cosines of the three pairs: 0, 1/sqrt 2, 1/sqrt 2; squares 0, 1/2, 1/2. Lengths do not count.
    first = [[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]
    alike = [[1.0, 0.0], [-4.0, 0.0], [2.0, 0.0]]
    tokens = torch.tensor([first, alike])
    assert diversity_loss(tokens).item() == pytest.approx((1 / 3 + 1) / 2, rel=1e-6)
    assert diversity_loss(torch.ones(2, 1, 4)).item() == 0.0  # no pair


def test_diversity_pushes_tokens_apart() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], requires_grad=True)
    diversity_loss(tokens).backward()
    assert tokens.grad is not None
    # cos^2 = 1/2 of an angle of 45 degrees; its slope by the angle is -1, and the first token turns by dy / 1.
    assert tokens.grad[0, 0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_distillations_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert soft_distillation(student, teacher, 1.0).item() == pytest.approx(divergence, rel=1e-5)
    root = math.sqrt(3.0)
    p = root / (1 + root)
    softer = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert soft_distillation(student, teacher, 2.0).item() == pytest.approx(4 * softer, rel=1e-4)
    assert hard_distillation(teacher, torch.tensor([[0.0, 1.0]])).item() == pytest.approx(math.log(4.0), rel=1e-6)
    assert feature_distillation(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])).item() == pytest.approx(0.4)


def test_the_total_is_the_weighted_sum_of_its_terms() -> None:
    model = compressed_model()
    settings = ObjectiveSettings(distill_weight=0.25, alpha=0.3, beta=0.7)
    objective = Objective(model, settings)
    losses = objective(images(), TARGETS) if shaken(model) else None
    assert losses is not None
    terms = {name: value.item() for name, value in losses.terms.items()}
    assert set(terms) == {"task", "distillation", "importance", "diversity"}
    expected = 0.75 * terms["task"] + 0.25 * terms["distillation"]
    assert losses.total.item() == pytest.approx(expected + 0.3 * terms["importance"] + 0.7 * terms["diversity"])
    losses.total.backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize(
    ("term", "reaches"), [("alpha", "blocks.1.attn.qkv.weight"), ("beta", "patch_embed.proj.weight")]
)
def test_each_stage_term_has_a_gradient_of_its_own(term: str, reaches: str) -> None:
    model = compressed_model()
    plain = Objective(model, ObjectiveSettings(distill="none"))
    with_term = Objective(model, ObjectiveSettings(distill="none", **{term: 1.0}))
    model.train()

    def gradient(objective: Objective) -> Tensor:
        model.zero_grad()
        objective(images(), TARGETS).total.backward()
        grad = dict(model.model.named_parameters())[reaches].grad
        assert grad is not None
        return grad.clone()

    assert not torch.allclose(gradient(plain), gradient(with_term))


def test_stage_terms_are_those_of_the_traces() -> None:
    model = compressed_model("test_vit", "evit")
    losses = Objective(model, ObjectiveSettings(distill="none", alpha=1.0, beta=1.0))(images(), TARGETS)
    _, traces = model.trace(images(), attention=True)
    assert [(trace.block, trace.attentive) for trace in traces] == [(2, 7), (4, 3), (6, 0)]
    rows = [trace.attention for trace in traces[:2]]
    assert [row.shape for row in rows if row is not None] == [(3, 16), (3, 8)]
    importance = [importance_loss(row, k) for row, k in zip(rows, (7, 3), strict=True) if row is not None]
    diversity = [diversity_loss(trace.tokens.image) for trace in traces[:2]]
    assert torch.allclose(losses.terms["importance"], torch.stack(importance).mean())
    assert torch.allclose(losses.terms["diversity"], torch.stack(diversity).mean())


def test_attentive_tokens_of_the_paper_are_its_own_and_of_the_default_those_that_leave() -> None:
    paper, default = make_method("bat", {"preset": "paper"}), make_method("bat")
    assert paper.attentive(16, 8) == paper.split(16, 8).attentive  # type: ignore[attr-defined]
    assert default.attentive(16, 8) == 8


def test_nothing_is_traced_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed_model().train()
    monkeypatch.setattr(CompressedModel, "trace", lambda *_, **__: pytest.fail("traced"))
    terms = Objective(model, ObjectiveSettings())(images(), TARGETS).terms
    assert set(terms) == {"task", "distillation"}


def test_the_teacher_is_the_uncompressed_model_as_it_was() -> None:
    model = compressed_model()
    dense = model.model(images()).detach()
    objective = Objective(model, ObjectiveSettings())
    shaken(model)
    assert objective.teacher is not None
    assert torch.equal(objective.teacher(images()), dense)
    assert not any(weight.requires_grad for weight in objective.teacher.parameters())


def test_features_distil_pooled_tokens_without_logits() -> None:
    model = compressed_model()
    objective = Objective(model, ObjectiveSettings(distill="features", distill_weight=2.0))
    losses = objective(images(), TARGETS)
    dense = model.model.forward_head(model.model.forward_features(images()), pre_logits=True)
    cut = model.trace(images())[1][-1].tokens
    pooled = model.model.norm(cut.features)[:, 0]
    expected = feature_distillation(pooled, dense)
    assert losses.terms["distillation"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses.total.item() == pytest.approx((losses.terms["task"] + 2 * losses.terms["distillation"]).item())


def test_mixed_labels_are_not_smoothed_twice() -> None:
    model = compressed_model()
    objective = Objective(model, ObjectiveSettings(label_smoothing=0.5, distill="none"))
    mixed = torch.eye(5)[TARGETS]
    plain = Objective(model, ObjectiveSettings(distill="none"))(images(), TARGETS)
    assert torch.allclose(objective(images(), mixed).total, plain.total)
    assert not torch.allclose(objective(images(), TARGETS).total, plain.total)


def two_heads() -> CompressedModel:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=SIZE, num_classes=5, depth=3, embed_dim=24, num_heads=2
    )
    with torch.no_grad():
        model.head_dist.weight.normal_()  # type: ignore[union-attr, operator]
    return compress(model, keep=0.5, layers=[2])


def test_two_heads_learn_one_each_and_answer_together() -> None:
    model = two_heads()
    objective = Objective(model, ObjectiveSettings(distill="hard"))
    losses = objective(images(), TARGETS) if model.train() else None
    assert losses is not None
    model.zero_grad()
    losses.total.backward()
    logits, distilled = model(images())
    assert objective.teacher is not None
    taught = objective.teacher(images())
    assert losses.terms["task"].item() == pytest.approx(nn.functional.cross_entropy(logits, TARGETS).item(), rel=1e-5)
    assert losses.terms["distillation"].item() == pytest.approx(hard_distillation(distilled, taught).item(), rel=1e-5)
    objective.close()
    assert torch.allclose(model.eval()(images()), (logits + distilled) / 2, atol=1e-5)


def test_two_heads_without_distillation_are_trained_as_they_are_run() -> None:
    model = two_heads()
    losses = Objective(model, ObjectiveSettings(distill="none"))(images(), TARGETS) if model.train() else None
    assert losses is not None
    assert torch.allclose(losses.total, nn.functional.cross_entropy(model.eval()(images()), TARGETS), atol=1e-6)


def test_dyvit_takes_the_losses_of_its_paper() -> None:
    model = compressed_model("test_vit", "dyvit")
    losses = Objective(model, ObjectiveSettings())(images(), TARGETS) if model.train() else None
    assert losses is not None
    terms = losses.terms
    assert set(terms) == {"task", "ratio", "distillation", "tokens"}
    weighted = DYVIT_RATIO * terms["ratio"] + DYVIT_PREDICTIONS * terms["distillation"] + DYVIT_TOKENS * terms["tokens"]
    assert torch.allclose(losses.total, terms["task"] + weighted)
    losses.total.backward()
    assert all(weight.grad is not None for weight in model.stages.parameters())
    alone = Objective(model, ObjectiveSettings(distill="none"))(images(), TARGETS)
    assert set(alone.terms) == {"task", "ratio"}


@pytest.mark.parametrize(
    ("method", "settings", "compiled", "words"),
    [
        ("dyvit", ObjectiveSettings(alpha=1.0), False, "method dyvit trains with its own losses, without `alpha` and "
         "`beta`; leave them out"),
        ("dyvit", ObjectiveSettings(distill="hard"), False, "method dyvit distils softly, as published; type "
         "`distill='soft'` or none, not hard"),
        ("bat", ObjectiveSettings(distill="features"), True, "`distill='features'` reads pooled tokens from inside the "
         "model, which `compiled` hides; type `distill='soft'`, or leave out `compiled`"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(method: str, settings: ObjectiveSettings, compiled: bool, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Objective(compressed_model("test_vit", method), settings, compile_mode="default" if compiled else None)
    assert str(caught.value) == words


def test_a_new_head_has_no_logits_to_distil_from() -> None:
    assert without_teacher_logits(ObjectiveSettings(distill="hard")).distill == "none"
    assert without_teacher_logits(ObjectiveSettings(distill="features")).distill == "features"
