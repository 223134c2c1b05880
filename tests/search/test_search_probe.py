"""What a schedule does, by the probe: the same as the compressed model itself, however it got there."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from search_models import images, reduced, small_model

from tokencut import compress
from tokencut.cost import total
from tokencut.errors import ModelError
from tokencut.model import predicted_macs
from tokencut.search.probe import Costs, Outcome, Probe, inverse_temperature
from tokencut.search.space import keeps

COUNTS = (16, 12, 12, 7, 7, 3)
LABELS = torch.tensor([0, 1, 2] * 4)


def itself(counts: tuple[int, ...], **settings: object) -> torch.Tensor:
    """Logits of the compressed model with that schedule."""
    layers, keep = keeps(16, counts, lambda tokens, budget: budget)
    model = compress(small_model(), keep=keep, layers=layers, **settings).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images()])


def dense() -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([small_model()(batch) for batch in images()])


@pytest.mark.parametrize("place", ["", "blocks"])
def test_hooks_that_a_search_would_not_run_are_refused_and_others_run(place: str) -> None:
    hooked = reduced(method="topk")
    handle = hooked.model.get_submodule(place).register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ModelError, match="a search runs them one by one; take them off for it"):
        Probe(hooked, images(), LABELS)
    handle.remove()
    hooked.model.blocks[1].register_forward_hook(lambda module, args, output: output * 1.5)
    found, plain = (Probe(model, images(), LABELS).measure(COUNTS) for model in (hooked, reduced(method="topk")))
    assert found is not None and plain is not None and not torch.equal(found.divergence, plain.divergence)


@pytest.mark.parametrize("method", ["bat", "tome", "topk"])
def test_damage_is_that_of_the_compressed_model(method: str) -> None:
    probe = Probe(reduced(method=method), images(), LABELS)
    outcome = probe.measure(COUNTS)
    assert outcome is not None and outcome.right is not None and outcome.agrees is not None
    logits = itself(COUNTS, method=method)
    expected = F.kl_div(logits.log_softmax(1), dense().log_softmax(1), log_target=True, reduction="none").sum(1)
    assert torch.allclose(outcome.divergence, expected.double(), atol=1e-6)
    assert outcome.right.tolist() == (logits.argmax(1) == LABELS).tolist()
    assert outcome.agrees.tolist() == (logits.argmax(1) == dense().argmax(1)).tolist()


def test_a_pool_that_attends_is_told_the_sizes_of_tokens() -> None:
    torch.manual_seed(0)
    dense = timm.create_model("test_vit3", img_size=64, num_classes=3).eval()
    depth = len(dense.blocks)
    counts = (16, *[6] * (depth - 1))
    outcome = Probe(reduced(dense, prop_attn=True), images(), None).measure(counts)
    layers, keep = keeps(16, counts, lambda tokens, budget: budget)
    model = compress(dense, keep=keep, layers=layers, prop_attn=True).eval()
    with torch.no_grad():
        logits, whole = (torch.cat([each(batch) for batch in images()]).log_softmax(1) for each in (model, dense))
        # Without its blocks' knowledge of sizes the head alone differs; it must be the model's own.
        tokens = model.loop.run(model.loop.embed(images()[0]), model.recipe.stages)
        assert not torch.allclose(model.loop.head(replace(tokens, bias=None)), model(images()[0]), atol=1e-4)
    assert outcome is not None
    expected = F.kl_div(logits, whole, log_target=True, reduction="none").sum(1)
    assert torch.allclose(outcome.divergence, expected.double(), atol=1e-6)


def test_a_method_that_lets_more_leave_than_its_budget_is_judged_as_it_runs() -> None:
    options = {"extra_token": True}
    model = reduced(method="evit", method_options=options)
    layers, keep = keeps(16, (16, 9, 9, 6, 6, 6), model.method.tokens_out)
    compressed = compress(small_model(), keep=keep, layers=layers, method="evit", method_options=options).eval()
    assert [plan.tokens_out for plan in compressed.recipe.stages] == [9, 6]
    outcome = Probe(model, images(), None).measure((16, 9, 9, 6, 6, 6))
    with torch.no_grad():
        logits = torch.cat([compressed(batch) for batch in images()])
    expected = F.kl_div(logits.log_softmax(1), dense().log_softmax(1), log_target=True, reduction="none").sum(1)
    assert outcome is not None
    assert torch.allclose(outcome.divergence, expected.double(), atol=1e-6)


def test_the_dense_model_harms_nothing() -> None:
    probe = Probe(reduced(), images(), None)
    assert probe.dense.mean == 0
    assert probe.dense.right is None
    outcome = probe.measure((16,) * 6)
    assert outcome is not None and abs(outcome.mean) < 1e-6


def test_kept_tokens_change_nothing_but_the_work() -> None:
    probe = Probe(reduced(), images(), LABELS)
    probe.measure(COUNTS)
    probe.set_reference(COUNTS)
    other = (*COUNTS[:4], 5, 3)
    before = probe.spent
    outcome = probe.measure(other)
    rows = Costs(reduced()).rows(other)
    # Blocks 5 and 6 and the head ran, for 12 images; rows begin with the embedding.
    assert probe.spent - before == pytest.approx(12 * sum(row.macs for row in rows[5:]) / 1e9)
    alone = Probe(reduced(), images(), LABELS).measure(other)
    assert outcome is not None and alone is not None
    assert torch.equal(outcome.divergence, alone.divergence)


def test_only_what_was_measured_last_can_be_the_reference() -> None:
    probe = Probe(reduced(), images(), LABELS)
    probe.measure(COUNTS)
    probe.measure((8,) * 6)
    probe.set_reference(COUNTS)
    before = probe.spent
    probe.measure(COUNTS)
    assert probe.spent - before == pytest.approx(12 * sum(row.macs for row in Costs(reduced()).rows(COUNTS)[1:]) / 1e9)


def test_what_falls_behind_is_given_up() -> None:
    probe = Probe(reduced(), images(), LABELS)
    perfect = Outcome(torch.zeros(12).double(), None, None)
    hopeless = Outcome(torch.full((12,), 1e6).double(), None, None)
    assert probe.measure((1,) * 6, perfect) is None
    assert probe.measure((1,) * 6, hopeless) is not None


def test_a_share_of_the_images() -> None:
    probe = Probe(reduced(), images(), LABELS)
    part, whole = probe.measure(COUNTS, share=0.3), probe.measure(COUNTS)
    assert part is not None and whole is not None
    assert part.divergence.tolist() == whole.divergence[:4].tolist()


def test_costs_are_those_of_the_model() -> None:
    model = reduced()
    counts = []
    for row in predicted_macs(model)[1:-1]:
        counts.append(row.tokens_out)
    assert Costs(model).gmacs(tuple(counts)) == total(predicted_macs(model)) / 1e9


def test_without_a_head_features_are_compared() -> None:
    model = small_model(num_classes=0)
    outcome = Probe(reduced(model), images(), None).measure(COUNTS)
    assert outcome is not None
    assert outcome.agrees is None
    layers, keep = keeps(16, COUNTS, lambda tokens, budget: budget)
    with torch.no_grad():
        pairs = [(model(b), compress(model, keep=keep, layers=layers).eval()(b)) for b in images()]
    cosine = torch.cat([F.cosine_similarity(first, second) for first, second in pairs])
    assert torch.allclose(outcome.divergence, 1 - cosine.double(), atol=1e-6)


def test_a_model_without_pooling_is_refused() -> None:
    model = small_model(num_classes=0, global_pool="")
    with pytest.raises(ModelError, match=r"outputs of shape \(4, 17, 64\).*`global_pool='avg'`"):
        Probe(reduced(model), images(), None)


def test_outputs_that_are_not_numbers_are_refused() -> None:
    model = small_model()
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(ModelError, match="not finite numbers; check its weights"):
        Probe(reduced(model), images(), None)


def test_margins_are_what_turned_decisions_lose() -> None:
    probe = Probe(reduced(), images(), LABELS)
    outcome = probe.measure((1,) * 6)
    assert outcome is not None and outcome.margin is not None and outcome.agrees is not None
    likely = (inverse_temperature(dense(), LABELS) * dense()).softmax(1)
    chosen = itself((1,) * 6).argmax(1)
    expected = [float(row.max() - row[choice]) for row, choice in zip(likely, chosen, strict=True)]
    assert outcome.margin.tolist() == pytest.approx(expected, abs=1e-6)
    assert not outcome.margin[outcome.agrees].any()


def test_the_inverse_temperature_fits_the_labels() -> None:
    # Three of four labels are the likelier class: its probability is 3/4 where the logits differ by log 3.
    logits = torch.tensor([[1.0, 0.0]] * 4)
    assert inverse_temperature(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(math.log(3), rel=1e-6)
    assert inverse_temperature(logits, torch.tensor([0, 0, 0, 0])) == pytest.approx(10)
    assert inverse_temperature(logits, torch.tensor([1, 1, 1, 1])) == pytest.approx(0.1)
