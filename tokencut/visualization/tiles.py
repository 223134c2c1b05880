"""What several models leave of a few images, as single small pictures, for a page that arranges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tokencut.data.image_files import PhotoLike
from tokencut.model import CompressedModel
from tokencut.runtime.devices import resolve_device
from tokencut.visualization.drawing import shared_preprocessing
from tokencut.visualization.grid import Panel
from tokencut.visualization.images import read_images, short_names
from tokencut.visualization.legend import legend_of
from tokencut.visualization.regions import Pixels, draw_tokens
from tokencut.visualization.stage_views import trace_images

# The longer side of a tile, and the height of a sample in the legend, in px; patches have at least some of them.
SIDE, SAMPLE, SMALLEST_PATCH = 288, 40, 6


@dataclass(frozen=True)
class Tile:
    """What a model's last stage left of an image: `(H, W, 3)`, and the tokens that entered the model and left it."""

    pixels: Pixels
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Tiles:
    """Small pictures of some images.

    Attributes:
        names: What the images are called.
        photos: The images, `(H, W, 3)` each.
        models: For each model its tile of each image.
        legend: Samples of what is in the tiles, and what they mean.
    """

    names: tuple[str, ...]
    photos: tuple[Pixels, ...]
    models: Mapping[str, tuple[Tile, ...]]
    legend: tuple[Panel, ...]


def draw_tiles(
    models: Mapping[str, CompressedModel],
    images: Sequence[PhotoLike],
    *,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    frame_stride: int = 4,
) -> Tiles:
    """Draws what is left of images behind the last stage of each model.

    Args:
        models: Models that take the same images, by name; of one that reduces nothing the tile is the photo.
        images: Paths, photos, or the word `digits`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
        frame_stride: Of videos, the frames from one of a clip to the next.

    Raises:
        TokencutError: An image cannot be read, or the models take different images.
    """
    prepared = shared_preprocessing(models)
    shown = read_images(images, prepared, frame_stride)
    target = resolve_device(device)
    traced = {
        name: trace_images(model, shown.pixels, prepared, target, precision, len(shown.names), attention=False)
        for name, model in models.items()
    }
    grid = next(iter(traced.values())).grid
    scaled = grid.scaled(max(SMALLEST_PATCH, SIDE // max(grid.rows, grid.columns)))
    photos = tuple(shown.seen(image, grid, scaled) for image in range(len(shown.names)))
    made: dict[str, tuple[Tile, ...]] = {}
    for name, one in traced.items():
        if not one.stages:
            made[name] = tuple(Tile(photo, grid.patches, grid.patches) for photo in photos)
            continue
        last = one.stages[-1]
        drawn = (draw_tokens(photo, last.source[image], scaled) for image, photo in enumerate(photos))
        made[name] = tuple(Tile(pixels, grid.patches, last.tokens_out) for pixels in drawn)
    ends = [one.last_stage_only() for one in traced.values()]
    return Tiles(tuple(short_names(shown.names)), photos, made, tuple(legend_of(ends, scaled, SAMPLE)))
