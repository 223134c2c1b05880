"""Tubelets of a clip that hardly differ from the one before: run-length tokenisation (arXiv 2411.05222) to a count."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencut.ops.exporting import not_earlier, numbers, pick, running
from tokencut.ops.grouping import Grouping
from tokencut.ops.ranking import are_highest


def changes(clips: Tensor, tubelet: tuple[int, int, int]) -> Tensor:
    """How much each tubelet differs from the one before it at the same place: the mean absolute difference of pixels.

    Args:
        clips: As the model takes them, `(B, C, frames, H, W)`.
        tubelet: Frames, rows and columns of a tubelet in px; what fills none is left out.

    Returns:
        fp32 `(B, N)`, by frames, rows and columns. The first frames have more than any other, since before them there
        is nothing.
    """
    steps, rows, columns = (size // part for size, part in zip(clips.shape[2:], tubelet, strict=True))
    frames, height, width = tubelet
    whole = clips[:, :, : steps * frames, : rows * height, : columns * width].float()
    differ = (whole[:, :, frames:] - whole[:, :, :-frames]).abs()
    differ = differ.reshape(-1, clips.shape[1], steps - 1, frames, rows, height, columns, width).mean((1, 3, 5, 7))
    first = 2.0 * differ.amax((1, 2, 3), keepdim=True).expand(-1, 1, rows, columns) + 1.0
    return torch.cat((first, differ), 1).flatten(1)


def without_static(changed: Tensor, places: int, count: int) -> Grouping:
    """Lets each of the tubelets that change least go into the last one before it, at the same place, that stays.

    What goes leaves that token as it is, and adds to how many tubelets it holds.

    Args:
        changed: As `changes` gives it, fp32 `(B, N)`.
        places: Tubelets of a frame.
        count: `M`, how many stay, at least `places`: all of the first frames do.

    Returns:
        The decision; of equal changes the earlier ones stay.
    """
    stays = are_highest(changed, count)
    steps = changed.shape[1] // places
    every = numbers(changed, steps)
    # The number of the last step up to each that stays, for each place.
    stayed = torch.where(stays.unflatten(1, (steps, places)), every.view(1, steps, 1) + 1, 0)
    last = (stayed.unsqueeze(1) * not_earlier(changed, steps).transpose(0, 1).reshape(1, steps, steps, 1)).amax(2) - 1
    token = last * places + numbers(changed, places).view(1, 1, places)
    group = pick(running(stays) - 1, token.flatten(1))
    return Grouping(group, stays.to(torch.float32), count, ordered=True)
