"""Which models can be named: timm's names in the supported modules, their aliases, and the nearest to a misspelt one.

Nothing is built here: names, tags and descriptions come from timm's registry.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from functools import cache

import timm
from timm.models import get_arch_pretrained_cfgs, get_deprecated_models, get_pretrained_cfg, is_model, model_entrypoint

from tokencut.adapters import default_methods, supported_modules
from tokencut.errors import ModelError, UsageError
from tokencut.messages import nearest_known

# What an alias leaves out: the most usual patches, windows and images of a family.
ALIAS_SUFFIXES = ("_patch16_224", "_patch4_window7_224")


@dataclass(frozen=True)
class SupportedModel:
    """A model that can be named.

    Attributes:
        name: timm's name, without a pretrained tag.
        alias: Its short form, or None.
        family: The family's name, as its adapter has it.
        tags: Tags of pretrained weights, the default first; empty where timm has no weights.
        input_size: Height and width of the image in px that the default weights were made for.
        licence: Licence of the default weights, if timm knows it.
        method: The method that is taken where none is named.
    """

    name: str
    alias: str | None
    family: str
    tags: tuple[str, ...]
    input_size: tuple[int, int]
    licence: str | None
    method: str


@dataclass(frozen=True)
class ModelName:
    """A name as timm has it now: architecture, tag of the weights (empty for the default), and what to tell a user."""

    architecture: str
    tag: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture


@cache
def architectures() -> dict[str, str]:
    """The family of every supported architecture, by timm's name, in timm's natural order."""
    found: dict[str, str] = {}
    for family, modules in supported_modules().items():
        found |= dict.fromkeys(timm.list_models(module=list(modules)), family)
    return found


@cache
def aliases() -> dict[str, str]:
    """timm's name by alias."""
    short = {
        name.removesuffix(suffix): name
        for suffix in ALIAS_SUFFIXES for name in architectures() if name.endswith(suffix)
    }  # fmt: skip
    return {alias: name for alias, name in short.items() if not is_model(alias)}


def is_name(spec: str) -> bool:
    """Whether timm has a model of that name or alias, supported or not."""
    return spec.partition(".")[0] in aliases() or is_model(spec)


def usual_method(spec: str) -> str | None:
    """The method that is taken for a model where none is named, as far as its name tells; None for what is no name."""
    written = spec.partition(".")[0]
    family = architectures().get(aliases().get(written, written))
    return None if family is None else default_methods()[family]


def resolve_name(spec: str) -> ModelName:
    """Reads a timm name or alias, with or without a pretrained tag; names that timm has renamed are followed.

    Args:
        spec: Such as `deit_tiny` or `vit_base_patch16_224.augreg_in1k`.

    Raises:
        UsageError: There is no such name or tag; the nearest are offered.
        ModelError: timm has the model, but its family is not supported, or timm has removed it.
    """
    written, _, tag = spec.partition(".")
    name = aliases().get(written, written)
    notes: tuple[str, ...] = ()
    renamed = get_deprecated_models()
    if name in renamed:
        current = renamed[name]
        if not current:
            raise ModelError(f"timm has removed {name}; 'tokencut models' lists the names there are")
        notes = (f"timm calls {name} {current} now",)
        name, _, current_tag = current.partition(".")
        tag = tag or current_tag
    if not is_model(name):
        raise UsageError(f"unknown model {spec!r}{_nearest(written)} 'tokencut models' lists the names")
    if name not in architectures():
        module = model_entrypoint(name).__module__.rpartition(".")[2]
        raise ModelError(f"{name} is of timm's family {module}, which is not supported; supported are: "
                         f"{', '.join(supported_modules())}; 'tokencut models' lists the names")  # fmt: skip
    if tag and tag not in _tags(name):
        known = f"its tags are {', '.join(_tags(name))}" if _tags(name) else f"it has none, type {written}"
        raise UsageError(f"{name} has no weights tagged {tag!r}; {known}")
    return ModelName(name, tag, notes)


def list_supported(pattern: str | None = None) -> list[SupportedModel]:
    """The supported models, without building any.

    Args:
        pattern: A shell pattern (`vit_*_dinov2`), or a part of a name where it has no wildcard; matched against names
            and aliases. None for all.
    """
    alias_of = {name: alias for alias, name in aliases().items()}
    found = []
    for name, family in architectures().items():
        alias = alias_of.get(name)
        if pattern is None or any(_matches(word, pattern) for word in (name, alias) if word):
            cfg = get_pretrained_cfg(name)
            _, height, width = cfg.input_size if cfg else (3, 224, 224)
            licence = cfg.license if cfg and cfg.has_weights else None
            tags, method = _tags(name, weights=True), default_methods()[family]
            found.append(SupportedModel(name, alias, family, tags, (height, width), licence, method))
    return found


def _matches(name: str, pattern: str) -> bool:
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatch.fnmatchcase(name, pattern.lower())
    return pattern.lower() in name


def _tags(name: str, weights: bool = False) -> tuple[str, ...]:
    """Tags of an architecture, the default first."""
    default = get_pretrained_cfg(name)
    cfgs = [cfg for cfg in get_arch_pretrained_cfgs(name).values() if cfg.tag and (cfg.has_weights or not weights)]
    return tuple(str(cfg.tag) for cfg in sorted(cfgs, key=lambda cfg: default is None or cfg.tag != default.tag))


def _nearest(word: str) -> str:
    return nearest_known(word.lower().replace("-", "_"), [*aliases(), *architectures(), "digits"], most=3, cutoff=0.6)
