"""Two classifiers on the same images: how often each is right, how far one is ahead, and how often they agree."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokencut.data.labels import classes_for
from tokencut.data.sources import Source, open_source
from tokencut.errors import DataError, ModelError
from tokencut.evaluation.accuracy import EvaluationReport, evaluate
from tokencut.evaluation.statistics import Difference, if_known, paired_difference
from tokencut.model import predicted_gmacs
from tokencut.models.checkpoints import require_finite
from tokencut.models.pretrained_cfg import require_head
from tokencut.observers import Observer
from tokencut.runtime.compiling import check_form


@dataclass(frozen=True)
class ComparisonReport:
    """What a comparison of two models found.

    Attributes:
        data: The data as the user wrote it.
        images: How many images both models judged.
        first: What an evaluation found of the first model.
        second: Of the second.
        difference: How far the first is ahead in top-1, paired over the images.
        agreement: Percent of the images for which both say the same class, right or wrong.
        both_right: Of so many images both name the right class.
        only_first_right: Of so many the first model alone.
        only_second_right: Of so many the second alone.
        notes: What a user should know.
    """

    data: str
    images: int
    first: EvaluationReport
    second: EvaluationReport
    difference: Difference
    agreement: float
    both_right: int
    only_first_right: int
    only_second_right: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "data": self.data,
            "images": self.images,
            "first": _figures(self.first),
            "second": _figures(self.second),
            "difference": self.difference.points,
            "standard_error": if_known(self.difference.standard_error),
            "clear": self.difference.is_clear,
            "agreement": self.agreement,
            "both_right": self.both_right,
            "only_first_right": self.only_first_right,
            "only_second_right": self.only_second_right,
            "notes": list(self.notes),
        }


def _figures(report: EvaluationReport) -> dict[str, Any]:
    names = ("model", "top1", "top5", "loss", "gmacs", "seconds", "images_per_second")
    return {name: getattr(report, name) for name in names}


def compare(
    first: nn.Module,
    second: nn.Module,
    data: str | os.PathLike[str] | Source,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    compile_mode: str | None = None,
    capture: bool = False,
    limit: int | None = None,
    names: tuple[str | None, str | None] = (None, None),
    gmacs: tuple[float | None, float | None] | None = None,
    observer: Observer | None = None,
) -> ComparisonReport:
    """Judges two classifiers on the same images, each with its own preprocessing, and pairs the results.

    Two models err on much the same images, so a difference taken image by image is known far better than the two
    accuracies themselves.

    Args:
        first: A timm model, or one with the same `pretrained_cfg` and `num_classes`, such as a compressed one.
        second: Another one, of the same classes.
        data: As `evaluate` takes it.
        batch_size: Images a batch.
        workers: Processes that decode images; by default one a processor, 4 at most.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
        compile_mode: Run the models through `torch.compile` in this mode, such as `default`.
        capture: Run the models from CUDA graphs, as `tokencut.capture` does.
        limit: Judge an evenly spread sample of so many images.
        names: What the report calls the models; by default by architecture and tag.
        gmacs: Multiply-adds per image of each, in units of 1e9; by the closed form where None.
        observer: Told after each batch how far the evaluation of the one or the other is.

    Returns:
        The report.

    Raises:
        ModelError: A model has no classification head, cannot be compiled, or gives logits that are not finite.
        DataError: The images cannot be found, do not fit a model's classes, or more than 1 % are unreadable.
        UsageError: Another argument is out of range.

    Example:
        >>> import tokencut
        >>> from tokencut.models.loading import load_model
        >>> digits = load_model("digits").model
        >>> half, dense = tokencut.compress(digits, keep=0.5), digits
        >>> report = tokencut.compare(half, dense, "digits", device="cpu", workers=0)
        >>> report.images, report.first.gmacs < report.second.gmacs
        (600, True)
    """
    check_form(compile_mode, capture)
    for model in (first, second):
        require_head(model)  # before anything is unpacked, and before the other is judged
        require_finite(model)
    source = open_source(data, observer=observer)
    maps = [classes_for(model, source) for model in (first, second)]
    costs = gmacs or (_gmacs(first), _gmacs(second))
    reports = [
        evaluate(
            model, source, batch_size=batch_size, workers=workers, device=device, precision=precision,
            compile_mode=compile_mode, capture=capture, limit=limit, gmacs=macs, name=name, observer=observer,
        )
        for model, macs, name in zip((first, second), costs, names, strict=True)
    ]  # fmt: skip
    # By folder, since the same class may have another number in another model.
    folders = [{target: folder for folder, target in enumerate(one.targets)} for one in maps]
    return paired(reports[0], reports[1], (folders[0], folders[1]))


def paired(
    first: EvaluationReport, second: EvaluationReport, folders: tuple[Mapping[int, int], Mapping[int, int]] = ({}, {})
) -> ComparisonReport:
    """Compares two evaluations on the same images, image by image.

    Args:
        first: What was found of the first model.
        second: Of the second.
        folders: For each model the folder of each of its classes, where their numbers differ.

    Raises:
        DataError: There is no image that both have judged.
    """
    said = [
        {number: (right, folder.get(label, (label,)))
         for number, right, label in zip(report.numbers, report.correct, report.predicted, strict=True)}
        for report, folder in zip((first, second), folders, strict=True)
    ]  # fmt: skip
    common = [number for number in said[0] if number in said[1]]
    if not common:
        raise DataError(f"no image in {first.data!r} could be judged by both models; give other images")
    right = [[one[number][0] for number in common] for one in said]
    same = sum(said[0][number][1] == said[1][number][1] for number in common)
    pairs = list(zip(*right, strict=True))
    return ComparisonReport(
        data=first.data,
        images=len(common),
        first=first,
        second=second,
        difference=paired_difference(*right),
        agreement=100 * same / len(common),
        both_right=pairs.count((True, True)),
        only_first_right=pairs.count((True, False)),
        only_second_right=pairs.count((False, True)),
        notes=tuple(dict.fromkeys((*first.notes, *second.notes))),
    )


def _gmacs(model: nn.Module) -> float | None:
    """Multiply-adds per image by the closed form, in units of 1e9; None for a family that has none."""
    try:
        return predicted_gmacs(model)
    except ModelError:
        return None
