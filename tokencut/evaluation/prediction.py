"""What a classifier takes photos for: the most likely classes of each, by name, with their probabilities."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokencut.data.image_files import Photo, PhotoLike, PhotoSource
from tokencut.data.image_set import images_for
from tokencut.data.labels import names_for_people
from tokencut.data.loading import Unreadable
from tokencut.data.sources import read_class_map
from tokencut.errors import DataError, UsageError
from tokencut.evaluation.forwards import TOP, check_finite, logits_of, ranked
from tokencut.evaluation.tables import check_csv, write_csv
from tokencut.limits import check_number
from tokencut.messages import listed
from tokencut.models.checkpoints import require_finite
from tokencut.models.pretrained_cfg import name_of
from tokencut.observers import Observer
from tokencut.runtime.compiling import check_form
from tokencut.runtime.devices import precision_dtype, resolve_device


@dataclass(frozen=True)
class Guess:
    """A class that an image may be of: its name, its number in the model's head, and its probability, from 0 to 1."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What an image was taken for, the most likely first."""

    image: str
    top: tuple[Guess, ...]


@dataclass(frozen=True)
class PredictionReport:
    """What a model took images for.

    Attributes:
        model: The model's name.
        predictions: One of each image that could be decoded, in the order given.
        unreadable: The images that could not be decoded.
        seconds: Wall-clock time, loading included.
        notes: What a user should know: what classes are called by, what was passed over.
    """

    model: str
    predictions: tuple[Prediction, ...]
    unreadable: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {"model": self.model, "images": len(self.predictions), **asdict(self)}

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Writes a table: `path`, then `top1`, `probability1`, `top2` and so on.

        Args:
            path: The file, `*.csv`.
            force: Whether a file of that name may be replaced.

        Raises:
            UsageError: Its name does not end in .csv.
            ArtifactError: It could not be written, or exists and `force` is off.
        """
        check_csv(path, force=force, parameter="path")
        width = max((len(prediction.top) for prediction in self.predictions), default=0)
        head = ["path", *(f"{name}{rank}" for rank in range(1, width + 1) for name in ("top", "probability"))]
        rows = ([one.image, *(cell for guess in one.top for cell in (guess.label, f"{guess.probability:.6g}"))]
                for one in self.predictions)  # fmt: skip
        write_csv(path, [head, *rows], force=force)


def guesses(logits: Tensor, names: Sequence[str], top: int = 1) -> list[tuple[Guess, ...]]:
    """The most likely classes of each image.

    Args:
        logits: `(B, classes)`.
        names: What the classes are called.
        top: How many to tell; all where there are fewer.
    """
    best = ranked(logits, top)
    likely = logits.softmax(dim=1).gather(1, best)
    return [
        tuple(Guess(names[index], index, share) for index, share in zip(*of_image, strict=True))
        for of_image in zip(best.tolist(), likely.tolist(), strict=True)
    ]


def _several(images: PhotoLike | Sequence[PhotoLike]) -> Sequence[PhotoLike]:
    several = [images] if isinstance(images, (str, os.PathLike, Photo)) else list(images)
    if not several:
        raise UsageError("no image given; name one, such as photo.jpg, a folder of them, or the word digits")
    return several


def predict(
    model: nn.Module,
    images: PhotoLike | Sequence[PhotoLike] | PhotoSource,
    *,
    top: int = TOP,
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    compile_mode: str | None = None,
    capture: bool = False,
    class_map: str | os.PathLike[str] | None = None,
    name: str | None = None,
    observer: Observer | None = None,
) -> PredictionReport:
    """Tells what a classifier takes photos for, with its own preprocessing; the model stays as it was.

    Photos are turned upright, as their EXIF says, which sets of images are not (see `evaluate`).

    Args:
        model: A timm model, or one with the same `pretrained_cfg` and `num_classes`, such as a compressed one.
        images: Files, folders (whose images are meant, at any depth), the word `digits`; one or several.
        top: How many classes to tell of each image; all where the model has fewer.
        batch_size: Images a batch.
        workers: Processes that decode images; by default one a processor, 4 at most.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
        compile_mode: Run the model through `torch.compile` in this mode, such as `default`.
        capture: Run the model from a CUDA graph, as `tokencut.capture` does.
        class_map: A text file with the names of the classes, one in each line, in the model's order.
        name: What the report calls the model; by default its architecture and tag.
        observer: Told after each batch how many images are done, of how many.

    Returns:
        The report.

    Raises:
        ModelError: The model has no classification head, cannot be compiled, or gives logits that are not finite.
        DataError: A file does not exist, a folder holds no images, or none of all images can be decoded.
        UsageError: Another argument is out of range.

    Example:
        >>> import tokencut
        >>> from tokencut.models.loading import load_model
        >>> model = tokencut.compress(load_model("digits").model, keep=0.6)
        >>> report = tokencut.predict(model, "digits", device="cpu", workers=0)
        >>> [prediction.top[0].label for prediction in report.predictions]
        ['7', '9', '5', '8']
    """
    check_number("top", top)
    target_device = resolve_device(device)
    precision_dtype(precision)
    check_form(compile_mode, capture)
    names, assumed = names_for_people(model, read_class_map(class_map) if class_map else ())
    require_finite(model)
    photos = images_for(model, images if isinstance(images, PhotoSource) else PhotoSource(_several(images)))
    found: list[Prediction] = []
    unreadable: list[Unreadable] = []
    told, called = observer or Observer(), name or name_of(model)
    started = time.perf_counter()
    batches = logits_of(model, photos, batch_size=batch_size, workers=workers, device=target_device,
                        precision=precision, compile_mode=compile_mode, capture=capture,
                        observer=observer)  # fmt: skip
    with closing(batches):
        for batch, logits in batches:
            unreadable += batch.unreadable
            if logits is not None:
                check_finite(logits, precision)
                of_images = zip(batch.indices.tolist(), guesses(logits, names, top), strict=True)
                found += (Prediction(photos.source.filename(number), best) for number, best in of_images)
            told.progress(f"predicting by {called}", len(found) + len(unreadable), len(photos), {})
    if not found:
        raise DataError(f"no image can be decoded: {listed([photos.told(image) for image in unreadable])}; give others")
    return PredictionReport(
        model=called,
        predictions=tuple(found),
        unreadable=tuple(photos.filenames(unreadable)),
        seconds=time.perf_counter() - started,
        notes=(*photos.notes(unreadable), *assumed),
    )
