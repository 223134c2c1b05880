"""A model's own preprocessing, through timm's transforms: from an image file to the tensor that the model takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from torch import Tensor, nn

from tokencut.errors import ModelError
from tokencut.models.pretrained_cfg import data_config, frames_of

# Tried whatever a file is called, and no others: for PostScript, Pillow would run Ghostscript on it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
# Read as well, the first frame of it, where it lies under another name, as in some sets of JPEGs; Pillow and timm do.
UNDER_OTHER_NAMES = ("GIF",)
MODES = {1: "L", 3: "RGB"}

# What turns an image upright, by the orientation that its EXIF tells; 1 is upright as it is stored.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip

Transform = Callable[[Image.Image], Tensor]


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message is the reason, in a few words."""


@dataclass(frozen=True)
class Preprocessing:
    """How images become the input of one model: timm's data config for it, as timm's loaders apply it.

    Transforms give bytes, as timm's do under its prefetching loader: a quarter of the traffic between processes.
    `normalise` turns a batch of them into what the model takes, on its device.

    Attributes:
        config: timm's data config: `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
        frames: Frames of the clips that the model takes; None for images.
    """

    config: dict[str, Any]
    frames: int | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """What the model takes one of: `(C, H, W)`, or `(C, frames, H, W)`."""
        channels, *size = self.config["input_size"]
        return (channels, *size) if self.frames is None else (channels, self.frames, *size)

    @property
    def mode(self) -> str:
        """Pillow's mode of the images that the model takes, `"RGB"` or `"L"`.

        Raises:
            ModelError: The model takes neither colour nor grey images, so none can be read for it.
        """
        channels = self.config["input_size"][0]
        if channels not in MODES:
            raise ModelError(
                f"image files have 3 channels (colour) or 1 (grey), and the model takes {channels}: what reads images "
                "cannot run it; compressing, profiling and exporting do without, and so does a loop of your own; or "
                "build it with `in_chans=3`"
            )
        return MODES[channels]

    def at_size(self, height: int, width: int) -> Preprocessing:
        """The same part of an image in another number of pixels."""
        return replace(self, config={**self.config, "input_size": (self.config["input_size"][0], height, width)})

    def transform(self, is_training: bool = False, **augmentation: Any) -> Transform:
        """timm's transform from an image to a tensor of bytes `(C, H, W)`.

        Args:
            is_training: Whether to use timm's training transform instead of the model's own for evaluation.
            augmentation: Further arguments of `timm.data.create_transform`. Random erasing is not done here: as in
                timm's prefetching loader, it belongs after `normalise`.
        """
        transform: Transform = create_transform(
            **{**self.config, **augmentation}, is_training=is_training, use_prefetcher=True
        )
        return transform

    def normalise(self, images: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Moves a batch of bytes to a device and normalises it there, by the arithmetic of timm's `PrefetchLoader`.

        Args:
            images: Bytes of shape `(B, C, H, W)`, or of clips `(B, C, frames, H, W)`.
            device: Where the model is.
            dtype: What the model computes in.

        Returns:
            The model's input, of the same shape.
        """
        moved = images.to(device, non_blocking=True).to(torch.float32)
        mean, std = (self._bytes(statistic, device, images.ndim) for statistic in ("mean", "std"))
        return moved.sub_(mean).div_(std).to(dtype)

    def _bytes(self, statistic: str, device: torch.device, dimensions: int) -> Tensor:
        channels = self.config["input_size"][0]
        values = [value * 255 for value in per_channel(self.config[statistic], channels)]
        ones = (1,) * (dimensions - 2)
        return torch.tensor(values, device=device, dtype=torch.float32).view(1, channels, *ones)


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A mean or a standard deviation for each channel, as timm's loaders take it: the average where numbers differ."""
    return tuple(values) if len(values) == channels else (float(np.mean(values)),) * channels


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """The preprocessing that a model was trained with, for the input that it was built for."""
    return Preprocessing(data_config(model), frames_of(model))


def decode(file: BinaryIO, mode: str = "RGB", *, upright: bool = False) -> Image.Image:
    """Decodes an image, as timm's dataset does, save that 16-bit grey is scaled to 8 bits and not clipped to white.

    Args:
        file: The encoded image.
        mode: Pillow's mode to convert to.
        upright: Whether to turn it as its EXIF says, as viewers do; timm, and what trains with it, do not.

    Returns:
        The image, fully decoded.

    Raises:
        UnreadableImageError: It is damaged, of another format, or so large that Pillow sees a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd but harmless metadata, which would break into progress bars and cannot be acted on.
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=(*FORMATS, *UNDER_OTHER_NAMES))
            image.load()  # which turns a TIFF, and then tells no orientation
            turn = turn_of(image) if upright else None
            return _to_mode(image if turn is None else image.transpose(turn), mode)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error
    except Exception as error:  # on damaged files Pillow's decoders raise almost anything, SyntaxError included
        raise UnreadableImageError(" ".join(str(error).split()) or type(error).__name__) from error


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode == "I" and image.format != "PNG":
        raise ValueError("32-bit pixels, whose range is unknown")
    if image.mode.startswith("I"):  # 16 bits; "I", which has room for 32, is how older Pillows open 16-bit PNGs
        pixels = np.clip(np.asarray(image), 0, 0xFFFF) >> 8  # the higher byte, as Pillow does with 16-bit colour
        told, image = image.info, Image.fromarray(pixels.astype(np.uint8))
        image.info = told
    return image.convert(mode)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What would turn an image upright, by its EXIF; None where it tells nothing, or that it is."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001 (damaged metadata raises almost anything, and takes nothing from the pixels)
        return None
