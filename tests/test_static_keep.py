"""Models of clips whose static tubelets are removed before the first block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from video_files import tiny_videomae

import tokencut
from tokencut.errors import ArtifactError, UsageError
from tokencut.model import CompressedModel, predicted_macs
from tokencut.profiling.counting import count_macs
from tokencut.recipe import recipe_from_json


def model(kind: str = "videomae") -> Any:
    """32 px and 8 frames: 4 x 4 x 4 tubelets."""
    if kind == "videomae":
        return tiny_videomae(num_frames=8, img_size=32)
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "num_frames": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.create_model("vivit_base_patch16x2_224", num_classes=2, **sizes).eval()


def clips() -> Tensor:
    """Whose upper half stands still, and whose lower one does not."""
    torch.manual_seed(1)
    found = torch.randn(2, 3, 8, 32, 32)
    found[:, :, :, :16] = found[:, :, :1, :16]
    return found


def removing(kind: str = "videomae", static_keep: float = 0.5, **more: Any) -> CompressedModel:
    return tokencut.compress(model(kind), **{"keep": 0.5, "layers": [2], "static_keep": static_keep, **more}).eval()


@pytest.mark.parametrize("kind", ["videomae", "vivit"])
def test_what_is_left_out_changes_nothing_where_it_is_the_same(kind: str) -> None:
    """Tubelets without position are alike where pixels are: one that stands for four, weighed, is the four of them."""
    dense = model(kind)
    with torch.no_grad():
        dense.pos_embed.zero_()
        reduced = tokencut.compress(dense, keep=1.0, static_keep=0.625, prop_attn=True).eval()
        assert [vars(plan) for plan in reduced.recipe.stages] == [{"block": 0, "tokens_in": 64, "tokens_out": 40}]
        torch.testing.assert_close(reduced(clips()), dense(clips()), rtol=1e-4, atol=1e-5)
        assert (reduced(clips().flip(2)) - dense(clips().flip(2))).abs().max() < 1e-4
        fewer = tokencut.compress(dense, keep=1.0, static_keep=0.5, prop_attn=True).eval()
        assert (fewer(clips()) - dense(clips())).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["bat", "evit", "topk", "tome"])
@pytest.mark.parametrize("kind", ["videomae", "vivit"])
def test_methods_go_on_from_what_is_left(kind: str, method: str) -> None:
    compressed = removing(kind, method=method)
    with torch.no_grad():
        logits, traces = compressed.trace(clips(), attention=True)
        assert [(trace.block, trace.tokens.count) for trace in traces] == [(0, 32), (2, traces[1].tokens.count), (3,
                                                                            traces[1].tokens.count)]  # fmt: skip
        assert traces[1].tokens.count in (16, 17)  # evit's holds one more
        torch.testing.assert_close(compressed(clips()), logits)
        torch.testing.assert_close(compressed(clips()[1:]), logits[1:], rtol=1e-4, atol=1e-5)
    assert traces[0].attention is None and traces[1].attention is not None
    assert traces[0].tokens.sizes.sum(1).tolist() == [64, 64]
    assert (traces[0].tokens.source.view(2, 4, 4, 4)[:, :, :2] == torch.arange(8).view(2, 4)).all()


def test_costs_are_what_is_counted() -> None:
    compressed = removing()
    counted = count_macs(compressed, (3, 8, 32, 32))
    assert sum(row.macs for row in predicted_macs(compressed)) == counted.total and not counted.uncounted
    report = tokencut.profile(compressed, latency=False)
    assert [(stage.block, stage.tokens_out) for stage in report.stages] == [(0, 32), (2, 16)]
    assert report.notes == ()


def test_features_of_every_tubelet() -> None:
    compressed = removing(keep=1.0)
    with torch.no_grad():
        [maps] = compressed.forward_intermediates(clips(), [2], intermediates_only=True, unmerge="copy")
        [dense] = compressed.model.forward_intermediates(clips(), [2], intermediates_only=True)
    assert maps.shape == dense.shape == (2, 16, 4, 4, 4)
    still = maps[:, :, :, :2]
    assert torch.equal(still, still[:, :, :1].expand_as(still))
    assert not torch.equal(maps[:, :, 1, 2:], maps[:, :, 0, 2:])
    assert tokencut.draw(compressed, torch.zeros(1, 3, 8, 32, 32, dtype=torch.uint8), device="cpu").views[0].stages


def test_the_first_frame_always_stays() -> None:
    compressed = removing(static_keep=0.01)
    assert [plan.tokens_out for plan in compressed.recipe.stages] == [16, 8]
    assert removing(static_keep=1.0, keep=1.0).recipe.stages == ()


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    compressed = removing()
    info = tokencut.save(compressed, tmp_path / "out.safetensors")
    assert info.tokens_per_block == (32, 16, 16)
    again = tokencut.load(tmp_path / "out.safetensors")
    assert again.recipe == compressed.recipe and again.recipe.static_keep == 0.5
    assert torch.equal(again(clips()), compressed(clips()))
    assert "static_keep" not in tokencut.compress(model(), keep=0.5, layers=[2]).recipe.to_json()
    data = compressed.recipe.to_json()
    for wrong in ({"static_keep": 0}, {"static_keep": "half"}):
        with pytest.raises(ArtifactError, match=r"static_keep"):
            recipe_from_json({**data, **wrong}, 3)
    del data["static_keep"]
    with pytest.raises(ArtifactError, match="does not fit its model"):
        recipe_from_json(data, 3)


def test_other_sizes_of_frames() -> None:
    compressed = removing()
    compressed.set_input_size((16, 32))
    assert [(plan.tokens_in, plan.tokens_out) for plan in compressed.recipe.stages] == [(32, 16), (16, 8)]
    assert compressed(torch.randn(1, 3, 8, 16, 32)).shape == (1, 2)


def test_it_learns() -> None:
    compressed = removing().train()
    compressed(clips()).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all()
               for weight in compressed.parameters() if weight.requires_grad)  # fmt: skip


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"`static_keep` is for models of clips, .* VisionTransformer takes images"):
        tokencut.compress(timm.create_model("test_vit"), static_keep=0.5)
    with pytest.raises(UsageError, match="`static_keep=1.5` is not a number above 0 and up to 1"):
        removing(static_keep=1.5)
