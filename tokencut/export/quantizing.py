"""A file in eight bits beside the same in fp32: what it is made by, what it costs, and whether that is too much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencut.data.image_set import images_for
from tokencut.data.sources import Source, open_source
from tokencut.errors import DataError, UsageError
from tokencut.evaluation.accuracy import evaluate
from tokencut.evaluation.comparison import ComparisonReport
from tokencut.evaluation.quantized import ALLOWED_DROP, quantized_beside
from tokencut.evaluation.statistics import if_known
from tokencut.export.check import CheckImages, check_images, compare
from tokencut.export.graph import Graph
from tokencut.export.runtimes import ExportedModel, Runtime
from tokencut.limits import check_number
from tokencut.models.pretrained_cfg import class_count
from tokencut.observers import Observer
from tokencut.runtime import extras

# Evenly spread ones; onnxruntime's calibration keeps what it has seen of each in memory.
CALIBRATION_IMAGES = 128
# A difference of 1 point of 1,000 images is 2 to 3 of its standard errors.
JUDGED = 1000


@dataclass(frozen=True)
class Quantizing:
    """How a file is to be quantised.

    Attributes:
        kind: `int8`.
        calibration: Images to take the ranges of numbers from, never those of `data`; None for none.
        images: How many of them.
        allowed: Points of top-1 that it may cost.
    """

    kind: str
    calibration: Source | None = None
    images: int = CALIBRATION_IMAGES
    allowed: float = ALLOWED_DROP


@dataclass(frozen=True)
class QuantizedReport:
    """What quantising a file gave, beside the same file in fp32.

    Attributes:
        kind: `int8`.
        calibration: The images that ranges were taken from, as the user wrote them; None where there were none.
        calibration_images: How many.
        fp32_bytes: The size of the file in fp32.
        judged_on: The images that both files saw, as the user wrote them, or `noise`.
        images: How many.
        agreement: Percent of them with the same most likely class; None for a model without a head.
        fp32_top1: Percent that the file in fp32 has right; None where the classes of the images are not the model's.
        top1: Of the quantised one.
        difference: Points of top-1, quantised less fp32, paired over the images.
        standard_error: Of that; None where there are too few images.
        relative_difference: How far the logits of all images are apart, as a share of those in fp32, by the Euclidean
            norm; None where accuracy was measured.
    """

    kind: str
    calibration: str | None
    calibration_images: int
    fp32_bytes: int
    judged_on: str
    images: int
    agreement: float | None
    fp32_top1: float | None = None
    top1: float | None = None
    difference: float | None = None
    standard_error: float | None = None
    relative_difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        values = {f"quantized_{name}": value for name, value in vars(self).items() if name != "kind"}
        return {"quantize": self.kind, **values}

    def notes(self) -> tuple[str, ...]:
        """What a user should know."""
        if self.top1 is not None:
            return ()
        return (f"no accuracy was measured, so what {self.kind} costs is not known; give `data` with the model's "
                "classes",)  # fmt: skip


def check_quantizing(
    kind: str | None,
    runtime: Runtime | None,
    target: Path,
    *,
    calibration: Any = None,
    images: int | None = None,
    allow_drop: float | None = None,
    observer: Observer | None = None,
) -> Quantizing | None:
    """Refuses what cannot be quantised so, before any work is done for it.

    Args:
        kind: `int8`; None for a file in fp32.
        runtime: The kind of file; None for timm's folder.
        target: The file.
        calibration: As `open_source` takes it.
        images: How many of its images to take; 128 where None.
        allow_drop: Points of top-1 that it may cost; 1 where None.
        observer: Told what takes long.

    Returns:
        How to quantise; None for not at all.

    Raises:
        UsageError: The arguments do not fit together, or the kind of file has no such form.
        TokencutError: A package is missing, or the images cannot be found.
    """
    if kind is None:
        given = {"calibration": calibration, "calibration_limit": images, "allow_drop": allow_drop}
        odd = next((name for name, value in given.items() if value is not None), None)
        if odd is not None:
            raise UsageError(f"`{odd}` is for a quantised file; give `quantize='int8'` as well, or leave it out")
        return None
    if runtime is None or kind not in runtime.quantizes:
        called = "a folder of timm's" if runtime is None else f"a {runtime.suffix} file"
        also = "" if runtime is None or not runtime.quantizes else f", but in {' and '.join(runtime.quantizes)}"
        raise UsageError(f"{called} cannot be had in {kind}{also}; give `path='FILE.onnx'` and `quantize='int8'`, or "
                         "have torch's own weights in eight bits by `tokencut.compress(model, quantize='int8')`"
                         )  # fmt: skip
    if allow_drop is not None:
        check_number("allow_drop", allow_drop)
    if images is not None:
        check_number("images", images)
        if calibration is None:
            raise UsageError("`calibration_limit` says how many images to take of `calibration`; give both")
    if runtime.needs_calibration and calibration is None:
        raise UsageError(f"a {runtime.suffix} file in {kind} has fixed ranges of numbers, taken from images; give "
                         "`calibration='DIR'`, training images of the model")  # fmt: skip
    if runtime.to_quantize:
        extras.require(f"quantising {target} needs", *runtime.to_quantize, extra="quantize")
    source = None if calibration is None else open_source(calibration, split="train", observer=observer)
    return Quantizing(
        kind,
        source,
        CALIBRATION_IMAGES if images is None else images,
        ALLOWED_DROP if allow_drop is None else allow_drop,
    )


class _Batches:
    """Images to take ranges of numbers from, as a file takes them; `count` says afterwards how many there were."""

    def __init__(self, plain: ExportedModel, source: Source, images: int, size: int) -> None:
        found = images_for(plain, source, limit=images)
        self.images = CheckImages(found.prepared, len(found), found)
        self.fixed = plain.info.batch_size
        self.size = self.fixed or size
        self.count = 0

    def __iter__(self) -> Iterator[Tensor]:
        for pixels in self.images.batches(self.size):
            self.count += len(pixels)
            missing = 0 if self.fixed is None else self.fixed - len(pixels)
            filled = torch.cat([pixels, *[pixels[-1:]] * missing])
            yield self.images.prepared.normalise(filled, torch.device("cpu")).contiguous()


def quantized_file(
    graph: Graph, runtime: Runtime, plain: ExportedModel, file: Path, how: Quantizing, *, target: Path,
    data: Source | None, limit: int | None, batch_size: int, fp32_bytes: int, observer: Observer | None,
) -> QuantizedReport:  # fmt: skip
    """Writes a quantised file, runs it and the one in fp32 on the same images, and refuses one that costs too much.

    Args:
        graph: What is written.
        runtime: Its kind of file.
        plain: The file in fp32.
        file: Where to write.
        how: How to quantise.
        target: What was asked for, for messages.
        data: Images to judge by; those of the calibration where None, and noise where there are none either.
        limit: How many of them; 1,000 where None.
        batch_size: Images in a forward.
        fp32_bytes: The size of the file in fp32.
        observer: Told how far it is.

    Raises:
        ArtifactError: It costs more points of top-1 than are allowed.
        DataError: The images cannot be read, or those of `data` do not fit the model's classes.
    """
    batches = None if how.calibration is None else _Batches(plain, how.calibration, how.images, batch_size)
    runtime.quantize(graph, replace(graph.info, quantized=how.kind), plain.path, file, batches)
    quantized = runtime.open(file)
    made = partial(
        QuantizedReport, how.kind, None if how.calibration is None else how.calibration.name,
        0 if batches is None else batches.count, fp32_bytes,
    )  # fmt: skip
    source = data or how.calibration
    if source is not None and class_count(plain):
        found = _by_accuracy(plain, quantized, how, target, source, limit or JUDGED, batch_size, observer,
                             required=data is not None)  # fmt: skip
        if found is not None:
            return made(
                found.first.data, found.images, found.agreement, found.second.top1, found.first.top1,
                found.difference.points, if_known(found.difference.standard_error),
            )  # fmt: skip
    images = check_images(plain, source, limit=limit or JUDGED)
    agreement = compare(plain, quantized, images, batch_size, normalises=False)
    return made(
        agreement.data, agreement.images, agreement.equal_top1, relative_difference=agreement.relative_difference
    )


def _by_accuracy(
    plain: ExportedModel, quantized: ExportedModel, how: Quantizing, target: Path, source: Source, limit: int,
    batch_size: int, observer: Observer | None, *, required: bool,
) -> ComparisonReport | None:  # fmt: skip
    """Top-1 of both; None where the classes of the images are not the model's, unless it is `required`."""
    settings: dict[str, Any] = {"batch_size": batch_size, "device": "cpu", "limit": limit, "observer": observer}
    try:
        before = evaluate(plain, source, name="the file in fp32", **settings)
    except DataError:
        if required:
            raise
        return None
    after = evaluate(quantized, source, name=f"the file in {how.kind}", **settings)
    return quantized_beside(before, after, kind=how.kind, allowed=how.allowed, target=target)
