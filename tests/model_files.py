"""Small models and files of weights for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokencut.model import CompressedModel, compress

SIZE = 64  # px: 16 image tokens for the small models' patches of 16 px


def compressed_model(name: str = "test_vit", method: str = "bat", **args: Any) -> CompressedModel:
    """A small model with two stages, of 16 to 8 and 8 to 4 image tokens; the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = timm.create_model(name, **{"img_size": SIZE, "num_classes": 5, **args}).eval()
        return compress(model, keep=0.5, layers=(2, 4), method=method).eval()


def images(size: int = SIZE) -> Tensor:
    """Three images of noise, the same at each call."""
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def random_weights() -> dict[str, Tensor]:
    """Weights for `test_vit` with its own 1,000 classes; the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return dict(timm.create_model("test_vit").state_dict())


def write_model_folder(path: Path, weights: dict[str, Tensor]) -> Path:
    """A folder as `local-dir:` and the hub's repositories have it."""
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    cfg = {
        "tag": "mine", "license": "mit", "input_size": [3, 160, 160], "fixed_input_size": True, "mean": [0.1, 0.2, 0.3],
        "num_classes": 1000, "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    config = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": cfg}
    (path / "config.json").write_text(json.dumps(config))
    return path


def same_weights(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether a model has exactly these weights."""
    return all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def names_in(folder: Path) -> list[str]:
    """What a folder holds, sorted."""
    return sorted(path.name for path in folder.iterdir())


class Payload:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def shaken(model: Any, seed: int = 0) -> Any:
    """A model in eval mode with weights that no initialisation would give, so that no tensor can stand for another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for part in model.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.add_(1)
    return model.eval()


def write_transformers_folder(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A small ViT of three classes as transformers' `save_pretrained` writes it: timm's model, and `config.json`."""
    model = shaken(timm.create_model("vit_base_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3,
                                     num_classes=3))  # fmt: skip
    ours, theirs = model.state_dict(), {}
    names = {"patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm",
             "head": "classifier"}  # fmt: skip
    for number in range(2):
        block, layer = f"blocks.{number}", f"vit.encoder.layer.{number}"
        names |= {
            f"{block}.norm1": f"{layer}.layernorm_before",
            f"{block}.norm2": f"{layer}.layernorm_after",
            f"{block}.attn.proj": f"{layer}.attention.output.dense",
            f"{block}.mlp.fc1": f"{layer}.intermediate.dense",
            f"{block}.mlp.fc2": f"{layer}.output.dense",
        }
        for kind in ("weight", "bias"):
            joined = ours[f"{block}.attn.qkv.{kind}"].chunk(3)
            for part, rows in zip(("query", "key", "value"), joined, strict=True):
                theirs[f"{layer}.attention.attention.{part}.{kind}"] = rows.clone()
    theirs |= {f"{name}.{kind}": ours[f"{own}.{kind}"] for own, name in names.items() for kind in ("weight", "bias")}
    theirs["vit.embeddings.cls_token"] = ours["cls_token"]
    theirs["vit.embeddings.position_embeddings"] = ours["pos_embed"]
    config: dict[str, Any] = {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 24, "image_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "layer_norm_eps": 1e-6,
        "id2label": {"0": "cat", "1": "dog", "2": "hen"},
    }  # fmt: skip
    path.mkdir(exist_ok=True)
    save_file(theirs, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return model, config
