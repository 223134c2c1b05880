"""Telling transformers' tensors by their names alone, wherever a training program has put them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokencut.errors import ModelError
from tokencut.models.building import Sizes
from tokencut.models.huggingface.architectures import class_name, read_config
from tokencut.models.huggingface.tensors import split_extras

# The first part of an image tower, and what transformers calls the tower.
_TOWERS = "vit|vivit|videomae|deit|beit|data2vec_vision|dinov2_with_registers|dinov2|vision_model"
_EMBEDDING = re.compile(
    rf"^(?P<before>(?:.*?\.)??)(?P<tower>(?:{_TOWERS})\.)?embeddings\.(?:cls_token|class_embedding|patch_embedding)"
)


def under_transformers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of a transformers image model, with nothing before its own names; None where there is none.

    Args:
        tensors: Of a checkpoint.
    """
    found = next((match for name in tensors if (match := _EMBEDDING.match(name))), None)
    if found is None:
        return None
    before = found["before"]
    return {name.removeprefix(before): tensor for name, tensor in tensors.items() if name.startswith(before)}


def guessed_config(tensors: Mapping[str, Tensor], sizes: Sizes, name: str) -> dict[str, Any]:
    """A config for tensors that came without one: what transformers has for their type, and the sizes that they show.

    Args:
        tensors: By transformers' names.
        sizes: The architecture's that was named, for what no shape tells.
        name: Its name, which for CLIP says the activation.

    Raises:
        ModelError: They lack what every image model has.
    """
    tensors, _ = split_extras(tensors)  # a text model has layers too
    names = set(tensors)

    def held(pattern: str) -> Tensor | None:
        return next((tensors[name] for name in sorted(names) if re.search(pattern, name)), None)

    patches = held(r"embeddings\.patch_embeddings?(\.projection)?\.weight$")
    positions = held(r"embeddings\.position_embeddings?(\.weight)?$")
    hidden = held(r"layers?\.0\.(intermediate\.dense|mlp\.fc1|mlp\.weights_in|mlp\.up_proj)\.weight$")
    gated = held(r"mlp\.(weights_in|gate_proj)\.") is not None
    table, kind = held(r"relative_position_bias_table$"), _type_of(names)
    placed = positions is not None or kind in ("beit", "dinov3_vit")
    if patches is None or patches.ndim != 4 or not placed or hidden is None or sizes.heads is None:
        raise ModelError("it has transformers' names, and not all that a Vision Transformer has; name the folder that "
                         "save_pretrained wrote")  # fmt: skip
    registers = held(r"embeddings\.register_tokens$")
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": patches.shape[0],
        "num_hidden_layers": 1
        + max(int(found[1]) for name in names if (found := re.search(r"layers?\.(\d+)\.", name))),
        "num_attention_heads": sizes.heads,
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[-1],
        "qkv_bias": held(r"(query|q_proj)\.bias$") is not None,
        "use_swiglu_ffn": gated,
    }
    if positions is not None:
        prefix = {"deit": 2, "siglip": 0}.get(kind, 1)
        config["image_size"] = int((positions.shape[-2] - prefix) ** 0.5) * patches.shape[-1]
    elif table is not None:  # a row for each offset between two patches, and three for the class token
        config["image_size"] = (int((table.shape[0] - 3) ** 0.5) + 1) // 2 * patches.shape[-1]
    if not gated or kind == "dinov3_vit":  # else the usual ratio, of which less is left
        config |= {"intermediate_size": hidden.shape[0], "mlp_ratio": hidden.shape[0] / patches.shape[0]}
    if kind == "clip":
        config["hidden_act"] = "quick_gelu" if "quickgelu" in name else "gelu"
    if kind == "dinov3_vit":
        config |= {"use_gated_mlp": gated, "num_register_tokens": 0}
        config |= {f"{part}_bias": held(rf"{part[0]}_proj\.bias$") is not None for part in ("query", "key", "value")}
    if kind == "beit":
        shared = held(r"(encoder\.relative_position_bias|shared_position_bias)\.") is not None
        config |= {
            "use_absolute_position_embeddings": positions is not None,
            "use_shared_relative_position_bias": shared,
            "use_relative_position_bias": table is not None and not shared,
            "use_mean_pooling": held(r"(^|\.)layernorm\.weight$") is None or held(r"pooler\.layernorm") is not None,
            "layer_scale_init_value": 0.1 if held(r"lambda_1$") is not None else 0.0,
        }
    if registers is not None:
        config["num_register_tokens"] = registers.shape[1]
    return config


def _type_of(names: set[str]) -> str:
    """transformers' type of model, by its names."""

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    if has(r"(relative_position_bias_table|lambda_1)$"):
        return "beit"
    if has(r"layer_scale1\.lambda1$") and not has(r"embeddings\.position_embeddings$"):
        return "dinov3_vit"
    if has(r"embeddings\.register_tokens$"):
        return "dinov2_with_registers"
    if has(r"layer_scale1\.lambda1$"):
        return "dinov2"
    if has(r"embeddings\.distillation_token$"):
        return "deit"
    if has(r"pre_layrnorm\."):
        return "clip"
    return "siglip" if has(r"post_layernorm\.") else "vit"


def require_sizes(config: Mapping[str, Any], sizes: Sizes, name: str, folder: object) -> None:
    """Refuses a transformers model that is not of the architecture that was named.

    Args:
        config: The content of its `config.json`.
        sizes: The architecture's.
        name: timm's name of it.
        folder: Where the model is.

    Raises:
        ModelError: Its width, depth or heads are others.
    """
    if config.get("model_type") == "timm_wrapper":
        return
    _, tower = read_config(config)
    theirs = tuple(tower[field] for field in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    ours = (sizes.width, sizes.depth, sizes.heads)
    if theirs != ours:
        words = ["width {}, {} blocks, {} heads".format(*numbers) for numbers in (theirs, ours)]
        raise ModelError(f"{folder} holds a {class_name(config)} of {words[0]}, and {name} has {words[1]}; name the "
                         f"folder {folder} as MODEL, without a checkpoint")  # fmt: skip
