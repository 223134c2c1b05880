"""Agreement with outputs recorded from the original implementations (../shared/golden, see its data README).

`kmedoids` and `dyvit` have no recording; nothing is claimed for them here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from given_inputs import GivenAttention, as_it_is, grouping
from safetensors.torch import load_file
from torch import Tensor, nn

from tokencut.blocks import Stage
from tokencut.methods import StageInput, make_method
from tokencut.model import compress
from tokencut.tokens import Tokens

Recording = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(shared: Path) -> Recording:
    return load_file(shared / "golden" / "models_a.safetensors")


@pytest.fixture(scope="module")
def stages(shared: Path) -> Recording:
    return load_file(shared / "golden" / "stages_a.safetensors")


@pytest.fixture(scope="module")
def dense(shared: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{shared / 'checkpoints' / 'cifar10_vit'}", pretrained=True).eval()


def recorded_input(stages: Recording, block: int) -> StageInput:
    """The stage's input in a recording; class token first."""
    given = GivenAttention((), 1, (0,), points=stages[f"block{block}.keys"][:, 1:])
    return StageInput(Tokens(stages[f"block{block}.tokens"], 1), given, as_it_is)


def named_by_smallest(group: Tensor) -> Tensor:
    """Each token's group by the smallest number in it."""
    same = group.unsqueeze(2) == group.unsqueeze(1)
    count = group.shape[1]
    return torch.where(same, torch.arange(count), count).amin(2)


def test_dense_logits(dense: nn.Module, models: Recording) -> None:
    with torch.no_grad():
        assert torch.allclose(dense(models["images"]), models["dense_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("keep", [0.7, 0.5])
@pytest.mark.parametrize(
    ("recording", "method", "options"), [("fused", "evit", {"extra_token": True}), ("dropped", "topk", {})]
)
def test_evit_logits(
    dense: nn.Module, models: Recording, keep: float, recording: str, method: str, options: dict[str, bool]
) -> None:
    compressed = compress(dense, keep=keep, layers=[4, 7, 10], method=method, method_options=options)
    with torch.no_grad():
        logits = compressed(models["images"])
    assert torch.allclose(logits, models[f"evit.keep{keep}.{recording}.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("reduce_by", [2, 4])
@pytest.mark.parametrize(("recording", "prop_attn"), [("prop", True), ("noprop", False)])
def test_tome_logits(dense: nn.Module, models: Recording, reduce_by: int, recording: str, prop_attn: bool) -> None:
    compressed = compress(dense, reduce_by=reduce_by, method="tome", prop_attn=prop_attn)
    assert len(compressed.recipe.stages) == 12
    with torch.no_grad():
        logits = compressed(models["images"])
    assert torch.allclose(logits, models[f"tome.r{reduce_by}.{recording}.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("removed", [8, 24])
def test_tome_matching_and_merging(stages: Recording, block: int, removed: int) -> None:
    stage_input, recorded = recorded_input(stages, block), f"block{block}.tome.r{removed}"
    method = make_method("tome")
    group = grouping(method, stage_input, 64 - removed).group
    # The recording numbers the class token 0.
    assert torch.equal(named_by_smallest(group) + 1, stages[f"{recorded}.group"][:, 1:])
    left = Stage(method)(stage_input, 64 - removed)
    into = group.unsqueeze(2).expand(-1, -1, left.image.shape[2])
    assert torch.allclose(left.image.gather(1, into), stages[f"{recorded}.value"][:, 1:], atol=1e-5, rtol=0)
    assert torch.equal(left.features[:, 0], stages[f"{recorded}.value"][:, 0])
    assert left.sizes is not None
    assert torch.equal(left.sizes.gather(1, group), stages[f"{recorded}.size"][:, 1:])


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("clusters", [32, 12])
def test_density_peak_clusters(stages: Recording, block: int, clusters: int) -> None:
    method = make_method("dpc", {"features": "tokens", "neighbours": 5})
    group = grouping(method, recorded_input(stages, block), clusters).group
    recorded = f"block{block}.dpc.clusters{clusters}"
    valid = stages[f"{recorded}.valid"]
    assert valid.any()
    assert torch.equal(named_by_smallest(group)[valid], stages[f"{recorded}.group"][valid])
