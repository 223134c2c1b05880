"""Pictures of what a compressed model still sees: the image, then its tokens after each stage."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokencut.data.image_files import PhotoLike
from tokencut.data.preprocessing import Preprocessing, preprocessing_of
from tokencut.errors import UsageError
from tokencut.evaluation.prediction import Guess
from tokencut.files import check_writable, user_path, with_ending
from tokencut.model import CompressedModel, require_compressed, require_one_schedule
from tokencut.models.checkpoints import require_finite
from tokencut.runtime import extras
from tokencut.runtime.devices import resolve_device
from tokencut.visualization.grid import PANEL, PANELS_A_LINE, Canvas, Layout, Panel, Strip, fit, swatch_side
from tokencut.visualization.images import DrawnImages, read_images, short_names
from tokencut.visualization.legend import legend_of
from tokencut.visualization.regions import Grid, Pixels, draw_tokens
from tokencut.visualization.saving import PICTURE_FORMATS, Label, heat_colours, save_picture
from tokencut.visualization.stage_views import DrawnModel, DrawnStage, StageView, trace_images

# How strongly the lowest and the highest attention cover the photo, in percent.
LEAST_OPACITY, MOST_OPACITY = 35, 85
# The longer side of a panel in px: at best as many as the photo has, within these bounds and around `PANEL`.
SMALLEST_PANEL, LARGEST_PANEL = 160, 896
# Patches smaller than this would be all borders.
SMALLEST_PATCH = 8

Drawable = CompressedModel | Mapping[str, CompressedModel]


@dataclass(frozen=True)
class View:
    """One row of a picture.

    Attributes:
        image: The image, by name, or by number from 0.
        model: The model's name; empty if there is one.
        stages: What its stages did.
        predicted: What it took the image for; None where it has no head.
    """

    image: str
    model: str
    stages: tuple[StageView, ...]
    predicted: Guess | None = None


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        pixels: `(H, W, 3)`, without the texts.
        labels: The texts.
        views: Its rows, image by image.
        legend: What its legend says.
    """

    pixels: Pixels
    labels: tuple[Label, ...]
    views: tuple[View, ...]
    legend: tuple[str, ...] = ()

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
    target = user_path(path)
    if _form(target) not in PICTURE_FORMATS:
        raise UsageError(f"{target} ends in none of .png, .pdf and .svg, which say what to write; "
                         f"type `path={str(with_ending(target, '.png', 'tokens'))!r}`")  # fmt: skip
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
    frame_stride: int = 4,
) -> Picture:
    """Draws what models still see of images: what of the image the model sees, then a panel a stage, and a legend.

    Merged patches are outlined regions in their mean colour, tokens of one patch stay as they are, dropped ones are
    dark and hatched. Regions that are one token without touching have one number. A clip is a strip of frames, one of
    each tubelet. Photos are turned upright, and drawn
    with their own detail where that is more than a model takes. Each row says what the model takes the image for.

    Args:
        models: A compressed model; or several that take the same images, by the names that their rows get.
        images: A path or several, the word `digits`; or bytes `(B, C, H, W)`, of clips `(B, C, frames, H, W)`, as the
            models' preprocessing leaves them.
        attention: Lay the class attention on the tokens that entered a stage over its panel, each token's spread
            evenly over its patches; colours go by the square root of its ratio to the panel's highest.
        batch_size: Images a forward.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
        frame_stride: Of videos, the frames from one of a clip to the next.

    Returns:
        The picture, with one row an image and model; where rows are many, several stand side by side.

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
    for model in named.values():
        require_one_schedule(model, "draw")
        require_finite(model)
    target, prepared = resolve_device(device), shared_preprocessing(named)
    shown = read_images(images, prepared, frame_stride)
    traced = {
        name: trace_images(model, shown.pixels, prepared, target, precision, batch_size, attention)
        for name, model in named.items()
    }
    return _compose(shown, traced)


def shared_preprocessing(models: Mapping[str, CompressedModel]) -> Preprocessing:
    """The preprocessing of all the models.

    Raises:
        UsageError: There is no model, or they differ in what they take.
        ModelError: They take neither colour nor grey images.
    """
    if not models:
        raise UsageError("no model given to draw; give one, or several by name")
    found = {name: (preprocessing_of(model), model.adapter.patch_size(model.model)) for name, model in models.items()}
    first, *others = found
    _ = found[first][0].mode  # a model that no image can be read for is refused before any work
    for other in others:
        if found[other] != found[first]:
            raise UsageError(f"{first} and {other} prepare images or cut them into patches in different ways, and one "
                             "picture shows one way; draw them one by one")  # fmt: skip
    return found[first][0]


def _compose(images: DrawnImages, traced: Mapping[str, DrawnModel]) -> Picture:
    grid = next(iter(traced.values())).grid
    # Stages of the same block stand below each other.
    blocks = sorted({stage.block for one in traced.values() for stage in one.stages})
    count, several = len(images.names), len(images.names) > 1 and len(traced) > 1
    strips = len(traced) if several else 1
    groups = count * len(traced) // strips
    sizes = {images.seen_size(grid, scaled): scaled for scaled in map(grid.scaled, _sides(grid, max(images.detail)))}
    a_line = PANELS_A_LINE if grid.frames == 1 else 1  # a clip is a row of frames already
    layout = fit(
        list(sizes), groups, lambda tall, wide, across: Layout(groups, strips, len(blocks), tall, wide, across, a_line)
    )
    drawn_grid = sizes[layout.height, layout.width]
    legend = legend_of(list(traced.values()), drawn_grid, swatch_side(layout))
    canvas, views = Canvas(layout, legend), []
    for image, (name, called) in enumerate(zip(images.names, short_names(images.names), strict=True)):
        photo = images.seen(image, grid, drawn_grid)
        shown = Panel(photo, f"image: {grid.patches} patches" if grid.frames == 1 else f"clip: {grid.patches} tubelets")
        if several:
            canvas.add_group(image, called)
        for row, (model, one) in enumerate(traced.items()):
            stages = {blocks.index(stage.block): _panel(photo, stage, image, drawn_grid) for stage in one.stages}
            best = one.predicted[image] if one.predicted else None
            texts = ("" if several else called, model, _predicted(best))
            title = " \N{EN DASH} ".join(text for text in texts if text)
            at = (image, row) if several else (image * len(traced) + row, 0)
            canvas.add(*at, Strip(shown, stages, title))
            views.append(View(name, model, tuple(stage.view(image) for stage in one.stages), best))
    return Picture(canvas.pixels, tuple(canvas.labels), tuple(views), tuple(panel.caption for panel in legend))


def _predicted(best: Guess | None) -> str:
    """What an image was taken for, by the first of its class's synonyms."""
    if best is None:
        return ""
    name = f"class {best.label}" if best.label == str(best.index) else best.label.partition(",")[0]
    return f"{name} ({100 * best.probability:.0f} %)"


def _sides(grid: Grid, detail: float) -> Iterator[int]:
    """The sides that patches may have in px, the best first: as large as the photo's own detail is worth."""
    patches = max(grid.rows, grid.columns)
    own = detail * patches * max(grid.height, grid.width)
    best = max(SMALLEST_PATCH, int(min(max(own, PANEL * grid.frames), LARGEST_PANEL * grid.frames) / patches))
    yield from range(best, max(SMALLEST_PATCH, min(best, SMALLEST_PANEL // patches)) - 1, -1)


def _panel(photo: Pixels, stage: DrawnStage, image: int, grid: Grid) -> Panel:
    heat = None if stage.heat is None else _heat_map(stage.heat[image])
    drawn = draw_tokens(photo, stage.source[image], grid, heat)
    where = f"block {stage.block}" if stage.block else "static"
    return Panel(drawn, f"{where}: {stage.tokens_in} \N{RIGHTWARDS ARROW} {stage.tokens_out}")


def _heat_map(attention: NDArray[np.float64]) -> Pixels:
    """Colour and opacity for each patch, `(patches, 4)`."""
    # Few patches have many times the attention of the rest, which a linear scale would show as all alike.
    share = np.sqrt(attention / max(attention.max(), np.finfo(np.float64).tiny))
    opacity = LEAST_OPACITY + (MOST_OPACITY - LEAST_OPACITY) * share
    return np.concatenate([heat_colours(share), opacity[:, None].round().astype(np.uint8)], 1)
