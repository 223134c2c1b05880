"""A classifier's logits for images, batch by batch, as every evaluation goes through them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import Tensor, nn

from tokencut.data.image_set import ImageSet
from tokencut.data.loading import Batch
from tokencut.data.preprocessing import Preprocessing
from tokencut.errors import ModelError
from tokencut.evaluation.levels import in_levels
from tokencut.model import CompressedModel
from tokencut.observers import Observer
from tokencut.runtime.capturing import CapturedModel
from tokencut.runtime.compiling import check_form, compile_model, in_batches
from tokencut.runtime.devices import inference_state, precision_dtype, weights_dtype

# The most likely classes of an image, so many: what top-5 counts, and what is told of a photo.
TOP = 5

Forward = Callable[[Tensor], Tensor]


def logits_of(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int,
    workers: int | None,
    device: torch.device,
    precision: str,
    compile_mode: str | None = None,
    capture: bool = False,
    observer: Observer | None = None,
) -> Generator[tuple[Batch, Tensor | None], None, None]:
    """Runs a classifier on images; it stays as it was.

    Args:
        model: The classifier.
        images: What it sees.
        batch_size: Images a batch.
        workers: Processes that decode; one a processor, 4 at most, where None.
        device: Where it runs.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
        compile_mode: How it is compiled; not at all where None.
        capture: Whether it runs from a CUDA graph.
        observer: Told why nothing can be captured.

    Yields:
        Each batch and its logits `(B, classes)` in fp32; None for them where no image of it could be read.

    Raises:
        ModelError: The model cannot be compiled.
        UsageError: An argument is out of range.
    """
    wanted, loaded = precision_dtype(precision), images.batches(batch_size, workers=workers, device=device)
    check_form(compile_mode, capture)
    size = min(batch_size, len(images))
    made = partial(_forward, compile_mode=compile_mode, capture=capture, size=size, observer=observer)
    leveled = isinstance(model, CompressedModel) and model.recipe.levels is not None
    forward = model if leveled else made(model)
    with inference_state(model, device, wanted), torch.no_grad(), closing(iter(loaded)) as batches:
        dtype = weights_dtype(model)
        if leveled:
            assert isinstance(model, CompressedModel)
            forwards = [made(one) for one in model.at_levels()]
            pixels_of = partial(_pixels, prepared=images.prepared, device=device, dtype=dtype)
            yield from in_levels(batches, model.levels_of, forwards, pixels_of, size)
            return
        for batch in batches:
            yield batch, _logits(forward, batch, images.prepared, device, dtype)


def check_finite(logits: Tensor, precision: str) -> None:
    """Refuses logits that say nothing.

    Raises:
        ModelError: Some are not finite.
    """
    if not logits.isfinite().all():
        raise ModelError(
            f"the model gives logits that are not finite numbers in {precision}; "
            + ("give it other weights" if precision == "fp32" else "type `precision='fp32'`")
        )


def ranked(logits: Tensor, most: int = TOP) -> Tensor:
    """The classes of the highest logits of each image, `(B, most)`, or fewer where there are fewer; the best first."""
    # A stable sort: of equal logits the lower class comes first, alone or in any batch.
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :most]


def over_views(logits: Sequence[Tensor]) -> Tensor:
    """What all views of some images say, `(B, classes)` of each: the mean of their probabilities, as VideoMAE tests.

    Args:
        logits: Of each view, `(B, classes)`; of one alone they stay as they are.
    """
    return logits[0] if len(logits) == 1 else torch.stack(tuple(logits)).softmax(2).mean(0).log()


def _forward(
    model: nn.Module, *, compile_mode: str | None, capture: bool, size: int, observer: Observer | None
) -> Forward:
    """What is called: the model, or what is made for batches of `size`, to which smaller ones are filled up."""
    if compile_mode is None and not capture:
        return model
    made = CapturedModel(model, observer=observer) if capture else compile_model(model, compile_mode or "default")
    return lambda images: in_batches(made, images, size)


def _pixels(batch: Batch, prepared: Preprocessing, device: torch.device, dtype: torch.dtype) -> Tensor:
    return prepared.normalise(batch.images, device, dtype)


def _logits(
    forward: Forward, batch: Batch, prepared: Preprocessing, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    if not len(batch):
        return None
    return over_views([forward(prepared.normalise(view, device, dtype)).float() for view in batch.views()])
