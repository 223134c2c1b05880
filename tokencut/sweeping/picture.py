"""A sweep's pictures: what is left of a few of its images under each method, at the lowest keep rate and at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from tokencut.data.image_files import Photo, check_photos, photo_of
from tokencut.data.image_set import ImageSet
from tokencut.data.sampling import strided_subset
from tokencut.data.videos import Sampling
from tokencut.errors import DataError, UsageError
from tokencut.model import CompressedModel
from tokencut.observers import Observer
from tokencut.recipe import Recipe
from tokencut.sweeping.rows import Keep, keep_text, mean_keep, pair_name
from tokencut.visualization.drawing import Picture, draw
from tokencut.visualization.images import read_clips
from tokencut.visualization.tiles import Tiles, draw_tiles

IMAGES = 3
# A tile has some 15 KB, a page with so many some 2 MB.
MOST_TILES = 100

Key = tuple[str, Keep]


@dataclass(frozen=True)
class SweepPicture:
    """A picture, the names of its images from top to bottom, and the keep rate it was drawn at."""

    picture: Picture
    images: tuple[str, ...]
    keep: str


def tiles_of(
    model: nn.Module, recipes: Mapping[Key, Recipe], images: ImageSet, *, device: torch.device, precision: str
) -> Tiles:
    """Draws evenly spread images of a sweep behind the last stage of every row; so few that a page can hold all.

    Args:
        model: The dense model.
        recipes: What each row does to it.
        images: What the sweep judges on.
        device: Where the model runs.
        precision: What it computes in.
    """
    count = max(1, min(IMAGES, MOST_TILES // len(recipes)))
    models = {pair_name(*key): CompressedModel(model, recipe).eval() for key, recipe in recipes.items()}
    photos = _readable(images, count)
    made = draw_tiles(models, list(photos.values()), device=device, precision=precision,
                      frame_stride=images.source.stride)  # fmt: skip
    return replace(made, names=tuple(photos))


def picture_of(
    model: nn.Module,
    recipes: Mapping[Key, Recipe],
    images: ImageSet,
    *,
    device: torch.device,
    precision: str,
    observer: Observer | None = None,
) -> SweepPicture | None:
    """Draws evenly spread images of a sweep, the methods in rows; the same sweep gives the same picture.

    Args:
        model: The dense model.
        recipes: What each row does to it.
        images: What the sweep judges on.
        device: Where the model runs.
        precision: What it computes in.
        observer: Told why there is no picture.

    Returns:
        The picture, at the keep rate that leaves least, where methods differ most; None where it would be too large.
    """
    lowest = min((keep for _, keep in recipes), key=mean_keep)
    models = {
        label: CompressedModel(model, recipe).eval() for (label, keep), recipe in recipes.items() if keep == lowest
    }
    photos = _readable(images, IMAGES)
    try:
        picture = draw(models, list(photos.values()), device=device, precision=precision,
                       frame_stride=images.source.stride)  # fmt: skip
    except UsageError as error:  # a report without a picture is better than none
        (observer or Observer()).warning(f"the report has no picture of tokens: {error}")
        return None
    return SweepPicture(picture, tuple(photos), keep_text(lowest))


def _readable(images: ImageSet, count: int) -> dict[str, Photo]:
    """Evenly spread images by name; in the place of one that cannot be read stands the next that can."""
    found: dict[str, Photo] = {}
    for position in strided_subset(len(images), count):
        for index in images.indices[position:]:
            name, photo = images.source.filename(index), photo_of(images.source, index)
            if name not in found and _can_be_read(photo, images):
                found[name] = photo
                break
    return found


def _can_be_read(photo: Photo, images: ImageSet) -> bool:
    try:
        if images.prepared.frames is None:
            check_photos([photo])
        else:
            read_clips([photo], Sampling(images.prepared.frames, images.source.stride), images.prepared)
    except DataError:
        return False
    return True
