"""What stages did, as pictures need it: source maps, counts, and attention spread over patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch

from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import UsageError
from tokencut.model import CompressedModel, compress
from tokencut.visualization.stage_views import DrawnModel, DrawnStage, _on_patches, trace_images

CPU = torch.device("cpu")


def small(**changes: Any) -> CompressedModel:
    """16 image tokens in blocks 2, 4 and 5 of 6; `bat` at keep 0.5 unless told otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", img_size=64, num_classes=3)
    return compress(model, **{"keep": 0.5, **changes})


def seen(model: CompressedModel, batch_size: int = 8, count: int = 3, attention: bool = False) -> DrawnModel:
    pixels = torch.randint(0, 256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return trace_images(model, pixels, preprocessing_of(model), CPU, "fp32", batch_size, attention)


def test_stages_are_those_of_the_recipe() -> None:
    model = small()
    found = seen(model)
    assert (found.grid.rows, found.grid.columns, found.grid.height, found.grid.width) == (4, 4, 16, 16)
    assert [(stage.block, stage.tokens_in, stage.tokens_out) for stage in found.stages] == [
        (plan.block, plan.tokens_in, plan.tokens_out) for plan in model.recipe.stages
    ]
    for stage in found.stages:
        assert stage.heat is None
        assert [sorted(set(row)) for row in stage.source.tolist()] == [list(range(stage.tokens_out))] * 3


def test_batches_make_no_difference_and_the_model_stays_as_it_was() -> None:
    model = small().train()
    whole, parts = seen(model, 8, attention=True), seen(model, 2, attention=True)
    for one, other in zip(whole.stages, parts.stages, strict=True):
        assert np.array_equal(one.source, other.source)
        assert one.heat is not None
        assert other.heat is not None
        assert np.allclose(one.heat, other.heat, rtol=1e-4)
    assert model.training


def test_merged_tokens_and_dropped_patches_are_counted() -> None:
    # Tokens 0 (two patches), 1 and 2 (three patches); two patches dropped.
    stage = DrawnStage(4, 8, 3, np.array([[0, 0, 1, 2, 2, 2, -1, -1]]), None)
    assert vars(stage.view(0)) == {"block": 4, "tokens_in": 8, "tokens_out": 3, "merged": 2, "dropped": 2}
    [*_, last] = seen(small(method="topk")).stages
    assert (last.view(1).merged, last.view(1).dropped) == (0, 16 - last.tokens_out)


def test_attention_on_a_token_is_spread_evenly_over_its_patches() -> None:
    source = np.array([[0, 0, 1, -1]])
    assert _on_patches(np.array([[0.6, 0.1]]), source).tolist() == [[0.3, 0.3, 0.1, 0.0]]
    assert _on_patches(np.array([[-0.2, 0.1]]), source).tolist() == [[0.0, 0.0, 0.1, 0.0]]


def test_attention_is_that_of_the_tokens_that_entered() -> None:
    model = small()
    found = seen(model, attention=True)
    first, second = found.stages[:2]
    pixels = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        _, traces = model.eval().trace(preprocessing_of(model).normalise(pixels, CPU), attention=True)
    assert traces[0].attention is not None
    assert traces[1].attention is not None
    assert first.heat is not None
    assert second.heat is not None
    assert np.allclose(first.heat, traces[0].attention.numpy())  # each token entering holds one patch
    # All patches of a token together have what it has.
    assert np.allclose(second.heat.sum(1), traces[1].attention.sum(1).numpy(), rtol=1e-5)


def test_a_batch_size_of_nothing() -> None:
    with pytest.raises(UsageError, match="`batch_size=0` is not a whole number from 1 to 65536; type `batch_size=64`"):
        seen(small(), batch_size=0)
