"""A model as timm's hub has them: a folder with `config.json`, `model.safetensors` and a README that tells its recipe.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads the dense weights; tokencut loads the compressed model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from tokencut.errors import ArtifactError, ModelError, UsageError
from tokencut.export.info import ExportInfo
from tokencut.files import check_writable_folder
from tokencut.messages import listed, one_line
from tokencut.model import CompressedModel
from tokencut.models import artifact
from tokencut.models.alterations import alterations_of
from tokencut.models.building import capture_timm_messages
from tokencut.models.hub import CONFIG, WEIGHTS, read_object
from tokencut.models.pretrained_cfg import frames_of

README = "README.md"
ASSETS = Path(__file__).parents[1] / "assets"
FILES = (WEIGHTS[0], CONFIG, README)
# By which a folder of ours is told: a field that timm's own config does not have.
MARK = "tokencut"


def check_folder(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Refuses a folder that must not be written to, before any work is done for it.

    Args:
        path: The folder, which need not exist.
        force: Whether one that was written here may be replaced.

    Raises:
        ArtifactError: It cannot be made, holds other files (those that begin with a dot do not count), or was written
            here and `force` is off.
    """
    target = check_writable_folder(path)
    held = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    others = [name for name in held if name not in FILES and not name.startswith(".")]
    ours = not held or MARK in (read_object(target / CONFIG) or {})
    if others or (not ours and any(name in FILES for name in held)):
        shown = listed(others or [name for name in held if name in FILES])
        raise ArtifactError(f"{target} holds {shown}, which was not written here; give another `path`, a folder that "
                            "need not exist")  # fmt: skip
    if any(name in FILES for name in held) and not force:
        raise ArtifactError(f"{target} exists; add `force=True` to replace it, or give another `path`")
    return target


def write_folder(
    model: nn.Module, folder: Path, info: ExportInfo, *, measured: Mapping[str, float] | None = None
) -> tuple[str, ...]:
    """Writes the files, and looks at what timm makes of them.

    Args:
        model: Dense or compressed, in fp32.
        folder: An existing, empty one.
        info: What is told of the model.
        measured: What was measured, as `tokencut.save` takes it.

    Returns:
        What a user should know.

    Raises:
        UsageError: The model cannot be one of timm's.
        ModelError: It cannot be built again from timm's arguments, or timm loads other weights than it has.
    """
    inner: Any = model.model if isinstance(model, CompressedModel) else model
    notes = _check(model, inner)
    recipe = info.recipe.to_json() if info.recipe else None
    names = list(info.label_names) if isinstance(info.label_names, tuple) else info.label_names
    described: dict[str, Any] = {MARK: {"recipe": recipe}, **({"label_names": names} if names else {})}
    try:
        save_for_hf(inner, str(folder), model_config=described, safe_serialization=True)
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # of a model that timm did not build
        raise ModelError(f"timm cannot describe the model ({one_line(error)}); build it with timm.create_model(NAME, "
                         "...)") from error  # fmt: skip
    if isinstance(model, CompressedModel):  # the same tensors, with the recipe in the file's header
        told = {"gmacs": info.gmacs, "dense_gmacs": info.dense_gmacs, **(measured or {})}
        artifact.save(model, folder / WEIGHTS[0], force=True, measured=told)
    (folder / README).write_text(_readme(info, alterations_of(inner).norm_eps, measured or {}), encoding="utf-8")
    _require_weights(folder, inner.state_dict())
    return notes


def read_folder(folder: Path, info: ExportInfo) -> Callable[[Tensor], Tensor]:
    """The model that a folder holds: compressed where it was, by tokencut; dense, by timm."""
    loaded: nn.Module = artifact.load(folder / WEIGHTS[0]) if info.recipe else _by_timm(folder)
    return loaded.eval()


def _check(model: nn.Module, inner: nn.Module) -> tuple[str, ...]:
    if isinstance(model, CompressedModel) and any(stage.learned is not None for stage in model.stages.values()):
        raise UsageError(f"the stages of method {model.recipe.method} have weights of their own, which timm would "
                         "refuse; pass on the one file that `tokencut.save(model, 'FILE')` writes")  # fmt: skip
    if frames_of(inner) is not None:
        raise UsageError("timm has no models of clips, so that it could not load the folder; pass on the one file that "
                         "`tokencut.save(model, 'FILE')` writes")  # fmt: skip
    altered = alterations_of(inner)
    if altered.pool is not None:
        raise UsageError("the head reads the class token beside the mean of the patches, which no model of timm's "
                         "does; pass on the one file that `tokencut.save(model, 'FILE')` writes")  # fmt: skip
    if altered.norm_eps is None:
        return ()
    return (f"its layer norms add {altered.norm_eps:g} to variances, for which timm has no argument: logits that timm "
            "computes differ in the fifth digit",)  # fmt: skip


def _by_timm(folder: Path) -> nn.Module:
    with capture_timm_messages(), torch.random.fork_rng(devices=[]):
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model


def _require_weights(folder: Path, wanted: Mapping[str, Tensor]) -> None:
    try:
        found = _by_timm(folder).state_dict()
    except Exception as error:  # whatever timm raises over a config or weights that are not its own
        raise ModelError(f"timm would not load the folder ({one_line(error)}); please report the model's name and "
                         "options") from error  # fmt: skip
    if found.keys() != wanted.keys() or not all(torch.equal(found[name], wanted[name].cpu()) for name in wanted):
        raise ModelError("timm would load other weights from the folder; please report the model's name and options")


def _readme(info: ExportInfo, norm_eps: float | None, measured: Mapping[str, float]) -> str:
    """A model card, in the form that the hub reads."""
    licence = f"license: {json.dumps(one_line(info.origin.licence))}\n" if info.origin.licence else ""
    channels, height, width = info.preprocessing["input_size"]
    rows = [
        ("model", info.model),
        ("weights from", str(info.origin)),
        ("input", f"{height} x {width} px, {channels} channels"),
        ("parameters", f"{info.params:,}"),
        ("classes", f"{info.num_classes:,}"),
    ]
    recipe = info.recipe
    if recipe is not None:
        keep = "/".join(map(str, recipe.keep)) if isinstance(recipe.keep, list) else recipe.keep
        tokens = " -> ".join(map(str, (recipe.tokens, *(stage.tokens_out for stage in recipe.stages))))
        settings = " ".join(f"{name}={value}" for name, value in sorted(recipe.method_options.items()))
        rows += [
            ("method", recipe.method + (f" ({settings})" if settings else "")),
            ("keep", f"{keep}" if keep is not None else f"{recipe.schedule.reduce_by} tokens fewer a layer"),
            ("in blocks", ", ".join(map(str, recipe.layers))),
            ("image tokens", tokens),
            ("GMACs an image", f"{info.dense_gmacs:.4g} -> {info.gmacs:.4g}"),
        ]
    else:
        rows.append(("GMACs an image", f"{info.gmacs:.4g}"))
    if "top1" in measured and "images" in measured:
        before = f"{measured['dense_top1']:.2f} -> " if "dense_top1" in measured else ""
        rows.append(("top-1 in percent", f"{before}{measured['top1']:.2f}, on {measured['images']:,.0f} images"))
    exact = "" if norm_eps is None else (
        f"\nIts layer norms add {norm_eps:g} to variances, which timm has no argument for: the logits of timm's model "
        "differ in the fifth digit, tokencut's do not.\n")  # fmt: skip
    card = Template((ASSETS / "timm_card.md").read_text(encoding="utf-8"))
    return card.substitute(
        licence=licence,
        title=_cell(info.model) + ("" if recipe is None else f" with {_cell(recipe.method)} at fewer tokens"),
        rows="\n".join(f"| {name} | {_cell(value)} |" for name, value in rows),
        dense="The weights" if recipe is None else "The dense weights",
        compressed="" if recipe is None else (ASSETS / "timm_card_compressed.md").read_text(encoding="utf-8"),
        epsilon=exact,
    )


def _cell(value: Any) -> str:
    """A value in a table: one line that ends no cell and begins no markup."""
    return one_line(value).replace("|", "\\|").replace("<", "&lt;")
