"""What each stage of a model did to each of some images: which patches went where, and where attention lay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokencut.data.labels import names_for_people
from tokencut.data.preprocessing import Preprocessing
from tokencut.evaluation.forwards import check_finite
from tokencut.evaluation.prediction import Guess, guesses
from tokencut.limits import check_number
from tokencut.model import CompressedModel
from tokencut.models.pretrained_cfg import class_count
from tokencut.runtime.devices import inference_state, precision_dtype
from tokencut.tracing import Trace
from tokencut.visualization.regions import Grid, Tokens, patches_held


@dataclass(frozen=True)
class StageView:
    """What a stage did to one image.

    Attributes:
        block: Its 1-based block.
        tokens_in: Image tokens entering.
        tokens_out: Image tokens leaving.
        merged: How many of those hold more than one patch.
        dropped: Patches of the image that are in no token any more.
    """

    block: int
    tokens_in: int
    tokens_out: int
    merged: int
    dropped: int


@dataclass(frozen=True)
class DrawnStage:
    """A stage on all images: `source` and, where asked for, the attention on patches, `(B, patches)`."""

    block: int
    tokens_in: int
    tokens_out: int
    source: Tokens
    heat: NDArray[np.float64] | None

    def view(self, image: int) -> StageView:
        """What it did to the image of this number, from 0 on."""
        source = self.source[image]
        merged = len(np.unique(source[patches_held(source) > 1]))
        return StageView(self.block, self.tokens_in, self.tokens_out, merged, int((source < 0).sum()))


@dataclass(frozen=True)
class DrawnModel:
    """What one model did to all images, and what it took each for; nothing where it has no head."""

    grid: Grid
    stages: tuple[DrawnStage, ...]
    predicted: tuple[Guess, ...] = ()

    def last_stage_only(self) -> DrawnModel:
        """The same, as if only its last stage, if any, were drawn."""
        return replace(self, stages=self.stages[-1:])


def trace_images(
    model: CompressedModel,
    pixels: Tensor,
    prepared: Preprocessing,
    device: torch.device,
    precision: str,
    batch_size: int,
    attention: bool,
) -> DrawnModel:
    """Runs a model on images, and notes what its stages do; the model stays as it was.

    Args:
        model: The model.
        pixels: Bytes `(B, C, H, W)` or, of clips, `(B, C, frames, H, W)`, as its preprocessing leaves them.
        prepared: Its preprocessing.
        device: Where it runs.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
        batch_size: Images a forward.
        attention: Whether to note the class attention on the tokens that enter each stage.

    Raises:
        UsageError: The batch size or the precision is out of range.
        ModelError: The model gives logits that are not finite.
    """
    check_number("batch_size", batch_size)
    *frames, rows, columns = model.adapter.grid_of(model.model, pixels)
    tubelets = frames[0] if frames else 1
    grid = Grid(rows, tubelets * columns, *model.adapter.patch_size(model.model), frames=tubelets)
    names = names_for_people(model)[0] if class_count(model) else ()
    parts, predicted = list[list[DrawnStage]](), list[Guess]()
    with inference_state(model, device, precision_dtype(precision)), torch.no_grad():
        dtype = next(model.parameters()).dtype
        for batch in pixels.split(batch_size):
            logits, traces = model.trace(prepared.normalise(batch, device, dtype), source=True, attention=attention)
            check_finite(logits, precision)
            if names:
                predicted += (best for (best,) in guesses(logits.float(), names))
            parts.append(_stages(traces[:-1], grid))  # the last is no stage, but the end
    return DrawnModel(grid, tuple(_joined(stage) for stage in zip(*parts, strict=True)), tuple(predicted))


def _stages(traces: Sequence[Trace], grid: Grid) -> list[DrawnStage]:
    """The stages of a batch."""
    made: list[DrawnStage] = []
    first = side_by_side(np.arange(grid.patches)[None], grid)
    for trace in traces:
        assert trace.tokens.source is not None
        source = side_by_side(trace.tokens.source.cpu().numpy(), grid)
        before = made[-1].source if made else np.broadcast_to(first, source.shape)
        entering = made[-1].tokens_out if made else grid.patches
        heat = None if trace.attention is None else _on_patches(trace.attention.float().cpu().numpy(), before)
        made.append(DrawnStage(trace.block, entering, trace.tokens.runs, source, heat))
    return made


def side_by_side(values: Tokens, grid: Grid) -> Tokens:
    """Values of patches `(B, patches)`, frame by frame, in the order of a picture that has the frames side by side."""
    batch, frames = len(values), grid.frames
    return values.reshape(batch, frames, grid.rows, -1).transpose(0, 2, 1, 3).reshape(batch, -1)


def _on_patches(attention: NDArray[np.floating], source: Tokens) -> NDArray[np.float64]:
    """The attention on each token `(B, N)`, spread evenly over its patches: `(B, patches)`, 0 where there is none."""
    held = np.stack([patches_held(row) for row in source])
    # The difference of two maps (differential attention) can be negative.
    found = np.take_along_axis(attention, source.clip(min=0), 1).clip(min=0)
    return np.where(source >= 0, found / held.clip(min=1), 0.0)


def _joined(parts: Sequence[DrawnStage]) -> DrawnStage:
    """One stage on all images, of its batches."""
    first = parts[0]
    heat = None if first.heat is None else np.concatenate([part.heat for part in parts if part.heat is not None])
    source = np.concatenate([part.source for part in parts])
    return DrawnStage(first.block, first.tokens_in, first.tokens_out, source, heat)
