"""Writes a model as .onnx, .pt2 (torch.export) or timm's folder, and checks it on images before it is kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from tokencut.adapters import plain_model
from tokencut.data.sources import Source
from tokencut.errors import ArtifactError, UsageError
from tokencut.export.check import Agreement, check_images, compare
from tokencut.export.formats import Normalised, captured, read_pt2, write_onnx, write_pt2
from tokencut.export.info import ExportInfo, describe_export
from tokencut.export.onnx_model import ONNX_SUFFIX, OnnxModel
from tokencut.export.timm_folder import check_folder, read_folder, write_folder
from tokencut.files import atomic_folder, atomic_write, check_writable, user_path, with_ending
from tokencut.limits import check_number
from tokencut.models.checkpoints import require_finite
from tokencut.models.quantized import refuse_quantized
from tokencut.observers import Observer
from tokencut.runtime import extras
from tokencut.runtime.devices import inference_state

PT2_SUFFIX = ".pt2"
Format = Literal["onnx", "pt2", "timm"]
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# 18 is the first with the minimum and maximum among scatters. From 23 on attention is one operator, which onnxruntime
# 1.32 runs only with a mask for every query: proportional attention has one for all.
DEFAULT_OPSET = 18
DEFAULT_BATCH_SIZE = 16
# A message of protobuf, and so an .onnx file in one piece, holds less than 2 GiB; the graph takes a few MB of it.
ONNX_LIMIT = 2_100_000_000


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares.

    Attributes:
        output: The file or folder.
        format: `onnx`, `pt2` or `timm`.
        info: What the file says about its model.
        opset: ONNX opset; None for the others.
        bytes: Its size.
        agreement: The file against the model, on images.
        notes: What a user should know.
    """

    output: Path
    format: Format
    info: ExportInfo
    opset: int | None
    bytes: int
    agreement: Agreement
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        recipe = self.info.recipe
        return {
            "output": str(self.output),
            "format": self.format,
            "model": self.info.model,
            "method": recipe.method if recipe else None,
            "keep": recipe.keep if recipe else 1.0,
            "opset": self.opset,
            "dynamic_batch": self.info.batch_size is None,
            "batch_size": self.info.batch_size,
            "with_preprocessing": self.info.normalises,
            "gmacs": self.info.gmacs,
            "params": self.info.params,
            "bytes": self.bytes,
            **self.agreement.to_dict(),
            "notes": list(self.notes),
        }


def check_export(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    opset: int | None = None,
    format: Format | None = None,  # noqa: A002 (as the option is called)
    dynamic_batch: bool = True,
    with_preprocessing: bool = False,
) -> tuple[Path, Format]:
    """Refuses an export that could not end well, before any work is done for it.

    Args:
        path: The file to be written; for timm a folder.
        force: Whether a file of that name, or a folder that was written here, may be replaced.
        opset: ONNX opset; the default where None.
        format: What to write; where None as the name ends.
        dynamic_batch: As `export_model` takes it.
        with_preprocessing: As `export_model` takes it.

    Returns:
        The path, and what to write.

    Raises:
        UsageError: The name ends neither in `.onnx` nor in `.pt2`, or the opset is out of range.
        TokencutError: A package is missing, or the file cannot be written.
    """
    target = user_path(path)
    if format is not None and format not in get_args(Format):
        raise UsageError(f"format {format!r} is none of {', '.join(get_args(Format))}; type `format='timm'`, or leave "
                         "it out")  # fmt: skip
    by_name: dict[str, Format] = {ONNX_SUFFIX: "onnx", PT2_SUFFIX: "pt2"}
    chosen = format or by_name.get(target.suffix)
    if chosen is None:
        raise UsageError(f"{target} ends neither in {ONNX_SUFFIX} nor in {PT2_SUFFIX}, which says what to write; type "
                         f"`path={str(with_ending(target, ONNX_SUFFIX, 'model'))!r}`, or `format='timm'` for a folder"
                         )  # fmt: skip
    if chosen != "timm" and by_name.get(target.suffix) != chosen:
        raise UsageError(f"{target} does not end in .{chosen}, as a file of the format {chosen} does; type "
                         f"`path={str(with_ending(target, '.' + chosen, 'model'))!r}`")  # fmt: skip
    if chosen != "onnx" and opset is not None:
        raise UsageError(f"`opset` is for {ONNX_SUFFIX} files, and {target} is none; leave it out")
    if opset is not None:
        check_number("opset", opset)
    if chosen == "timm":
        if with_preprocessing or not dynamic_batch:
            given = "`with_preprocessing=True`" if with_preprocessing else "`dynamic_batch=False`"
            raise UsageError(f"{given} is for {ONNX_SUFFIX} and {PT2_SUFFIX} files, and a folder of timm's holds no "
                             "graph; leave it out")  # fmt: skip
        return check_folder(target, force=force), chosen
    if chosen == "onnx":
        extras.require(f"writing {target} needs", *PACKAGES, extra="onnx")
    return check_writable(target, force=force), chosen


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    with_preprocessing: bool = False,
    force: bool = False,
    data: str | os.PathLike[str] | Source | None = None,
    limit: int | None = None,
    name: str | None = None,
    format: Format | None = None,  # noqa: A002 (as the option is called)
    measured: Mapping[str, float] | None = None,
    observer: Observer | None = None,
) -> ExportReport:
    """Writes a model to one file, or a folder of timm's, and compares the two: all of it is there, or nothing.

    The file computes in fp32; it takes `images`, `(B, C, H, W)`, and gives `logits`. A .pt2 is made for the CPU:
    `torch.export.passes.move_to_device_pass` takes it to a GPU. A folder is as timm's hub has them, with a README: timm
    loads it as the dense model, tokencut as the compressed one.

    Args:
        model: Dense or compressed, in fp32; it stays as it was.
        path: A file `*.onnx`, or `*.pt2` for `torch.export.load`; for timm a folder.
        opset: ONNX opset, 18 to 22; 18 where None.
        dynamic_batch: Whether the file takes any number of images; otherwise `batch_size` of them.
        batch_size: Images in a forward.
        with_preprocessing: Whether the file normalises: it then takes RGB from 0 to 1, as `ToTensor` gives it.
        force: Whether a file of that name, or a folder that was written here, may be replaced.
        data: Images to compare on, as `evaluate` takes them; where None the digits for the bundled model, or noise.
        limit: How many of them, evenly spread; 64 where None.
        name: What the file calls the model; by default its architecture and tag.
        format: `onnx`, `pt2` or `timm`; where None as the name ends.
        measured: For timm's folder: what was measured, as `tokencut.save` takes it.
        observer: Told what takes long before the first batch: the unpacking of an archive.

    Returns:
        The report.

    Raises:
        UsageError: An argument is wrong.
        ModelError: The model cannot be captured as one graph.
        DataError: The images cannot be found or read.
        ArtifactError: The file cannot be written, or does not give the model's logits.

    Example:
        >>> import tokencut
        >>> from tokencut.models.loading import load_model
        >>> model = tokencut.compress(load_model("digits").model, keep=0.6)
        >>> report = tokencut.export_model(model, "out.pt2", limit=16)
        >>> report.output.name, report.agreement.images
        ('out.pt2', 16)
    """
    target, kind = check_export(
        path,
        force=force,
        opset=opset,
        format=format,
        dynamic_batch=dynamic_batch,
        with_preprocessing=with_preprocessing,
    )
    model = plain_model(model)
    refuse_quantized(model, "exported")
    require_finite(model)
    _check_model(model, target, batch_size)
    if kind == "timm":
        return _export_folder(model, target, name, batch_size, data, limit, measured, observer)
    chosen = opset or DEFAULT_OPSET if kind == "onnx" else None
    info = describe_export(
        model, name=name, normalises=with_preprocessing, batch_size=None if dynamic_batch else batch_size
    )
    images = check_images(model, data, limit=limit, observer=observer)
    with inference_state(model, torch.device("cpu")), torch.no_grad(), atomic_write(target, force=force) as temporary:
        served = Normalised(model, images.prepared) if with_preprocessing else model
        program = captured(served, info)
        if chosen is None:
            write_pt2(program, info, temporary)
        else:
            write_onnx(program, info, chosen, temporary)
        written = read_pt2(temporary, info) if chosen is None else OnnxModel(temporary)
        agreement = compare(model, written, images, batch_size, normalises=with_preprocessing)
        agreement.require(target)
        size = temporary.stat().st_size
    return ExportReport(target, kind, info, chosen, size, agreement, (*images.notes, *agreement.notes()))


def _export_folder(
    model: nn.Module,
    target: Path,
    name: str | None,
    batch_size: int,
    data: str | os.PathLike[str] | Source | None,
    limit: int | None,
    measured: Mapping[str, float] | None,
    observer: Observer | None,
) -> ExportReport:
    info = describe_export(model, name=name)
    images = check_images(model, data, limit=limit, observer=observer)
    with inference_state(model, torch.device("cpu")), torch.no_grad(), atomic_folder(target) as temporary:
        notes = write_folder(model, temporary, info, measured=measured)
        agreement = compare(model, read_folder(temporary, info), images, batch_size, normalises=False)
        agreement.require(target)
        size = sum(file.stat().st_size for file in temporary.iterdir())
    return ExportReport(target, "timm", info, None, size, agreement, (*notes, *images.notes, *agreement.notes()))


def _check_model(model: nn.Module, target: Path, batch_size: int) -> None:
    check_number("batch_size", batch_size)
    weights = [*model.parameters(), *model.buffers()]
    other = next((w.dtype for w in weights if w.is_floating_point() and w.dtype != torch.float32), None)
    if other is not None:
        raise UsageError(f"export takes a model in fp32, and this one has weights in {str(other).partition('.')[2]}; "
                         "call model.float() first")  # fmt: skip
    size = sum(weight.nbytes for weight in weights)
    if target.suffix == ONNX_SUFFIX and size > ONNX_LIMIT:
        raise ArtifactError(f"the model has {size / 2**30:.1f} GiB of weights, and an {ONNX_SUFFIX} file holds less "
                            f"than 2; type `path={str(target.with_suffix(PT2_SUFFIX))!r}`")  # fmt: skip
