"""A trained model as timm's local-dir: config.json and model.safetensors, in bf16; and its weights in small parts.

    python examples/benchmarks/run.py shards FOLDER

puts the parts in a folder (`model-00001-of-00003.safetensors`, ...) together into the `model.safetensors` beside them,
after which `local-dir:FOLDER` is a MODEL for every tokencut command.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokencut.errors import ArtifactError
from tokencut.files import atomic_write

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PART = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
# Under 16 MiB with the header.
PART_BYTES = 15 * 2**20


def describe(
    architecture: str, model_args: Mapping[str, Any], size: int, stored: int, mean: list[float], std: list[float],
    classes: tuple[str, ...], classifier: str = "head", fixed: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """timm's config.json for a model that is judged on the middle `size` px of images of `stored` px."""
    return {
        "architecture": architecture,
        "num_classes": len(classes),
        "model_args": dict(model_args),
        "pretrained_cfg": {
            "tag": "reference", "custom_load": False, "input_size": [3, size, size], "fixed_input_size": fixed,
            "interpolation": "bicubic", "crop_pct": size / stored, "crop_mode": "center", "mean": mean, "std": std,
            "num_classes": len(classes), "pool_size": None, "first_conv": "patch_embed.proj", "classifier": classifier,
        },
        "label_names": list(classes),
    }  # fmt: skip


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], *, parts: bool = False) -> list[Path]:
    """Writes a model.

    Args:
        folder: Where; it is made if need be.
        config: What goes into config.json.
        weights: The tensors by timm's names; stored in bf16.
        parts: Whether to cut the weights into files of under 16 MiB, where they are larger.

    Returns:
        The files of weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors"):
        if old.name == WEIGHTS or PART.fullmatch(old.name):
            old.unlink()
    with atomic_write(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    ready = {name: tensor.detach().cpu().to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    groups = _grouped(ready) if parts else [ready]
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    paths = [folder / name for name in (names if len(groups) > 1 else [WEIGHTS])]
    for path, group in zip(paths, groups, strict=True):
        with atomic_write(path) as temporary:
            save_file(group, temporary)
    return paths


def _grouped(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    groups: list[dict[str, Tensor]] = [{}]
    room = PART_BYTES
    for name, tensor in tensors.items():
        if groups[-1] and tensor.nbytes > room:
            groups.append({})
            room = PART_BYTES
        groups[-1][name] = tensor
        room -= tensor.nbytes
    return groups


def assemble(folder: Path) -> Path:
    """Puts the parts of a model together; where it is whole already, there is nothing to do.

    Returns:
        The file of all weights.

    Raises:
        ArtifactError: There are none, or a part is missing.
    """
    found = {match[0]: match for match in map(PART.fullmatch, sorted(path.name for path in folder.glob("*"))) if match}
    whole = folder / WEIGHTS
    if not found:
        if whole.is_file():
            return whole
        raise ArtifactError(f"{folder} holds no {WEIGHTS} and no parts of one, such as model-00001-of-00003.safetensors"
                            "; give the folder that train.py wrote")  # fmt: skip
    count = int(next(iter(found.values()))[2])
    wanted = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    missing = sorted(set(wanted) - set(found))
    if missing or len(found) != count:
        problem = f"{missing[0]} is missing" if missing else f"parts of several models: {', '.join(found)}"
        raise ArtifactError(f"{folder} does not hold one whole model: {problem}; copy all parts of one there")
    tensors: dict[str, Tensor] = {}
    for name in wanted:
        tensors |= load_file(folder / name)
    with atomic_write(whole) as temporary:
        save_file(tensors, temporary)
    return whole


def main() -> None:
    """Reads the command line and puts a model together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(f"wrote {assemble(parser.parse_args().folder)}")
