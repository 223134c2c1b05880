"""Models that no argument of timm makes: altered, saved and built again; and files that tell of what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from model_files import images, metadata_of, shaken
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokencut.errors import ArtifactError, ModelError
from tokencut.model import compress, predicted_macs
from tokencut.models import artifact
from tokencut.models.alterations import CLASS_AND_MEAN, Alterations, alter, alterations_of
from tokencut.profiling.counting import count_macs


def altered(name: str = "test_vit", **args: object) -> nn.Module:
    model = timm.create_model(name, img_size=64, num_classes=5, **args)
    alter(model, Alterations(norm_eps=1e-2, pool=CLASS_AND_MEAN))
    return shaken(model)


def by_hand(model: nn.Module, features: Tensor, weights: Tensor | None = None) -> Tensor:
    """The head's logits of tokens behind the last block, each image token counted by its weight."""
    mean, variance = features.mean(2, keepdim=True), features.var(2, keepdim=True, unbiased=False)
    normed = (features - mean) / (variance + 1e-2).sqrt() * model.norm.weight + model.norm.bias
    patches = normed[:, model.num_prefix_tokens :]
    share = torch.ones(patches.shape[:2]) if weights is None else weights
    average = (patches * share.unsqueeze(2)).sum(1) / share.sum(1, keepdim=True)
    return torch.cat((normed[:, 0], average), 1) @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("args", [{}, {"reg_tokens": 2}])
@torch.no_grad()
def test_the_class_token_beside_the_mean(args: dict[str, object]) -> None:
    model = altered(**args)
    last = model.forward_intermediates(images(), indices=1, return_prefix_tokens=True, intermediates_only=True)[0]
    features = torch.cat((last[1], last[0].flatten(2).transpose(1, 2)), 1)
    torch.testing.assert_close(model(images()), by_hand(model, features), atol=1e-4, rtol=1e-4)
    compressed = compress(model, keep=0.5, layers=[2, 4], method="tome")
    logits, traces = compressed.trace(images())
    tokens = traces[-1].tokens
    assert tokens.sizes is not None and tokens.sizes.max() > 1
    expected = by_hand(compressed.model, tokens.features, tokens.sizes)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(compressed(images()), expected, atol=1e-4, rtol=1e-4)
    total = sum(row.macs for row in predicted_macs(compressed))
    assert total == count_macs(compressed, (3, 64, 64)).total


def test_a_file_builds_it_again(tmp_path: Path) -> None:
    model = compress(altered(), keep=0.5, layers=[2]).eval()
    info = artifact.save(model, tmp_path / "out.safetensors")
    assert info.alterations == Alterations(1e-2, CLASS_AND_MEAN)
    loaded = artifact.load(tmp_path / "out.safetensors")
    assert alterations_of(loaded.model) == info.alterations
    assert torch.equal(loaded(images()), model(images()))
    artifact.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    plain = timm.create_model("test_vit", img_size=64)
    alter(plain, Alterations(norm_eps=1e-6))  # timm's own
    assert "alterations" not in artifact.save(compress(plain, keep=0.5), tmp_path / "plain.safetensors").to_text()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"pool": "max"}, "its metadata's alterations.pool is 'max', not one of class+mean"),
        ({"norm_eps": 0}, "its metadata's alterations.norm_eps is 0, not a positive number"),
        ({"eps": 1}, "its metadata has an unknown field alterations.eps"),
        (None, "its metadata's alterations is None, not an object"),
    ],
)
def test_alterations_that_there_are_not(field: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    artifact.save(compress(altered(), keep=0.5), path)
    told = {**json.loads(metadata_of(path)["tokencut"]), "alterations": field}
    save_file(load_file(path), path, metadata={"tokencut": json.dumps(told)})
    with pytest.raises(ArtifactError) as caught:
        artifact.load(path)
    assert message in str(caught.value)


def test_a_model_without_such_a_head() -> None:
    model = timm.create_model("vit_base_patch16_siglip_224", img_size=32, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ModelError, match="VisionTransformer has no head that could read the class token beside the"):
        alter(model, Alterations(pool=CLASS_AND_MEAN))
