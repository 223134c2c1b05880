"""Pictures of what a compressed model still sees: the image, then its tokens after each stage."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokencut.data.image_files import Photo, PhotoLike, find_photos, read_photos
from tokencut.data.preprocessing import Preprocessing, preprocessing_of
from tokencut.errors import UsageError
from tokencut.files import check_writable
from tokencut.model import CompressedModel, require_compressed
from tokencut.runtime import extras
from tokencut.runtime.devices import resolve_device
from tokencut.visualization.grid import Canvas, Layout, Panel, Strip, fit
from tokencut.visualization.plots import PICTURE_FORMATS, Label, heat_colours, save_picture
from tokencut.visualization.regions import Grid, Pixels, draw_tokens, enlarge
from tokencut.visualization.stage_views import DrawnModel, DrawnStage, StageView, trace_images

# How strongly the lowest and the highest attention cover the photo, in percent.
LEAST_OPACITY, MOST_OPACITY = 35, 85

Drawable = CompressedModel | Mapping[str, CompressedModel]


@dataclass(frozen=True)
class View:
    """One row of a picture: an image (by name, or number from 0), a model (empty if there is one), and its stages."""

    image: str
    model: str
    stages: tuple[StageView, ...]


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        pixels: `(H, W, 3)`, without the texts.
        labels: The texts.
        views: Its rows, from top to bottom.
    """

    pixels: Pixels
    labels: tuple[Label, ...]
    views: tuple[View, ...]

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Writes the picture; the same picture gives the same bytes.

        Args:
            path: `*.png`, `*.pdf` or `*.svg`.
            force: Whether to replace the file if it exists.

        Returns:
            The path.

        Raises:
            UsageError: Another ending.
            ArtifactError: It exists and `force` is off, or cannot be written.
        """
        target = check_output(path, force=force)
        save_picture(self.pixels, self.labels, target, _form(target))
        return target


def check_output(path: str | os.PathLike[str], *, force: bool) -> Path:
    """Refuses a file that a picture could not be written to, before any work is done for it.

    Raises:
        UsageError: It ends in none of .png, .pdf and .svg.
        ArtifactError: It exists and `force` is off, or its folder does not exist.
    """
    target = Path(path)
    if _form(target) not in PICTURE_FORMATS:
        raise UsageError(f"{target} ends in none of .png, .pdf and .svg, which say what to write; "
                         f"type `path={str(target.with_suffix('.png'))!r}`")  # fmt: skip
    return check_writable(target, force=force)


def _form(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def draw(
    models: Drawable,
    images: PhotoLike | Sequence[PhotoLike] | Tensor,
    *,
    attention: bool = False,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: str = "fp32",
) -> Picture:
    """Draws what models still see of images: the image as the model sees it, then a panel a stage.

    Merged patches are outlined regions in their mean colour, tokens of one patch stay as they are, dropped ones are
    dark and hatched.

    Args:
        models: A compressed model; or several that take the same images, by the names that their rows get.
        images: A path or several, the word `digits`; or bytes `(B, C, H, W)` as the models' preprocessing leaves them.
        attention: Lay the class attention on the tokens that entered a stage over its panel, each token's spread
            evenly over its patches; colours go by the square root of its ratio to the panel's highest.
        batch_size: Images a forward.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.

    Returns:
        The picture, with one row an image and model.

    Raises:
        TokencutError: matplotlib is missing, an image cannot be read, the models take different images, or the
            picture would be too large.

    Example:
        >>> import tokencut
        >>> from tokencut.models.loading import load_model
        >>> model = tokencut.compress(load_model("digits").model, keep=0.6)
        >>> picture = tokencut.draw(model, "digits", device="cpu")
        >>> picture.save("tokens.png").name
        'tokens.png'
    """
    extras.require("pictures need", "matplotlib", extra="plot")
    given = dict(models) if isinstance(models, Mapping) else {"": models}
    named = {name: require_compressed(model, "draw") for name, model in given.items()}
    target, prepared = resolve_device(device), _shared_preprocessing(named)
    names, pixels = _pixels(images, prepared)
    traced = {
        name: trace_images(model, pixels, prepared, target, precision, batch_size, attention)
        for name, model in named.items()
    }
    return _compose(names, pixels, traced)


def _shared_preprocessing(models: Mapping[str, CompressedModel]) -> Preprocessing:
    """The preprocessing of all the models.

    Raises:
        UsageError: There is no model, or they differ in what they take.
    """
    if not models:
        raise UsageError("no model given to draw; give one, or several by name")
    found = {name: (preprocessing_of(model), model.adapter.patch_size(model.model)) for name, model in models.items()}
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            raise UsageError(f"{first} and {other} prepare images or cut them into patches in different ways, and one "
                             "picture shows one way; draw them one by one")  # fmt: skip
    return found[first][0]


def _pixels(images: PhotoLike | Sequence[PhotoLike] | Tensor, prepared: Preprocessing) -> tuple[list[str], Tensor]:
    """The images' names, and their bytes `(B, C, H, W)`."""
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UsageError(f"a tensor of images is of bytes (B, C, H, W), not {images.dtype} of {images.ndim} "
                             "dimensions; give the files' paths instead, or images.to(torch.uint8)")  # fmt: skip
        names, pixels = list(map(str, range(len(images)))), images
    else:
        several = [images] if isinstance(images, (str, os.PathLike, Photo)) else images
        photos, transform = find_photos(several), prepared.transform()
        names = [photo.name for photo in photos]
        made = read_photos(photos, prepared.mode, lambda image: torch.as_tensor(np.asarray(transform(image))))
        pixels = torch.stack(made) if made else torch.empty(0)
    if not len(pixels):
        raise UsageError("no image given to draw; name one, such as photo.jpg, or the word digits")
    return names, pixels


def _compose(names: Sequence[str], pixels: Tensor, traced: Mapping[str, DrawnModel]) -> Picture:
    grids = [one.grid for one in traced.values()]
    height, width = grids[0].seen(_photo(pixels[0])).shape[:2]
    # Stages of the same block stand below each other.
    blocks = sorted({stage.block for one in traced.values() for stage in one.stages})
    scale, layout = fit(
        height, width, lambda tall, wide: Layout(len(names), len(traced), len(blocks), tall, wide, len(traced) > 1)
    )
    canvas, views = Canvas(layout), []
    for image, name in enumerate(names):
        photo = _photo(pixels[image])
        strips = []
        for model, one in traced.items():
            drawn = {blocks.index(stage.block): _panel(photo, stage, image, one.grid, scale) for stage in one.stages}
            strips.append(Strip(drawn, model))
            views.append(View(name, model, tuple(stage.view(image) for stage in one.stages)))
        shown = Panel(enlarge(grids[0].seen(photo), scale), f"image: {grids[0].patches} patches")
        canvas.add(image, shown, strips)
    return Picture(canvas.pixels, tuple(canvas.labels), tuple(views))


def _photo(pixels: Tensor) -> Pixels:
    """The bytes `(C, H, W)` of an image in colour, `(H, W, 3)`."""
    return pixels.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def _panel(photo: Pixels, stage: DrawnStage, image: int, grid: Grid, scale: int) -> Panel:
    heat = None if stage.heat is None else _heat_map(stage.heat[image])
    drawn = draw_tokens(grid.seen(photo), stage.source[image], grid, scale, heat)
    return Panel(drawn, f"block {stage.block}: {stage.tokens_in} \N{RIGHTWARDS ARROW} {stage.tokens_out}")


def _heat_map(attention: NDArray[np.float64]) -> Pixels:
    """Colour and opacity for each patch, `(patches, 4)`."""
    # Few patches have many times the attention of the rest, which a linear scale would show as all alike.
    share = np.sqrt(attention / max(attention.max(), np.finfo(np.float64).tiny))
    opacity = LEAST_OPACITY + (MOST_OPACITY - LEAST_OPACITY) * share
    return np.concatenate([heat_colours(share), opacity[:, None].round().astype(np.uint8)], 1)
