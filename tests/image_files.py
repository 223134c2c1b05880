"""Small image sets for tests, written where a test wants them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A colourful picture that compresses, another for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG") -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def write_folder(root: Path, classes: Sequence[str], images: int) -> Path:
    """A folder of JPEGs: `images` in each class, `1.jpg` and so on."""
    for number, folder in enumerate(classes):
        (root / folder).mkdir(parents=True)
        for image in range(1, images + 1):
            picture(1000 * number + image).save(root / folder / f"{image}.jpg")
    return root


def greys(root: Path, levels: dict[str, list[int]]) -> Path:
    """A folder with one plain grey PNG for each level of each class."""
    for name, values in levels.items():
        (root / name).mkdir(parents=True)
        for number, value in enumerate(values, 1):
            Image.new("RGB", (8, 8), (value,) * 3).save(root / name / f"{number}.png")
    return root


def write_tar(path: Path, files: Mapping[str, bytes], mode: Literal["w", "w:gz"] = "w") -> Path:
    """A tar archive with the given files, in that order; `mode="w:gz"` compresses it."""
    with tarfile.open(path, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def tar_of(folder: Path, path: Path, mode: Literal["w", "w:gz"] = "w") -> Path:
    """A tar archive of a folder's content."""
    with tarfile.open(path, mode=mode) as archive:
        archive.add(folder, arcname=".")
    return path
