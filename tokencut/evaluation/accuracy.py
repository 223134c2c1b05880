"""How often a model is right: top-1, top-5 and loss over the images of a source."""

from __future__ import annotations

import math
import os
import time
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencut.adapters import plain_model
from tokencut.data.image_set import ImageSet, open_images
from tokencut.data.loading import Batch, Unreadable
from tokencut.data.sources import Source
from tokencut.evaluation.forwards import TOP, check_finite, logits_of, ranked
from tokencut.evaluation.tables import check_csv, write_csv
from tokencut.models.pretrained_cfg import name_of
from tokencut.observers import Observer
from tokencut.runtime.compiling import check_form
from tokencut.runtime.devices import precision_dtype, resolve_device


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        model: The model's name.
        data: The data as the user wrote it.
        images: How many images were decoded and judged.
        top1: Percent of them whose class has the highest logit.
        top5: Percent of them whose class is among the 5 highest (or among all, if there are fewer).
        loss: Mean cross-entropy, in nats.
        gmacs: Multiply-adds per image, in units of 1e9, if the caller knows them.
        seconds: Wall-clock time, loading included.
        images_per_second: Images decoded and judged per second of that.
        unreadable: The images that could not be decoded.
        notes: What a user should know: how classes were matched, what was passed over.
        correct: For each judged image, in natural order, whether top-1 is right: for differences image by image.
        numbers: The number of each of these images in the source.
        predicted: The class that the model takes each for, by its number in the model.
    """

    model: str
    data: str
    images: int
    top1: float
    top5: float
    loss: float
    gmacs: float | None
    seconds: float
    images_per_second: float
    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    correct: tuple[bool, ...] = field(default=(), repr=False, compare=False)
    numbers: tuple[int, ...] = field(default=(), repr=False, compare=False)
    predicted: tuple[int, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, without the image-by-image results."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.repr}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def evaluate(
    model: nn.Module,
    data: str | os.PathLike[str] | Source,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    compile_mode: str | None = None,
    capture: bool = False,
    limit: int | None = None,
    of: int | None = None,
    predictions: str | os.PathLike[str] | None = None,
    force: bool = False,
    gmacs: float | None = None,
    name: str | None = None,
    observer: Observer | None = None,
) -> EvaluationReport:
    """Measures a classifier's accuracy, with its own preprocessing, as timm would; the model stays as it was.

    Args:
        model: A timm model, or one with the same `pretrained_cfg` and `num_classes`, such as a compressed one.
        data: As `open_source` takes it: an image folder, an archive of one, a list, the word `digits`, or a source.
        batch_size: Images a batch.
        workers: Processes that decode images; by default one a processor, 4 at most.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
        compile_mode: Run the model through `torch.compile` in this mode, such as `default`.
        capture: Run the model from a CUDA graph, as `tokencut.capture` does.
        limit: Judge an evenly spread sample of so many images.
        of: How many images there are in all, where these are a part: 1 % of them may be unreadable.
        predictions: A CSV file to write: path, label and the 5 most likely classes of each image.
        force: Whether a file of that name may be replaced.
        gmacs: Multiply-adds per image to put into the report, in units of 1e9.
        name: What the report calls the model; by default its architecture and tag.
        observer: Told after each batch how far it is.

    Returns:
        The report.

    Raises:
        ModelError: The model has no classification head, cannot be compiled, or gives logits that are not finite.
        DataError: The images cannot be found, do not fit the model's classes, or more than 1 % are unreadable.
        ArtifactError: The predictions could not be written, or there are some and `force` is off.
        UsageError: Another argument is out of range.

    Example:
        >>> import tokencut
        >>> from tokencut.models.loading import load_model
        >>> digits = load_model("digits").model
        >>> report = tokencut.evaluate(tokencut.compress(digits, keep=0.6), "digits", device="cpu", workers=0)
        >>> report.images, report.top1 > 90
        (600, True)
    """
    target_device = resolve_device(device)
    precision_dtype(precision)
    check_form(compile_mode, capture)
    if predictions is not None:
        check_csv(predictions, force=force)
    if not hasattr(model, "_orig_mod"):  # what was compiled is judged as it runs
        model = plain_model(model)
    images = open_images(model, data, limit=limit, observer=observer)
    tally, told, called = MetricAccumulator(images, precision, of), observer or Observer(), name or name_of(model)
    batches = logits_of(model, images, batch_size=batch_size, workers=workers, device=target_device,
                        precision=precision, compile_mode=compile_mode, capture=capture,
                        observer=observer)  # fmt: skip
    with closing(batches):
        for batch, logits in batches:
            tally.add(batch, logits)
            told.progress(f"evaluating {called}", tally.done, len(images), tally.values)
    if predictions is not None:
        _write_predictions(predictions, tally, force=force)
    return tally.report(called, gmacs)


class MetricAccumulator:
    """What is known so far of each image."""

    def __init__(self, images: ImageSet, precision: str, of: int | None = None) -> None:
        self.images = images
        self.of = of
        self.precision = precision
        self.unreadable: list[Unreadable] = []
        self.lying: list[int] = []
        self.short: list[int] = []
        self.indices: list[int] = []
        self.targets: list[int] = []
        self.ranked: list[list[int]] = []
        self.losses: list[float] = []
        self.right = 0
        self.started = time.perf_counter()

    def add(self, batch: Batch, logits: Tensor | None) -> None:
        """Counts a batch; the logits are `(B, classes)`, or None where no image of it could be read."""
        self.unreadable += batch.unreadable
        self.lying += batch.lying
        self.short += batch.short
        self.images.check_unreadable(self.unreadable, self.of)
        if logits is None:
            return
        check_finite(logits, self.precision)
        losses = F.cross_entropy(logits, batch.targets.to(logits.device), reduction="none")
        best = ranked(logits).tolist()
        self.indices += batch.indices.tolist()
        self.targets += batch.targets.tolist()
        self.ranked += best
        self.losses += losses.tolist()
        self.right += sum(first == target for (first, *_), target in zip(best, batch.targets.tolist(), strict=True))

    @property
    def done(self) -> int:
        """Images seen so far, the unreadable ones among them."""
        return len(self.targets) + len(self.unreadable)

    @property
    def values(self) -> dict[str, float]:
        """How it stands: percent right, and images decoded and judged in a second, both on average so far."""
        judged = len(self.targets)
        rate = judged / (time.perf_counter() - self.started)
        return {"top1": 100 * self.right / max(judged, 1), "images_per_second": rate}

    def report(self, model: str, gmacs: float | None) -> EvaluationReport:
        seconds = time.perf_counter() - self.started
        images = len(self.targets)
        among_top = sum(target in ranked for ranked, target in zip(self.ranked, self.targets, strict=True))
        return EvaluationReport(
            model=model,
            data=self.images.name,
            images=images,
            top1=100 * self.right / images,
            top5=100 * among_top / images,
            loss=math.fsum(self.losses) / images,
            gmacs=gmacs,
            seconds=seconds,
            images_per_second=images / seconds,
            unreadable=tuple(self.images.filenames(self.unreadable)),
            notes=self.images.notes(self.unreadable, self.lying, self.short),
            correct=tuple(ranked[0] == target for ranked, target in zip(self.ranked, self.targets, strict=True)),
            numbers=tuple(self.indices),
            predicted=tuple(best for best, *_ in self.ranked),
        )


def _write_predictions(path: str | os.PathLike[str], tally: MetricAccumulator, *, force: bool) -> None:
    """Writes a row for each judged image, classes by name, the most likely first."""
    source, class_map = tally.images.source, tally.images.class_map
    assert class_map is not None
    width = min(TOP, len(class_map.class_names))
    rows = [["path", "label", *(f"top{rank}" for rank in range(1, width + 1))]]
    for index, target, best in zip(tally.indices, tally.targets, tally.ranked, strict=True):
        rows.append([source.filename(index), *(class_map.class_names[number] for number in (target, *best))])
    write_csv(path, rows, force=force)
