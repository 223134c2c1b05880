"""transformers' tensors under timm's names, in timm's shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from tokencut.errors import ModelError
from tokencut.messages import listed

# What a model is made of beside its image tower, or what nothing but its training needs.
_EXTRAS = (
    ("the decoder", r"^(decoder|encoder_to_decoder|.*\bdecoder_pos_embed)"),
    ("the text model", r"^(text_model|text_projection|logit_scale|logit_bias)"),
    ("the mask token", r"mask_token$"),
    ("the pooler", r"(^|\.)pooler\.(?!layernorm)"),  # BEiT's holds the norm behind its pooling
    ("position numbers", r"(position_ids|relative_position_index)$"),
)

# Within a block, old and new names of transformers: `attention.attention.query` became `attention.q_proj` in its
# version 5, which writes the old ones unless told otherwise.
_BLOCK = (
    (r"(layernorm_before|layer_norm1|norm1)\.", "norm1."),
    (r"(layernorm_after|layer_norm2|norm2)\.", "norm2."),
    (r"attention\.attention\.([qv])_bias$", r"attn.\1_bias"),  # of VideoMAE, before version 5
    (r"(attention\.attention\.query|attention\.q_proj|self_attn\.q_proj)\.", "attn.query."),
    (r"(attention\.attention\.key|attention\.k_proj|self_attn\.k_proj)\.", "attn.key."),
    (r"(attention\.attention\.value|attention\.v_proj|self_attn\.v_proj)\.", "attn.value."),
    (r"(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", "attn.proj."),
    (r"(intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.", "mlp.fc1."),
    (r"(output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.", "mlp.fc2."),
    (r"lambda_([12])$", r"gamma_\1"),
    (
        r"(attention\.attention\.)?relative_position_bias\.relative_position_bias_table$",
        "attn.relative_position_bias_table",
    ),
    (r"mlp\.gate_proj\.", "mlp.gate."),
    (r"mlp\.up_proj\.", "mlp.up."),
    (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
)
_AROUND = (
    (r"embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"embeddings\.distillation_token$", "distillation_token"),
    (r"embeddings\.register_tokens$", "reg_token"),
    (r"embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"embeddings\.(patch_embeddings\.projection|patch_embeddings|patch_embedding)\.", "patch_embed.proj."),
    (
        r"(encoder\.relative_position_bias|shared_position_bias)\.relative_position_bias_table$",
        "rel_pos_bias.relative_position_bias_table",
    ),
    (r"(pooler\.layernorm|fc_norm)\.", "fc_norm."),
    (r"pre_layrnorm\.", "norm_pre."),  # transformers' spelling
    (r"(layernorm|post_layernorm|norm)\.", "norm."),
    (r"(cls_classifier|classifier|visual_projection)\.", "head."),
    (r"distillation_classifier\.", "head_dist."),
    (r"head\.probe$", "attn_pool.latent"),
    (r"head\.attention\.in_proj_(weight|bias)$", r"attn_pool.in_proj.\1"),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.mlp\.", "attn_pool.mlp."),
)
# What transformers puts before the names of an image tower.
_TOWER = re.compile(
    r"^(?:vit|vivit|videomae|deit|dinov2|dinov2_with_registers|beit|data2vec_vision|vision_model(?:\.vision_model)?)\."
)
_LAYER = re.compile(r"^(?:encoder\.|model\.)?layers?\.(\d+)\.")
# What timm's modules call differently: both halves of a gated MLP are one tensor in a Vision Transformer, two in eva.
_BIASES = ((r"\.attn\.query\.bias$", ".attn.q_bias"), (r"\.attn\.value\.bias$", ".attn.v_bias"))
_SCALES = ((r"\.ls([12])\.gamma$", r".gamma_\1"),)
_UP = ((r"\.mlp\.up\.", ".mlp.fc1."),)
_DIALECTS = {
    ("vit", False): _UP,
    ("vit", True): (),
    ("eva", False): (*_BIASES, *_SCALES, *_UP),
    ("eva", True): (*_BIASES, *_SCALES, (r"\.mlp\.gate\.", ".mlp.fc1_g."), (r"\.mlp\.up\.", ".mlp.fc1_x.")),
    ("beit", False): _BIASES,
    ("videomae", False): ((r"\.attn\.q_bias$", ".attn.query.bias"), (r"\.attn\.v_bias$", ".attn.value.bias")),
}


def split_extras(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tells the image tower from what a source is known to carry beside it.

    Args:
        tensors: By transformers' names.

    Returns:
        The tower's tensors, and what else there is, in words.
    """
    rest, found = {}, []
    for name, tensor in tensors.items():
        extra = next((word for word, pattern in _EXTRAS if re.search(pattern, name)), None)
        if extra is None:
            rest[name] = tensor
        elif extra not in found:
            found.append(extra)
    return rest, tuple(word for word in found if word != "position numbers")


def to_timm(
    tensors: Mapping[str, Tensor], *, patch_size: tuple[int, int], distilled: bool, names: str = "vit"
) -> dict[str, Tensor]:
    """Renames an image tower's tensors and gives them timm's shapes.

    Args:
        tensors: The tower's, by transformers' names.
        patch_size: Height and width of a patch in px, for patch embeddings that are kept as one matrix.
        distilled: Whether the distillation token has a head of its own.
        names: As `Architecture.names`.

    Raises:
        ModelError: A name that is not known.
    """
    named: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        ours = _renamed(_TOWER.sub("", name))
        if ours is None:
            unknown.append(name)
        else:
            named[ours] = tensor.float() if tensor.is_floating_point() else tensor
    if unknown:
        raise ModelError(f"{len(unknown)} of its tensors are not known for its type: {listed(unknown, 3)}; save the "
                         "model with save_pretrained, without adapters or parts of your own")  # fmt: skip
    if "distillation_token" in named:
        named["dist_token" if distilled else "reg_token"] = named.pop("distillation_token")
    _shape(named, patch_size)
    gated = any(".mlp.gate." in name for name in named)
    for pattern, ours in _DIALECTS.get((names, gated), ()):
        named = {re.sub(pattern, ours, name): tensor for name, tensor in named.items()}
    if names == "videomae":  # whose keys have no bias
        for name in [name for name in named if name.endswith(".attn.query.bias")]:
            named[name.replace(".query.", ".key.")] = torch.zeros_like(named[name])
    _join(named)
    if names == "eva":
        _complete_biases(named)
    return named


def _complete_biases(named: dict[str, Tensor]) -> None:
    """Of the biases of queries and values timm has both or none."""
    for name in [name for name in named if name.endswith((".q_bias", ".v_bias"))]:
        other = name[:-6] + ("v_bias" if name.endswith("q_bias") else "q_bias")
        named.setdefault(other, torch.zeros_like(named[name]))


def _renamed(name: str) -> str | None:
    """A name as timm has it, or one that `_join` knows; None where it is not known."""
    layer = _LAYER.match(name)
    rules, before, rest = (_BLOCK, f"blocks.{layer[1]}.", name[layer.end() :]) if layer else (_AROUND, "", name)
    for pattern, ours in rules:
        changed, count = re.subn(f"^(?:{pattern})", ours, rest)
        if count:
            return before + changed
    return None


def _shape(named: dict[str, Tensor], patch_size: tuple[int, int]) -> None:
    for name, rank in (("cls_token", 3), ("pos_embed", 3)):
        if name in named:
            while named[name].ndim < rank:
                named[name] = named[name].unsqueeze(0)
    patches = named.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 2:  # a matrix over rows, columns and channels
        high, wide = patch_size
        named["patch_embed.proj.weight"] = patches.unflatten(1, (high, wide, -1)).permute(0, 3, 1, 2).contiguous()


def _join(named: dict[str, Tensor]) -> None:
    """Puts together what timm keeps in one tensor."""
    for name in [name for name in named if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in named for part in parts):
            named[name.replace(".query.", ".qkv.")] = torch.cat([named.pop(part) for part in parts])
    for name in [name for name in named if ".mlp.gate." in name]:
        other = name.replace(".gate.", ".up.")
        if other in named:
            named[name.replace(".gate.", ".fc1.")] = torch.cat([named.pop(name), named.pop(other)])
    for kind in ("weight", "bias"):
        joined = named.pop(f"attn_pool.in_proj.{kind}", None)
        if joined is not None:
            named[f"attn_pool.q.{kind}"] = joined[: len(joined) // 3]
            named[f"attn_pool.kv.{kind}"] = joined[len(joined) // 3 :]
    if "head.weight" in named and "head.bias" not in named:  # CLIP's projection; timm's head has a bias
        named["head.bias"] = torch.zeros(len(named["head.weight"]))


def fold_class_position(named: dict[str, Tensor]) -> None:
    """Adds the class token's position to the token itself, for models of timm's that keep none for it, in place."""
    positions = named.get("pos_embed")
    if positions is not None and "cls_token" in named:
        named["cls_token"] = named["cls_token"] + positions[:, :1]
        named["pos_embed"] = positions[:, 1:]


def resized_biases(tensors: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> None:
    """Biases of pairs for another grid, as transformers' BEiT makes them, in place.

    Args:
        tensors: By timm's names; a table is `((2 R - 1) (2 C - 1) + 3, H)`, of `R` rows and `C` columns.
        old: Rows and columns of the grid they are for.
        new: Rows and columns wanted.
    """
    high, wide = 2 * old[0] - 1, 2 * old[1] - 1
    for name in [name for name in tensors if name.endswith("relative_position_bias_table")] if old != new else []:
        table, rest = tensors[name][:-3], tensors[name][-3:]
        grid = table.reshape(1, wide, high, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(2 * new[0] - 1, 2 * new[1] - 1), mode="bilinear")
        tensors[name] = torch.cat((grid.permute(0, 2, 3, 1).reshape(-1, rest.shape[1]), rest))


def resized_positions(
    positions: Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    num_prefix_tokens: int,
    antialias: bool,
    tubelets: int = 1,
) -> Tensor:
    """Positions for another grid, as transformers makes them in `interpolate_pos_encoding`; of clips frame by frame.

    Args:
        positions: `(1, P + N, D)`.
        old: Rows and columns of the grid they are for.
        new: Rows and columns wanted.
        num_prefix_tokens: `P`, how many of them belong to no patch.
        antialias: Whether transformers resizes this type's with antialiasing.
        tubelets: How many such grids there are, one for each step along the frames of a clip.
    """
    if old == new or positions.shape[1] != num_prefix_tokens + tubelets * old[0] * old[1]:
        return positions
    prefix, grid = positions[:, :num_prefix_tokens], positions[:, num_prefix_tokens:]
    grid = grid.reshape(tubelets, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat((prefix, grid.permute(0, 2, 3, 1).reshape(1, tubelets * new[0] * new[1], -1)), 1)
