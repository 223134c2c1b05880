"""Models that transformers' `save_pretrained` wrote, as timm builds them. transformers itself is not needed.

A new type is a row in `architectures._KINDS`, and a rule in `tensors` for each name that no other type has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import split_model_name_tag
from torch import Tensor

from tokencut.adapters.space_time import sines
from tokencut.errors import ModelError
from tokencut.messages import index_in, shorten
from tokencut.models.alterations import Alterations
from tokencut.models.fields import LabelNames
from tokencut.models.huggingface.architectures import (
    Architecture,
    class_name,
    head_of,
    pair,
    read_config,
)
from tokencut.models.huggingface.names import guessed_config, require_sizes, under_transformers_names
from tokencut.models.huggingface.preprocessing import preprocessing_from
from tokencut.models.huggingface.tensors import (
    fold_class_position,
    resized_biases,
    resized_positions,
    split_extras,
    to_timm,
)
from tokencut.models.model_args import check_model_args
from tokencut.models.names import resolve_name
from tokencut.schema import is_whole

__all__ = [
    "Converted",
    "convert",
    "guessed_config",
    "is_transformers",
    "require_sizes",
    "under_transformers_names",
]

TIMM_WRAPPER = "timm_wrapper"


@dataclass(frozen=True)
class Converted:
    """A transformers model in timm's words.

    Attributes:
        name: timm's name.
        args: Arguments beside the name's own.
        tensors: Under timm's names, in fp32, with the source's own head; None where there were none.
        preprocessing: Of timm's description: `input_size` (channels, height and width in px), `mean`, `std`,
            `interpolation`, `crop_pct`, `crop_mode`.
        label_names: The classes' names, if known.
        num_classes: Classes of the source's own head, 0 for none.
        alterations: What to change once timm has built the model.
        source: transformers' class, such as `ViTForImageClassification`.
        notes: What a user should be told, one line each.
    """

    name: str
    args: dict[str, Any]
    tensors: dict[str, Tensor] | None
    preprocessing: dict[str, Any]
    label_names: LabelNames | None
    num_classes: int
    alterations: Alterations = Alterations()
    source: str = ""
    notes: tuple[str, ...] = ()


def is_transformers(config: Any) -> bool:
    """Whether the content of a `config.json` is transformers'; timm's own has no type of model."""
    return isinstance(config, Mapping) and isinstance(config.get("model_type"), str)


def convert(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None,
    preprocessor: Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
) -> Converted:
    """Finds what a transformers model is to timm: the same logits, to the rounding.

    Args:
        config: The content of `config.json`.
        tensors: The model's, by transformers' names; None where weights don't matter.
        preprocessor: The content of `preprocessor_config.json`, if there is one.
        args: timm's arguments that were asked for, which win; positions are resized for another `img_size` as
            transformers does it.

    Raises:
        ModelError: A type that is not known, or a field or tensor that is not what it should be.
        UsageError: An argument that no architecture takes.
    """
    wanted = dict(args or {})
    if config.get("model_type") == TIMM_WRAPPER:
        return _wrapped(config, tensors, wanted)
    kind, tower = read_config(config)
    head = head_of(config, tensors)
    found = kind.describe(tower, head)
    size = pair(wanted["img_size"]) if "img_size" in wanted else None
    prepared = preprocessing_from(
        preprocessor, kind.processor, found.image_size, resizes=found.resizes, wanted=size
    )  # fmt: skip
    high, wide = size = prepared.pop("input_size")
    notes = []
    if preprocessor is None and tensors is not None:
        notes.append("there is no preprocessor_config.json: taking what transformers has for this type, mean "
                     f"{_numbers(prepared['mean'])}, std {_numbers(prepared['std'])}")  # fmt: skip
    if size != found.image_size:
        if "img_size" not in wanted:
            notes.append(f"images are of {high}x{wide} px, as preprocessor_config.json has it")
        wanted["img_size"] = high if high == wide else size
        if found.names not in ("eva", "videomae"):  # which make their tables of sines anew
            how = ", as transformers does it" if found.tubelets is None else ", frame by frame"
            notes.append(f"positions are resized from {found.image_size[0]}x{found.image_size[1]} px{how}")
    names = _label_names(config) if head.kind in ("classes", "teacher") else None
    if names is not None and len(names) != head.classes:
        notes.append(f"config.json names {len(names)} classes and the head has {head.classes}: the names are left out")
    arguments = {**found.args, **wanted}
    check_model_args(arguments)  # before positions are made for whatever size a file asks for
    converted = None
    if tensors is not None:
        rest, extras = split_extras(tensors)
        notes += [f"{' and '.join(extras)} of {class_name(config)} {'is' if len(extras) == 1 else 'are'} left out"
                  ] if extras else []  # fmt: skip
        patch = pair(tower["patch_size"])
        converted = to_timm(rest, patch_size=patch, distilled=head.kind == "teacher", names=found.names)
        converted = _settled(converted, found, patch, size)
    return Converted(
        name=found.name,
        args=arguments,
        tensors=converted,
        preprocessing={"input_size": (tower["num_channels"], high, wide), **prepared},
        label_names=names if len(names or ()) == head.classes else None,
        num_classes=head.classes,
        alterations=found.alterations,
        source=class_name(config),
        notes=tuple(notes),
    )


def _settled(
    tensors: dict[str, Tensor], found: Architecture, patch: tuple[int, int], size: tuple[int, int]
) -> dict[str, Tensor]:
    """The tensors as the architecture holds them, for images of another size if need be."""
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(found.unused)}
    prefix = sum(kept[key].shape[1] for key in ("cls_token", "dist_token", "reg_token") if key in kept)
    if found.folded:
        fold_class_position(kept)
        prefix = 0
    old, new = ((side[0] // patch[0], side[1] // patch[1]) for side in (found.image_size, size))
    resized_biases(kept, old, new)
    tubelets = found.tubelets or 1
    if found.names == "videomae":  # no file holds its table, which is made for any size
        kept["pos_embed"] = sines(tubelets * new[0] * new[1], kept["patch_embed.proj.weight"].shape[0])
    elif "pos_embed" in kept:
        kept["pos_embed"] = resized_positions(kept["pos_embed"], old, new, prefix, found.antialias, tubelets)
    return kept


def _wrapped(config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None, args: dict[str, Any]) -> Converted:
    """A timm model inside transformers' wrapper: timm's own config, and tensors with or without a prefix."""
    written, own = config.get("architecture"), config.get("model_args") or {}
    if not isinstance(written, str) or not isinstance(own, Mapping):
        raise ModelError(f"its config.json says architecture {shorten(written)}, which is not a timm name; save the "
                         "model again with save_pretrained")  # fmt: skip
    name = resolve_name(split_model_name_tag(written)[0]).architecture
    found = None
    if tensors is not None:
        found = {key.removeprefix("timm_model."): tensor.float() if tensor.is_floating_point() else tensor
                 for key, tensor in tensors.items()}  # fmt: skip
    cfg = config.get("pretrained_cfg")
    cfg = dict(cfg) if isinstance(cfg, Mapping) else {}
    headed = class_name(config).endswith("ForImageClassification")
    number = config.get("num_classes")
    classes = int(number) if headed and number is not None and is_whole(number, 0) else 0
    fields = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    told = {key: tuple(cfg[key]) if isinstance(cfg[key], list) else cfg[key] for key in fields if cfg.get(key)}
    names = config.get("label_names")
    arguments = {**own, "num_classes": classes, **args}
    check_model_args(arguments)
    return Converted(
        name=name,
        args=arguments,
        tensors=found,
        preprocessing=told,
        label_names=tuple(map(str, names)) if isinstance(names, list) and len(names) == classes else None,
        num_classes=classes,
        source=class_name(config),
    )


def _label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The classes' names in order; None for the numbers that transformers makes up where it knows none."""
    labels = config.get("id2label")
    if not isinstance(labels, Mapping) or not all(index_in(index) is not None for index in labels):
        return None
    named = {int(index): str(name) for index, name in labels.items()}
    if not named or sorted(named) != list(range(len(named))) or all(
        name == f"LABEL_{index}" for index, name in named.items()
    ):  # fmt: skip
        return None
    return tuple(named[index] for index in range(len(named)))


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
