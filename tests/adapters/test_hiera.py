"""Hiera: ordinary stages inside its global stage, and patches with their features again before the next pooling."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.hiera import Unroll
from torch import Tensor

from tokencut.adapters import adapter_for
from tokencut.adapters.hiera import unrolled
from tokencut.errors import ModelError, UsageError
from tokencut.model import compress


def small(**others: Any) -> Any:
    torch.manual_seed(0)
    args = {"img_size": 64, "embed_dim": 16, "stages": (1, 1, 4, 1), "num_classes": 5, **others}
    model = timm.create_model("hiera_tiny_224", **args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def test_tokens_are_put_in_the_order_in_which_timm_pools_them() -> None:
    x = torch.randn(2, 8 * 12, 3, generator=torch.Generator().manual_seed(0))
    for schedule in ([(2, 2)], [(2, 2), (2, 3)], []):
        expected = Unroll((8, 12), (1, 1), schedule)(x)
        assert torch.equal(unrolled(x, (8, 12), schedule), expected)


def test_the_blocks_that_may_reduce_are_the_third_stages_behind_its_first() -> None:
    with torch.device("meta"):
        model = timm.create_model("hiera_base_224")  # stages of 2, 3, 16 and 3 blocks
    adapter = adapter_for(model)
    assert list(adapter.blocks(model)) == list(model.blocks[6:21])
    assert (adapter.grid(model, 224, 224), adapter.patch_size(model)) == ((14, 14), (16, 16))
    assert compress(model, keep=0.5).recipe.layers == [5, 9, 13]
    with pytest.raises(UsageError) as refused:
        compress(model, keep=0.5, layers=[4, 16])
    assert str(refused.value) == (
        "layer 16 cannot reduce: layers 1 to 15 are the blocks 7 to 21 of this Hiera, which attend to all tokens of "
        "one grid; those before attend in windows or pool them, and the next pools squares of them; type such as "
        "`layers=[5, 9, 13]`"
    )


@pytest.mark.parametrize("method", ["tome", "topk"])
def test_patches_have_their_features_with_what_their_token_has_changed_by(method: str) -> None:
    compressed, pixels = compress(small(), keep=0.5, layers=[2], method=method).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        loop = compressed.loop
        before = loop.step(1, loop.embed(pixels))
        entering = loop.stage_input(2, before)
        left = loop.stages[2](entering, 8)
        behind = loop.step(3, loop.step(2, before, 8))
        given = loop.adapter.leaving(loop.model, behind).features
    changed = behind.features - left.features
    for image, source in enumerate(left.source):
        for patch, token in enumerate(source.tolist()):
            x = entering.tokens.features[image, patch]
            if token < 0:  # dropped: the most similar token that is left takes its token's place
                token = int((left.features[image] - x).square().sum(1).argmin())
            torch.testing.assert_close(given[image, patch], x + changed[image, token], rtol=1e-4, atol=1e-4)


def test_the_loop_is_the_forward_and_maps_are_timms_before_the_third_stage() -> None:
    model = small()
    compressed, pixels = compress(model, keep=0.5).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, loop = compressed(pixels), compressed.loop
        tokens = loop.run(loop.embed(pixels), compressed.recipe.stages)
        torch.testing.assert_close(loop.head(tokens), logits)
        torch.testing.assert_close(compressed.forward_head(compressed.forward_features(pixels)), logits)
        ours, theirs = (each.forward_intermediates(pixels, intermediates_only=True) for each in (compressed, model))
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    assert [torch.equal(*pair) for pair in zip(ours, theirs, strict=True)] == [True, True, False, False]


def test_patch_dropout_trains_what_is_left() -> None:
    model = small(patch_drop_rate=0.25).train()
    compressed, seen = compress(model, keep=0.5, layers=[2]).train(), list[int]()

    def note(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output.shape[1])

    for block in compressed.model.blocks:
        block.register_forward_hook(note)
    compressed(torch.randn(2, 3, 64, 64)).sum().backward()
    # 3 of 4 mask units of 64 patches; of the 12 tokens in the third stage 6 stay; the last pools squares of the 12.
    assert seen == [192, 48, 12, 12, 6, 6, 3]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="dyvit hides tokens while it trains, and Hiera's next stage pools them"):
        compress(small(), keep=0.5, method="dyvit")
    with pytest.raises(UsageError, match="method window is for hierarchical models"):
        compress(small(), keep=0.5, method="window")
    with pytest.raises(ModelError, match="no block of this Hiera attends to all tokens of one grid"):
        adapter_for(small(mask_unit_attn=(True, True, True, True)))
    with pytest.raises(UsageError, match="unmerge 'copy' is not chosen here for Hiera, .*; leave it out$"):
        compress(small()).forward_intermediates(torch.zeros(1, 3, 64, 64), unmerge="copy")
