"""What holds for every method on any input: counts, prefix, sizes and source map, hostile inputs, order, batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from given_inputs import centres_of, input_of, patches_in, random_input
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokencut.blocks import Stage
from tokencut.methods import StageInput, StageShape, make_method
from tokencut.ops.grouping import Selection
from tokencut.tokens import Tokens

Options = dict[str, object]

METHODS = ("bat", "dpc", "dyvit", "evit", "kmedoids", "random", "tome", "topk")
# Those whose decision does not depend on where a token stands.
PLACELESS = ("bat", "dpc", "evit", "kmedoids", "topk")
# Settings that take another path than the defaults.
VARIANTS: tuple[tuple[str, Options], ...] = (
    ("bat", {"preset": "paper"}),
    ("bat", {"clusters": 0.5, "pairs": 0.5, "weights": "product", "features": "keys"}),
    ("bat", {"inattentive": "drop", "pairs": 0.5}),
    ("bat", {"inattentive": "drop", "pairs": 0}),
    ("dpc", {"weights": "product", "features": "keys"}),
    ("evit", {"normalized": True}),
    ("kmedoids", {"weights": "attention", "iterations": 0}),
    ("kmedoids", {"features": "keys", "weights": "equal"}),
)
CASES: list[tuple[str, Options]] = [*((method, {}) for method in METHODS), *VARIANTS]
every_method = pytest.mark.parametrize(("method", "options"), CASES, ids=str)


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    """Image tokens entering, and a budget below."""
    tokens = draw(st.integers(2, 20))
    return tokens, draw(st.integers(1, tokens - 1))


def stage_of(method: str, options: Options, width: int = 8) -> Stage:
    built = make_method(method, options)
    return Stage(built, built.make_module(width, seed=1)).eval()


def decide(stage: Stage, stage_input: StageInput, budget: int) -> Tensor:
    """The decision as numbers: group of each token, or the tokens that stay."""
    with torch.no_grad():
        decision = stage.method.decide(replace(stage_input, learned=stage.learned), budget)
    return decision.index if isinstance(decision, Selection) else decision.group


def check_leaving(stage: Stage, stage_input: StageInput, budget: int) -> Tokens:
    """Runs a stage and checks what every outcome has to be."""
    before = stage_input.tokens
    with torch.no_grad():
        left = stage(stage_input, budget)
    assert left.count == budget
    assert left.num_prefix_tokens == before.num_prefix_tokens
    assert left.features.dtype == before.features.dtype
    assert torch.equal(left.features[:, : before.num_prefix_tokens], before.features[:, : before.num_prefix_tokens])
    assert left.features.isfinite().all()
    return left


@every_method
@settings(max_examples=12)
@given(
    counts=counts(),
    batch=st.integers(1, 3),
    prefix=st.integers(0, 5),
    merged=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_counts_prefix_sizes_source_and_positions(
    method: str, options: Options, counts: tuple[int, int], batch: int, prefix: int, merged: bool, seed: int
) -> None:
    tokens, budget = counts
    stage_input, stage = random_input(seed, batch, tokens, prefix, merged=merged), stage_of(method, options)
    before = stage_input.tokens.source
    assert before is not None
    places = torch.randn(before.shape[1], 2, generator=torch.Generator().manual_seed(seed))
    stage_input = replace(stage_input, tokens=replace(stage_input.tokens, positions=centres_of(before, tokens, places)))
    left = check_leaving(stage, stage_input, budget)
    after = left.source
    assert after is not None
    assert left.positions is not None
    # A token is where its patches are on average, whatever its features weigh them by.
    torch.testing.assert_close(left.positions, centres_of(after, budget, places), rtol=1e-4, atol=1e-5)
    # A patch that was dropped stays dropped, every other one lies in one token, and the sizes say how many do.
    assert (after[before < 0] == -1).all()
    assert after.max() < budget
    assert torch.equal(patches_in(after, budget), left.known_sizes())
    assert (left.known_sizes() >= 1).all()
    if stage.method.merges():
        if options.get("inattentive") != "drop":
            assert (after[before >= 0] >= 0).all()
            assert torch.equal(left.known_sizes().sum(1), stage_input.tokens.known_sizes().sum(1))
    else:
        # A token that stays brings its features.
        kept = after >= 0
        features = stage_input.tokens.image.gather(1, before.clamp(min=0).unsqueeze(2).expand(-1, -1, 8))
        arrived = left.image.gather(1, after.clamp(min=0).unsqueeze(2).expand(-1, -1, 8))
        assert torch.equal(features[kept], arrived[kept])


@pytest.mark.parametrize("method", [method for method in METHODS if method != "tome"])
@settings(max_examples=12)
@given(counts=counts(), seed=st.integers(0, 10_000))
def test_tokens_leave_in_the_order_of_their_smallest_patch(method: str, counts: tuple[int, int], seed: int) -> None:
    tokens, budget = counts
    left = check_leaving(stage_of(method, {}), random_input(seed, 2, tokens), budget)
    assert left.source is not None
    patches = torch.arange(tokens)
    inside = left.source.unsqueeze(1) == torch.arange(budget).view(1, budget, 1)
    smallest = torch.where(inside, patches, tokens).amin(2)
    assert (smallest.diff(dim=1) > 0).all()


def hostile(kind: str, dtype: torch.dtype, tokens: int) -> StageInput:
    """An input of the kind that breaks careless arithmetic."""
    stage_input = random_input(3, 2, tokens)
    features = stage_input.tokens.features
    (heads,) = stage_input.attention.layers[0]
    query, key = heads.query, heads.key
    if kind == "constant":
        features, query, key = (values[..., :1, :].expand_as(values) for values in (features, query, key))
    elif kind == "duplicated":
        pairs = torch.arange(features.shape[1]) // 2
        features, query, key = features[:, pairs], query[:, :, pairs], key[:, :, pairs]
    elif kind == "zero":
        features, query, key = features * 0, query * 0, key * 0
    elif kind == "large":
        # Near the end of fp16; for the others as far as a squared norm still fits fp32.
        scale = 6000.0 if dtype == torch.float16 else 1e17
        features, query, key = features * scale, query * 50, key * 50
    elif kind == "one_holds_all":
        # Logits 2000 for one image token and 0 for all others, the class token included: their softmax is exactly 0.
        query, key = torch.full_like(query, 50.0), torch.zeros_like(key)
        key[:, :, 2] = 20.0
    else:
        assert kind == "plain"
    return input_of(
        features.to(dtype), query.to(dtype), key.to(dtype), 1, stage_input.tokens.sizes, stage_input.tokens.source
    )


@every_method
@pytest.mark.parametrize("kind", ["plain", "constant", "duplicated", "zero", "large", "one_holds_all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hostile_inputs_give_no_nan(method: str, options: Options, kind: str, dtype: torch.dtype) -> None:
    stage = stage_of(method, options)
    for tokens, budget in ((9, 6), (9, 2), (9, 1), (2, 1)):
        left = check_leaving(stage, hostile(kind, dtype, tokens), budget)
        assert left.source is not None
        assert torch.equal(patches_in(left.source, budget), left.known_sizes())


def test_one_token_holds_all_attention_exactly() -> None:
    attention = hostile("one_holds_all", torch.float32, 9).attention.class_attention()
    assert attention[0].tolist() == [0.0, 1.0, *[0.0] * 7]


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decisions_are_the_same_in_half_precision(method: str, options: Options, dtype: torch.dtype) -> None:
    """The same numbers, stored in half or under autocast: only what is carried out is rounded, not what is decided."""
    stage_input, stage = hostile("plain", dtype, 16), stage_of(method, options)
    (heads,) = stage_input.attention.layers[0]
    full = input_of(
        stage_input.tokens.features.float(), heads.query.float(), heads.key.float(), 1, source=stage_input.tokens.source
    )
    assert torch.equal(decide(stage, stage_input, 7), decide(stage, full, 7))
    with torch.no_grad():
        expected = stage(full, 7).source
        assert torch.equal(stage(stage_input, 7).source, expected)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(stage(full, 7).source, expected)


@every_method
@settings(max_examples=6)
@given(counts=counts(), seed=st.integers(0, 10_000))
def test_an_image_alone_and_in_a_batch_has_the_same_tokens(
    method: str, options: Options, counts: tuple[int, int], seed: int
) -> None:
    tokens, budget = counts
    stage_input, stage = random_input(seed, 5, tokens, merged=True), stage_of(method, options)
    together = decide(stage, stage_input, budget)
    for number in range(5):
        assert torch.equal(decide(stage, rows(stage_input, [number]), budget)[0], together[number])
    assert torch.equal(decide(stage, rows(stage_input, [4, 2, 0]), budget), together[[4, 2, 0]])


def rows(stage_input: StageInput, images: list[int]) -> StageInput:
    """Some images of an input."""
    tokens, (heads,) = stage_input.tokens, stage_input.attention.layers[0]
    sizes = None if tokens.sizes is None else tokens.sizes[images]
    return input_of(tokens.features[images], heads.query[images], heads.key[images], tokens.num_prefix_tokens, sizes)


@pytest.mark.parametrize(("method", "options"), [case for case in CASES if case[0] in PLACELESS], ids=str)
@settings(max_examples=12)
@given(counts=counts(), prefix=st.integers(0, 2), seed=st.integers(0, 10_000))
def test_permuting_the_image_tokens_permutes_the_outcome(
    method: str, options: Options, counts: tuple[int, int], prefix: int, seed: int
) -> None:
    tokens, budget = counts
    stage_input, stage = random_input(seed, 1, tokens, prefix), stage_of(method, options)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    whole = torch.cat((torch.arange(prefix), order + prefix))
    (heads,) = stage_input.attention.layers[0]
    permuted = input_of(
        stage_input.tokens.features[:, whole],
        heads.query[:, :, whole],
        heads.key[:, :, whole],
        prefix,
        source=order.argsort()[None],
    )
    # Sources name the original places in both, so equal partitions and equal features mean an equal outcome.
    left, other = check_leaving(stage, stage_input, budget), check_leaving(stage, permuted, budget)
    assert left.source is not None
    assert other.source is not None
    assert torch.equal(partition(left.source), partition(other.source))
    assert torch.equal(left.source < 0, other.source < 0)
    assert torch.allclose(per_patch(left), per_patch(other), atol=1e-5)


def partition(source: Tensor) -> Tensor:
    """Which patches lie in the same token."""
    return source.unsqueeze(2) == source.unsqueeze(1)


def per_patch(tokens: Tokens) -> Tensor:
    """Features of the token each patch lies in; 0 where it was dropped."""
    assert tokens.source is not None
    values = tokens.image.gather(1, tokens.source.clamp(min=0).unsqueeze(2).expand(-1, -1, tokens.image.shape[2]))
    return values * (tokens.source >= 0).unsqueeze(2)


@every_method
@settings(max_examples=8)
@given(counts=counts(), prefix=st.integers(1, 3), merged=st.booleans(), seed=st.integers(0, 10_000))
def test_multiply_adds_are_those_that_are_counted(
    method: str, options: Options, counts: tuple[int, int], prefix: int, merged: bool, seed: int
) -> None:
    tokens, budget = counts
    stage_input, stage = random_input(seed, 1, tokens, prefix, merged=merged), stage_of(method, options)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        stage(stage_input, budget)
    # The class row of two heads of width 4; torch counts a multiply-add as two.
    row = 2 * 4 * (prefix + tokens) if stage.method.reads_attention() else 0
    shape = StageShape(tokens, budget, width=8, key_width=4)
    assert counter.get_total_flops() == 2 * (stage.method.macs(shape) + row)


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_is_captured_as_one_graph(method: str) -> None:
    """No shape depends on data and nothing breaks the graph: what `torch.compile` and export need."""
    stage_input, stage = random_input(5, 2, 12), stage_of(method, {})
    (heads,) = stage_input.attention.layers[0]

    def reduce(features: Tensor, query: Tensor, key: Tensor) -> Tensor:
        left: Tokens = stage(input_of(features, query, key, 1), 5)
        return left.features

    torch._dynamo.reset()
    inputs = stage_input.tokens.features, heads.query, heads.key
    with torch.no_grad():
        captured = torch.compile(reduce, backend="eager", fullgraph=True, dynamic=False)
        # Captured, groups are summed by a product, else by adding row to row: in another order, so not to the bit.
        torch.testing.assert_close(captured(*inputs), reduce(*inputs), rtol=1e-5, atol=1e-6)


@every_method
def test_no_gradient_flows_through_a_decision_but_through_what_it_does(method: str, options: Options) -> None:
    stage_input, stage = random_input(5, 2, 12), stage_of(method, options)
    features = stage_input.tokens.features.requires_grad_()
    stage(stage_input, 5).image.sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert all(parameter.grad is None for parameter in stage.parameters())
