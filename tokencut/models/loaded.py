"""A model that was asked for, and the last steps until it is had: a checkpoint, what is told, and its description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokencut.errors import ModelError
from tokencut.model import CompressedModel
from tokencut.models import artifact, fitting
from tokencut.models.checkpoints import is_npz, not_finite, read_checkpoint, sha256
from tokencut.models.fields import preprocessing_problem
from tokencut.models.metadata import ArtifactInfo, Origin
from tokencut.models.pretrained_cfg import data_config, description_of, sync_pretrained_cfg
from tokencut.recipe import Recipe


@dataclass(frozen=True)
class Loaded:
    """A model that was asked for by MODEL.

    Attributes:
        model: In eval mode, on the CPU: timm's own, or a `CompressedModel` where MODEL is a tokencut file.
        name: timm's name with the tag of the weights it got; MODEL itself where it is a file, `digits` or has a scheme.
        origin: Where the weights came from.
        info: What the file says, where MODEL is a tokencut file or a folder with one.
        notes: What a user should be told, one line each.
        new_head: Whether the classifier has random weights.
        preprocessing_told: Whether the source of the weights says how images are prepared, or the user did.
    """

    model: nn.Module
    name: str
    origin: Origin
    info: ArtifactInfo | None = None
    notes: tuple[str, ...] = ()
    new_head: bool = False
    preprocessing_told: bool = True

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of a tokencut file, or of the description beside one that is not there."""
        return self.model.recipe if isinstance(self.model, CompressedModel) else None

    @property
    def dense(self) -> nn.Module:
        """timm's own model, without stages."""
        return self.model.model if isinstance(self.model, CompressedModel) else self.model


@dataclass(frozen=True)
class Request:
    """What was asked for beside MODEL; see `load_model`."""

    pretrained: bool = True
    checkpoint: Path | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    weights_needed: bool = True
    seed: int = 0
    to_be_trained: bool = False

    @property
    def fetches(self) -> bool:
        """Whether the model's own pretrained weights are to be loaded."""
        return self.pretrained and self.weights_needed and self.checkpoint is None


def finish(
    model: nn.Module,
    name: str,
    origin: Origin | None,
    request: Request,
    notes: tuple[str, ...],
    *,
    foreign: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
) -> Loaded:
    """Loads a checkpoint, and makes the model and the notes tell what weights it has; no `origin`: random so far.

    `foreign`: the weights are not those that timm's description tells of. `tensors`: of the checkpoint, if it is read.
    """
    told, new_head = list(notes), False
    if request.checkpoint is not None:
        more, new_head = _load_checkpoint(model, request, request.checkpoint, tensors)
        told += more
        origin = Origin("checkpoint", sha256=sha256(request.checkpoint))
    elif origin is None:
        new_head = True
        told.append(f"{name} has random weights (seed {request.seed})")
    elif model.num_classes not in (0, description_of(model).get("num_classes")):
        new_head = True
        told.append(f"the head of {model.num_classes} classes is new: its weights are random (seed {request.seed}) "
                    "until it is trained")  # fmt: skip
    if origin is not None and (problem := not_finite(model.state_dict())):
        raise ModelError(f"the weights of {name} cannot be used: {problem}; give others by `checkpoint='FILE'`")
    if request.preprocessing:
        setattr(model, "pretrained_cfg", {**description_of(model), **request.preprocessing})  # noqa: B010 (not a tensor)
    if problem := preprocessing_problem(data_config(model)):
        raise ModelError(f"no image can be prepared for {name}: its description{problem}; give what its weights were "
                         "trained with, such as `interpolation='bicubic'` or `crop_pct=0.9`")  # fmt: skip
    own = origin is not None and origin.kind != "checkpoint" and not foreign
    sync_pretrained_cfg(model, own_weights=own)
    origin = origin or Origin("random", seed=request.seed)
    artifact.mark_origin(model, origin)
    silent = request.checkpoint is not None and not request.preprocessing
    return Loaded(
        model.eval(), name, origin, notes=tuple(told), new_head=new_head, preprocessing_told=not silent
    )  # fmt: skip


def _load_checkpoint(
    model: nn.Module, request: Request, file: Path, tensors: Mapping[str, Tensor] | None
) -> tuple[tuple[str, ...], bool]:
    """Loads a file of weights; what is to be told of it, and whether the head is a new one."""
    if is_npz(file):
        return fitting.load_npz(model, file, new_head=request.to_be_trained)
    told: tuple[str, ...] = ()
    if tensors is None:
        tensors, told = read_checkpoint(file)
    notes, new_head = fitting.load_fitted(model, tensors, file, new_head=request.to_be_trained)
    return (*told, *notes), new_head
