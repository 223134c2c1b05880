"""The images of a picture of tokens: as models take them, and as they are drawn, with the detail that photos have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokencut.data.image_files import Photo, PhotoLike, find_photos, read_all, read_photos
from tokencut.data.preprocessing import Preprocessing
from tokencut.data.videos import Sampling, decode_clips, require_decoder
from tokencut.errors import UsageError
from tokencut.messages import listed
from tokencut.visualization.regions import Grid, Pixels


@dataclass(frozen=True)
class DrawnImages:
    """Images as models take them, and as they are drawn.

    Attributes:
        names: What their rows are called.
        pixels: Bytes `(B, C, H, W)`; of clips `(B, C, frames, H, W)`, drawn as the first frames of tubelets in a row.
        detail: How many pixels of each photo a pixel of `pixels` is across; 1 where there is no photo.
        photos: Where they come from; empty where they are given as bytes.
        prepared: The models' preprocessing.
    """

    names: Sequence[str]
    pixels: Tensor
    detail: Sequence[float]
    photos: Sequence[Photo]
    prepared: Preprocessing

    def whole_size(self, grid: Grid, scaled: Grid) -> tuple[int, int]:
        """Height and width in px of a whole image, of which `grid` has the patches, where they are as in `scaled`."""
        height, width = self.pixels.shape[-2:] if self.pixels.ndim == 4 else (
            grid.rows * grid.height, grid.columns * grid.width)  # fmt: skip
        return round(height * scaled.height / grid.height), round(width * scaled.width / grid.width)

    def seen_size(self, grid: Grid, scaled: Grid) -> tuple[int, int]:
        """The same of the part that lies in patches."""
        height, width = self.whole_size(grid, scaled)
        return min(height, scaled.rows * scaled.height), min(width, scaled.columns * scaled.width)

    def seen(self, image: int, grid: Grid, scaled: Grid) -> Pixels:
        """What models see of an image, as large as in `scaled`, `(H, W, 3)`: with the photo's detail if it has more."""
        height, width = self.whole_size(grid, scaled)
        if self.detail[image] <= 1:
            small = Image.fromarray(_in_colour(self._in_a_row(image, grid)))
            return scaled.seen(np.asarray(small.resize((width, height), Image.Resampling.NEAREST)))
        transform = self.prepared.at_size(height, width).transform()
        [made] = read_photos([self.photos[image]], self.prepared.mode, lambda photo: _as_bytes(transform(photo)))
        return scaled.seen(_in_colour(made))

    def _in_a_row(self, image: int, grid: Grid) -> Tensor:
        """An image `(C, H, W)`; of a clip the first frame of each tubelet, cut to its patches, one beside the other."""
        pixels = self.pixels[image]
        if pixels.ndim == 3:
            return pixels
        shown = pixels[:, :: pixels.shape[1] // grid.frames][:, : grid.frames]
        shown = shown[..., : grid.rows * grid.height, : grid.columns // grid.frames * grid.width]
        return shown.transpose(1, 2).flatten(2)


def read_images(
    images: PhotoLike | Sequence[PhotoLike] | Tensor, prepared: Preprocessing, frame_stride: int = 4
) -> DrawnImages:
    """Reads images to be drawn, once; those from files are opened again when they are drawn.

    Args:
        images: Paths, photos, the word `digits`, or bytes `(B, C, H, W)` as the preprocessing leaves them; of clips
            `(B, C, frames, H, W)`.
        prepared: The preprocessing of the models that they are drawn with.
        frame_stride: Of videos, the frames from one of a clip to the next.

    Raises:
        TokencutError: There is none, or some cannot be read.
    """
    if isinstance(images, Tensor):
        dimensions, form = (4, "images is of bytes (B, C, H, W)") if prepared.frames is None else (
            5, "clips is of bytes (B, C, frames, H, W)")  # fmt: skip
        if images.dtype != torch.uint8 or images.ndim != dimensions:
            raise UsageError(f"a tensor of {form}, not {images.dtype} of {images.ndim} dimensions; give the files' "
                             "paths instead, or images.to(torch.uint8)")  # fmt: skip
        photos, made = [], [(image, 1.0) for image in images]
        names = list(map(str, range(len(images))))
    else:
        several = [images] if isinstance(images, (str, os.PathLike, Photo)) else images
        photos, transform = find_photos(several), prepared.transform()
        names = [photo.name for photo in photos]
        if prepared.frames is not None:
            clips = read_clips(photos, Sampling(prepared.frames, frame_stride), prepared)
            return DrawnImages(names, clips, [1.0] * len(names), (), prepared)
        kept = prepared.config["crop_pct"] / min(prepared.config["input_size"][1:])
        made = read_photos(
            photos, prepared.mode, lambda photo: (_as_bytes(transform(photo)), min(photo.size) * kept)
        )  # fmt: skip
    if not made:
        raise UsageError("no image given to draw; name one, such as photo.jpg, or the word digits")
    pixels, detail = zip(*made, strict=True)
    return DrawnImages(names, torch.stack(pixels), detail, photos, prepared)


def read_clips(photos: Sequence[Photo], sampling: Sampling, prepared: Preprocessing) -> Tensor:
    """The first view of some videos, bytes `(B, C, frames, H, W)`.

    Raises:
        TokencutError: One cannot be read, or nothing is installed that could.
    """
    transform = prepared.transform()

    def read(video: Photo) -> Tensor:
        with video.opened() as file:
            return decode_clips(file, sampling, transform, prepared.mode)[0][0]

    require_decoder(listed([video.name for video in photos]))
    return torch.stack(read_all(photos, read))


def _as_bytes(image: Tensor | NDArray[np.uint8]) -> Tensor:
    return torch.as_tensor(np.asarray(image))


def _in_colour(pixels: Tensor) -> Pixels:
    """The bytes `(C, H, W)` of an image in colour, `(H, W, 3)`."""
    return pixels.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the folders that they have in common."""
    split = [name.replace(os.sep, "/").split("/") for name in names]
    common = 0
    while all(len(parts) > common + 1 for parts in split) and len({parts[common] for parts in split}) == 1:
        common += 1
    return ["/".join(parts[common:]) for parts in split]
