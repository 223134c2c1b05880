"""Augmentation of whole batches on the device that they lie on, every image with random numbers of its own.

timm augments images one by one on the CPU, and torchvision's transforms draw one set of numbers for a whole batch.
Neither feeds a GPU that trains on 20,000 small images a second; a few dozen kernels a batch do.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Weights of red, green and blue in grey, as Pillow has them.
GREY = (0.299, 0.587, 0.114)
# Of the blurred image, which is mixed with the sharp one in random shares.
BLUR_SIGMA_PX = 1.2


@dataclass(frozen=True)
class Augmentation:
    """What is done to images in training; the defaults are DeiT III's for 45,000 images of 64 px, rotation added.

    Attributes:
        scale: Smallest and largest share of an image's area that a crop takes.
        ratio: Smallest and largest ratio of a crop's width to its height.
        hflip: Probability of a horizontal flip.
        rotation: Largest angle, in degrees; half of the images are turned.
        jitter: Largest change of brightness, contrast and saturation.
        three: Probability of one of greyscale, solarising and blur.
        erasing: Probability of a box of noise.
    """

    scale: tuple[float, float] = (0.3, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    rotation: float = 10.0
    jitter: float = 0.3
    three: float = 0.6
    erasing: float = 0.25


def uniform(like: Tensor, low: float, high: float) -> Tensor:
    """One number an image, `(B,)`."""
    return torch.empty(len(like), device=like.device).uniform_(low, high)


def crop(images: Tensor, size: int, settings: Augmentation) -> Tensor:
    """Random resized crops, turned and flipped, in one resampling.

    Args:
        images: Pixels from 0 to 1, `(B, 3, S, S)`.
        size: Height and width of the crops, px.
        settings: How much.

    Returns:
        `(B, 3, size, size)`.
    """
    area = uniform(images, *settings.scale)
    ratio = uniform(images, math.log(settings.ratio[0]), math.log(settings.ratio[1])).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = uniform(images, -1, 1) * (1 - width), uniform(images, -1, 1) * (1 - height)
    flip = 1 - 2 * (uniform(images, 0, 1) < settings.hflip).float()
    angle = uniform(images, -1, 1) * math.radians(settings.rotation) * (uniform(images, 0, 1) < 0.5)
    rows = [
        torch.stack([flip * width * angle.cos(), -height * angle.sin(), left], dim=1),
        torch.stack([flip * width * angle.sin(), height * angle.cos(), top], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), [len(images), 3, size, size], align_corners=False)
    found = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return found.clamp(0, 1)  # bicubic overshoots


def colour(images: Tensor, settings: Augmentation) -> Tensor:
    """DeiT III's three (one of greyscale, solarising and blur), then brightness, contrast and saturation."""
    chosen = uniform(images, 0, 1).view(-1, 1, 1, 1) * 3 / max(settings.three, 1e-6)
    images = torch.where(chosen < 1, _grey(images).expand_as(images), images)
    images = torch.where((chosen >= 1) & (chosen < 2) & (images >= 0.5), 1 - images, images)
    images = torch.where((chosen >= 2) & (chosen < 3), _blurred(images), images)
    low, high = 1 - settings.jitter, 1 + settings.jitter
    brightness, contrast, saturation = (uniform(images, low, high).view(-1, 1, 1, 1) for _ in range(3))
    images = (images * brightness).clamp(0, 1)
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(mean.expand_as(images), images, contrast).clamp(0, 1)
    return torch.lerp(_grey(images).expand_as(images), images, saturation).clamp(0, 1)


def erase(images: Tensor, probability: float) -> Tensor:
    """Puts noise into a box of 2 to 33 % of an image's area; timm's erases in a loop over the images.

    Args:
        images: Normalised, `(B, C, H, W)`.
        probability: Of a box.
    """
    height, width = images.shape[-2:]
    area, ratio = uniform(images, 0.02, 1 / 3), uniform(images, math.log(0.3), math.log(1 / 0.3)).exp()
    high, wide = ((area * ratio).sqrt() * height).clamp(max=height), ((area / ratio).sqrt() * width).clamp(max=width)
    top, left = uniform(images, 0, 1) * (height - high), uniform(images, 0, 1) * (width - wide)
    wanted = uniform(images, 0, 1) < probability
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    inside_rows = (rows >= top[:, None]) & (rows < (top + high)[:, None]) & wanted[:, None]
    inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    box = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    return torch.where(box, torch.randn_like(images), images)


@functools.lru_cache
def _enlarging(side: int, times: int, device: torch.device) -> Tensor:
    """What a column of pixels is multiplied by, `(side * times, side)`."""
    columns = F.interpolate(torch.eye(side)[None, None], size=(side * times, side), mode="bicubic", antialias=True)
    return columns[0, 0].to(device)


def enlarge(images: Tensor, times: int) -> Tensor:
    """Bicubic as Pillow's, by two matrix products: the kernels of torch's take longer than a step of a small model.

    Args:
        images: Pixels from 0 to 1, `(B, 3, S, S)`.
        times: How many times as high and wide.

    Returns:
        `(B, 3, S * times, S * times)`.
    """
    if times == 1:
        return images
    columns = _enlarging(images.shape[-1], times, images.device)
    return (columns @ images @ columns.T).clamp(0, 1)


def augment(
    images: Tensor, size: int, mean: Tensor, std: Tensor, settings: Augmentation, small: int = 0, times: int = 1
) -> Tensor:
    """A training batch from decoded images.

    Args:
        images: Bytes, `(B, 3, S, S)`.
        size: Height and width of what comes out, px.
        mean: Of each channel, of pixels from 0 to 1, `(3,)`.
        std: Likewise.
        settings: How much of what.
        small: Height and width that it is scaled down to; 0 for `size`.
        times: How many times crops are enlarged, of `size / times` px.

    Returns:
        Normalised, `(B, 3, size, size)`, or `(B, 3, small, small)`.
    """
    found = enlarge(colour(crop(images.float() / 255, size // times, settings), settings), times)
    if small:
        found = F.interpolate(found, size=(small, small), mode="bilinear", antialias=True, align_corners=False)
    return erase(normalise(found, mean, std), settings.erasing)


def centre(images: Tensor, size: int, mean: Tensor, std: Tensor, times: int = 1) -> Tensor:
    """A batch to be judged: the middle of the images, enlarged so many times, as timm's centre crop takes it."""
    pixels = enlarge(images.float() / 255, times)
    start = round((pixels.shape[-1] - size) / 2)
    return normalise(pixels[..., start : start + size, start : start + size], mean, std)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels from 0 to 1, less the mean, by the standard deviation."""
    return (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def _grey(images: Tensor) -> Tensor:
    # Plain numbers: a tensor of them would be copied to the GPU, which waits until all before it is done.
    red, green, blue = images.unbind(dim=1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue).unsqueeze(1)


def _blurred(images: Tensor) -> Tensor:
    """The images, each mixed with its blurred self by a share of its own."""
    distance = torch.arange(-3, 4, device=images.device, dtype=images.dtype)
    kernel = (-(distance**2) / (2 * BLUR_SIGMA_PX**2)).exp()
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = F.pad(images, (3, 3, 3, 3), mode="reflect")
    soft = F.conv2d(F.conv2d(padded, kernel[:, :, None, :], groups=3), kernel[:, :, :, None], groups=3)
    return torch.lerp(images, soft, uniform(images, 0.3, 1).view(-1, 1, 1, 1))
