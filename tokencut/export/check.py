"""Compares what was exported with the model that it came from, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokencut.data.image_set import ImageSet, images_for
from tokencut.data.preprocessing import Preprocessing, preprocessing_of
from tokencut.data.sampling import strided_subset
from tokencut.data.sources import DIGITS, open_source
from tokencut.errors import ArtifactError, DataError, ModelError
from tokencut.model import CompressedModel
from tokencut.models.artifact import origin_of
from tokencut.models.metadata import Origin
from tokencut.models.pretrained_cfg import class_count
from tokencut.observers import Observer

CHECKED = 64
NOISE = "noise"
# Differences in fp32 are some 1e-6 of the largest logit, and 1e-5 behind 24 blocks.
TOLERANCE = 1e-3
# Where two tokens are alike to the last digit, rounding decides which one stays: 0.1 % of images and fewer, which among
# 64 may be one.
NEAR_TIES = 0.01


@dataclass(frozen=True)
class CheckImages:
    """The images to compare on.

    Attributes:
        prepared: The model's preprocessing.
        count: How many there are.
        real: The images; None for noise.
        notes: What a user should know.
    """

    prepared: Preprocessing
    count: int
    real: ImageSet | None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The source as the user wrote it, or `noise`."""
        return self.real.name if self.real else NOISE

    def batches(self, size: int) -> Iterator[Tensor]:
        """The images in batches of `size`, bytes `(B, C, H, W)`.

        Raises:
            DataError: None of them could be decoded.
        """
        if self.real is None:
            shape = (self.count, *self.prepared.input_shape)
            noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
            yield from noise.split(size)
            return
        for batch in self.real.decoded(size, workers=0, otherwise="leave out `data` to check on noise"):
            if len(batch):
                yield batch.views()[0]


def check_images(
    model: nn.Module, data: Any, *, limit: int | None = None, observer: Observer | None = None
) -> CheckImages:
    """Chooses the images to compare on.

    Args:
        model: Dense or compressed.
        data: As `open_source` takes it; where None the digits for the bundled model, or noise.
        limit: How many, evenly spread; 64 where None.
        observer: Told what takes long.

    Raises:
        DataError: The images cannot be found.
        UsageError: The limit is less than 1.
    """
    count = CHECKED if limit is None else limit
    why = "no `data` was given"
    if data is None and _is_digits(model):
        try:
            data = open_source(DIGITS)
        except DataError as error:  # scikit-learn is not installed
            why = str(error)
    if data is not None:
        real = images_for(model, open_source(data, observer=observer), limit=count)
        return CheckImages(real.prepared, len(real), real)
    noise = len(strided_subset(count, count))
    return CheckImages(preprocessing_of(model), noise, None, (f"checked on {count} images of noise, since {why}",))


def _is_digits(model: nn.Module) -> bool:
    origin: Origin = origin_of(model.model if isinstance(model, CompressedModel) else model)
    return (origin.kind, origin.name) == ("bundled", DIGITS)


@dataclass(frozen=True)
class Agreement:
    """How a file compares with its model.

    Attributes:
        data: The images as the user wrote them, or `noise`.
        images: How many there were.
        largest_difference: Between any two logits.
        tolerance: The largest that rounding explains.
        differing: Images with a larger one.
        allowed: How many of those near-ties between tokens explain.
        equal_top1: Percent of the images with the same most likely class; None for a model without a head.
        relative_difference: How far all logits are apart, as a share of the model's, by the Euclidean norm.
    """

    data: str
    images: int
    largest_difference: float
    tolerance: float
    differing: int
    allowed: int
    equal_top1: float | None
    relative_difference: float

    def to_dict(self) -> dict[str, Any]:
        """The comparison for JSON."""
        return asdict(self)

    def require(self, target: Path) -> None:
        """Refuses a file that does not give the model's logits.

        Raises:
            ArtifactError: More images differ than near-ties explain.
        """
        if self.differing > self.allowed:
            raise ArtifactError(
                f"{target} would not give the model's logits: {self.differing} of {self.images} images differ by more "
                f"than {self.tolerance:.1e}, at most by {self.largest_difference:.1e}; nothing was written, please "
                "report the model's name and options"
            )

    def notes(self) -> tuple[str, ...]:
        """What a user should know."""
        if not self.differing:
            return ()
        return (
            f"{self.differing} of {self.images} images differ{'s' if self.differing == 1 else ''} by more than "
            f"{self.tolerance:.1e}, at most by {self.largest_difference:.1e}: two tokens were alike, and rounding "
            "decided between them",
        )


def compare(
    model: nn.Module,
    exported: Callable[[Tensor], Tensor],
    images: CheckImages,
    size: int,
    *,
    normalises: bool,
    any_number: bool = False,
) -> Agreement:
    """Runs a model and what was exported on the same images.

    OpenVINO 2026.4 did to the first `N` images alone what it should do to all of a batch, where a stage has `N` tokens.
    So where there are more images than some stage has tokens, what was exported has to give the same once more on all
    at once.

    Args:
        model: In eval mode, on the CPU.
        exported: From images to logits.
        images: The images.
        size: Images a batch.
        normalises: Whether `exported` takes RGB from 0 to 1.
        any_number: Whether it takes any number of images.

    Raises:
        ModelError: The model gives logits that are not finite.
        DataError: None of the images could be decoded.
    """
    taken, expected, found = [], [], []
    for pixels in images.batches(size):
        ready = images.prepared.normalise(pixels, torch.device("cpu"))
        expected.append(model(ready))
        taken.append(pixels / 255 if normalises else ready)
        found.append(exported(taken[-1]))
    wanted, given = torch.cat(expected), torch.cat(found)
    if not wanted.isfinite().all():
        raise ModelError("the model gives logits that are not finite numbers, so no file of it can be checked; "
                         "check its weights with tokencut info FILE")  # fmt: skip
    count = wanted.shape[0]
    differences = (wanted - given).abs().reshape(count, -1).amax(1)
    stages = model.recipe.stages if isinstance(model, CompressedModel) else ()
    if any_number and any(size < count and stage.tokens_in < count for stage in stages):
        again = (wanted - exported(torch.cat(taken))).abs().reshape(count, -1).amax(1)
        differences = torch.maximum(differences, again)  # which keeps NaN
    tolerance = TOLERANCE * max(1.0, float(wanted.abs().max()))
    reduces = bool(stages)
    headless = not class_count(model)
    return Agreement(
        data=images.name,
        images=count,
        largest_difference=float(differences.max()),
        tolerance=tolerance,
        differing=int((~(differences <= tolerance)).sum()),  # NaN is no agreement
        allowed=math.ceil(NEAR_TIES * count) if reduces else 0,
        equal_top1=None if headless else 100 * float((wanted.argmax(1) == given.argmax(1)).float().mean()),
        relative_difference=float((wanted - given).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny)),
    )
