"""Writes a model as a file of a runtime or as timm's folder, and checks it on images before it is kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokencut.adapters import plain_model
from tokencut.data.sources import Source
from tokencut.errors import ArtifactError, UsageError
from tokencut.export.check import Agreement, check_images, compare
from tokencut.export.graph import Graph, Normalised
from tokencut.export.info import ExportInfo, describe_export
from tokencut.export.quantizing import QuantizedReport, Quantizing, check_quantizing, quantized_file
from tokencut.export.runtimes import Runtime, exported_kind, runtimes
from tokencut.export.timm_folder import check_folder, read_folder, write_folder
from tokencut.files import atomic_folder, user_path, with_ending
from tokencut.limits import check_number
from tokencut.model import require_one_schedule
from tokencut.models.checkpoints import require_finite
from tokencut.models.quantized import refuse_quantized
from tokencut.observers import Observer
from tokencut.runtime.devices import inference_state

# timm's folder, which is no file of a runtime.
TIMM = "timm"
# TensorRT's, for one GPU and one version of it; its wheel comes from an index of NVIDIA's own.
ENGINES = (".engine", ".plan")
DEFAULT_BATCH_SIZE = 16


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares.

    Attributes:
        output: The file or folder.
        format: The runtime's name, such as `onnx`, or `timm`.
        info: What the file says about its model.
        opset: ONNX opset; None for the others.
        bytes: Its size, files beside it included.
        agreement: The file against the model, on images; of a quantised one, the file in fp32 that it was made from.
        quantized: What quantising it gave; None for a file in fp32.
        notes: What a user should know.
    """

    output: Path
    format: str
    info: ExportInfo
    opset: int | None
    bytes: int
    agreement: Agreement
    notes: tuple[str, ...]
    quantized: QuantizedReport | None = None

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
            **({} if self.quantized is None else self.quantized.to_dict()),
            "notes": list(self.notes),
        }


def check_export(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    opset: int | None = None,
    format: str | None = None,  # noqa: A002 (as the option is called)
    dynamic_batch: bool = True,
    with_preprocessing: bool = False,
    quantize: str | None = None,
    calibration: str | os.PathLike[str] | Source | None = None,
    calibration_limit: int | None = None,
    allow_drop: float | None = None,
    observer: Observer | None = None,
) -> tuple[Path, str, Quantizing | None]:
    """Refuses an export that could not end well, before any work is done for it.

    Args:
        path: The file to be written; for timm a folder.
        force: Whether a file of that name, or a folder that was written here, may be replaced.
        opset: ONNX opset; the default where None.
        format: What to write; where None as the name ends.
        dynamic_batch: As `export_model` takes it.
        with_preprocessing: As `export_model` takes it.
        quantize: As `export_model` takes it.
        calibration: As `export_model` takes it.
        calibration_limit: As `export_model` takes it.
        allow_drop: As `export_model` takes it.
        observer: Told what takes long: the unpacking of an archive.

    Returns:
        The path, what to write, and how it is to be quantised, if at all.

    Raises:
        UsageError: The name ends like no kind of file, or the opset is out of range.
        TokencutError: A package is missing, or the file cannot be written.
    """
    target = user_path(path)
    quantizing = partial(
        check_quantizing, quantize, target=target, calibration=calibration, images=calibration_limit,
        allow_drop=allow_drop, observer=observer,
    )  # fmt: skip
    if format == TIMM:
        _refuse_graph_options(opset, dynamic_batch, with_preprocessing)
        quantizing(None)
        return check_folder(target, force=force), TIMM, None
    kind = _chosen(target, format)
    if opset is not None:
        takes = sorted(each.suffix for each in runtimes().values() if each.default_opset)
        if kind.default_opset is None:
            raise UsageError(f"`opset` is for {' and '.join(takes)} files, and {target} is none; leave it out")
        check_number("opset", opset)
    kind.check_writable(target)
    kind.require_writable(target, force=force)
    return target, kind.name, quantizing(kind)


def _chosen(target: Path, format: str | None) -> Runtime:  # noqa: A002 (as the option is called)
    """The kind of file to write, by its name or as it was asked for."""
    known = runtimes()
    if format is not None and format not in known:
        raise UsageError(f"format {format!r} is none of {', '.join((*known, TIMM))}; type `format='timm'`, or leave "
                         "it out")  # fmt: skip
    if target.suffix.lower() in ENGINES:
        example = str(target.with_suffix(".onnx"))
        raise UsageError(f"{target} would be an engine, which TensorRT builds of an .onnx file on the GPU that runs "
                         f"it; type `path={example!r}`, and give that to trtexec there")  # fmt: skip
    by_name = exported_kind(target)
    kind = by_name if format is None else known[format]
    if kind is None:
        endings = ", ".join(sorted(each.suffix for each in known.values()))
        raise UsageError(f"{target} ends in none of {endings}, which say what to write; type "
                         f"`path={str(with_ending(target, '.onnx', 'model'))!r}`, or `format='timm'` for a folder"
                         )  # fmt: skip
    if kind is not by_name:
        raise UsageError(f"{target} does not end in {kind.suffix}, as a file of the format {kind.name} does; type "
                         f"`path={str(with_ending(target, kind.suffix, 'model'))!r}`")  # fmt: skip
    return kind


def _refuse_graph_options(opset: int | None, dynamic_batch: bool, with_preprocessing: bool) -> None:
    """Refuses for a folder of timm's what says how a graph is written."""
    given = {
        "`opset`": opset is not None,
        "`with_preprocessing=True`": with_preprocessing,
        "`dynamic_batch=False`": not dynamic_batch,
    }
    option = next((name for name, typed in given.items() if typed), None)
    if option is not None:
        raise UsageError(f"{option} is for files of one graph, such as .onnx, and a folder of timm's holds none; leave "
                         "it out")  # fmt: skip


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
    format: str | None = None,  # noqa: A002 (as the option is called)
    measured: Mapping[str, float] | None = None,
    quantize: str | None = None,
    calibration: str | os.PathLike[str] | Source | None = None,
    calibration_limit: int | None = None,
    allow_drop: float | None = None,
    observer: Observer | None = None,
) -> ExportReport:
    """Writes a model as a file of a runtime, or timm's folder, and compares the two: all of it is there, or nothing.

    A file computes in fp32; it takes `images`, `(B, C, H, W)`, and gives `logits`. It is run by the runtime that it is
    for. A .pt2 is made for the CPU: `torch.export.passes.move_to_device_pass` takes it to a GPU. A folder is as timm's
    hub has them, with a README: timm loads it as the dense model, tokencut as the compressed one.

    Args:
        model: Dense or compressed, in fp32; it stays as it was.
        path: A file that ends like its kind, such as `*.onnx`, or `*.pt2` for `torch.export.load`; for timm a folder.
        opset: ONNX opset, 18 to 22; 20 where None.
        dynamic_batch: Whether the file takes any number of images (a .pte up to 32, a .tflite one at a time); otherwise
            `batch_size` of them.
        batch_size: Images in a forward.
        with_preprocessing: Whether the file normalises: it then takes RGB from 0 to 1, as `ToTensor` gives it.
        force: Whether a file of that name, or a folder that was written here, may be replaced.
        data: Images to compare on, as `evaluate` takes them; where None the digits for the bundled model, or noise.
        limit: How many of them, evenly spread; 64 where None.
        name: What the file calls the model; by default its architecture and tag.
        format: The kind's name, such as `onnx`, or `timm`; where None as the name ends.
        measured: For timm's folder: what was measured, as `tokencut.save` takes it.
        quantize: `int8` for the products of blocks with their weights in eight bits, where the kind of file has that; a
            file in fp32 where None. It is made of one that gives the model's logits, and compared with that on `data`
            (1,000 of them where `limit` is None), else on `calibration`.
        calibration: Images to take the ranges of numbers from, as `evaluate` takes them, never those of `data`; where
            None a file takes them anew in each forward, if its runtime does that.
        calibration_limit: How many of them, evenly spread; 128 where None.
        allow_drop: Points of top-1 that quantising may cost; 1 where None.
        observer: Told what takes long: the unpacking of an archive, the judging of a quantised file.

    Returns:
        The report.

    Raises:
        UsageError: An argument is wrong.
        ModelError: The model cannot be captured as one graph.
        DataError: The images cannot be found or read.
        ArtifactError: The file cannot be written, or does not give the model's logits, or quantising it costs more than
            is allowed.

    Example:
        >>> import tokencut
        >>> from tokencut.models.loading import load_model
        >>> model = tokencut.compress(load_model("digits").model, keep=0.6)
        >>> report = tokencut.export_model(model, "out.pt2", limit=16)
        >>> report.output.name, report.agreement.images
        ('out.pt2', 16)
    """
    target, kind, quantizing = check_export(
        path,
        force=force,
        opset=opset,
        format=format,
        dynamic_batch=dynamic_batch,
        with_preprocessing=with_preprocessing,
        quantize=quantize,
        calibration=calibration,
        calibration_limit=calibration_limit,
        allow_drop=allow_drop,
        observer=observer,
    )
    model = plain_model(model)
    refuse_quantized(model, "exported")
    require_one_schedule(model, "export_model")
    require_finite(model)
    _check_model(model, batch_size)
    if kind == TIMM:
        return _export_folder(model, target, name, batch_size, data, limit, measured, observer)
    runtime = runtimes()[kind]
    _check_size(model, target, runtime)
    chosen = opset or runtime.default_opset
    one_size = (1 if runtime.one_batch else None) if dynamic_batch else batch_size
    info = describe_export(model, name=name, normalises=with_preprocessing, batch_size=one_size)
    images = check_images(model, data, limit=limit, observer=observer)
    with (
        inference_state(model, torch.device("cpu")),
        torch.no_grad(),
        runtime.writing(target, force=force) as temporary,
    ):
        served = Normalised(model, images.prepared) if with_preprocessing else model
        graph, file = Graph(served, info, chosen, runtime.largest_batch), temporary
        if quantizing is not None:
            file = temporary.parent / "fp32" / temporary.name
            file.parent.mkdir()
        runtime.write(graph, file)
        written = runtime.checked(graph, file)
        agreement = compare(
            model, written, images, batch_size, normalises=with_preprocessing, any_number=one_size is None
        )
        agreement.require(target)
        size, quantized, notes = runtime.size(file), None, (*images.notes, *agreement.notes(), *runtime.advice)
        if quantizing is not None:
            judged_on = None if images.real is None else images.real.source
            quantized = quantized_file(
                graph, runtime, written, temporary, quantizing, target=target, data=judged_on, limit=limit,
                batch_size=batch_size, fp32_bytes=size, observer=observer,
            )  # fmt: skip
            size, notes = runtime.size(temporary), (*notes, *quantized.notes())
            info = replace(info, quantized=quantizing.kind)
    return ExportReport(target, kind, info, chosen, size, agreement, notes, quantized)


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
    return ExportReport(target, TIMM, info, None, size, agreement, (*notes, *images.notes, *agreement.notes()))


def _check_model(model: nn.Module, batch_size: int) -> None:
    check_number("batch_size", batch_size)
    weights = (*model.parameters(), *model.buffers())
    other = next((w.dtype for w in weights if w.is_floating_point() and w.dtype != torch.float32), None)
    if other is not None:
        raise UsageError(f"export takes a model in fp32, and this one has weights in {str(other).partition('.')[2]}; "
                         "call model.float() first")  # fmt: skip


def _check_size(model: nn.Module, target: Path, runtime: Runtime) -> None:
    size = sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
    if runtime.most_weights is not None and size > runtime.most_weights:
        raise ArtifactError(f"the model has {size / 2**30:.1f} GiB of weights, which is more than one {runtime.suffix} "
                            f"file holds; type `path={str(target.with_suffix('.pt2'))!r}`")  # fmt: skip
