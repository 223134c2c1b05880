"""transformers' `preprocessor_config.json` as timm's preprocessing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tokencut.errors import ModelError
from tokencut.messages import shorten
from tokencut.models.huggingface.architectures import pair
from tokencut.schema import is_number, is_whole

# Pillow's numbers, which transformers writes.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_PLAIN = 1 / 255


def preprocessing_from(
    given: Mapping[str, Any] | None,
    usual: Mapping[str, Any],
    image_size: tuple[int, int],
    *,
    resizes: bool,
    wanted: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Reads how images are prepared.

    Args:
        given: The content of `preprocessor_config.json`; None where there is none.
        usual: What stands for what it leaves out.
        image_size: Height and width in px that the model was made for.
        resizes: Whether the model takes images of any size, so that the preprocessing decides.
        wanted: Height and width that were asked for instead.

    Returns:
        timm's `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`, and `input_size`, height and width in px.

    Raises:
        ModelError: A field holds what it cannot.
    """
    fields = {**usual, **{name: value for name, value in (given or {}).items() if value is not None}}
    size = _size(fields.get("size"), "size") or image_size
    cropped = bool(fields.get("do_center_crop")) and fields.get("do_resize", True)
    final = (_size(fields.get("crop_size"), "crop_size") or size) if cropped else size
    taken = wanted or (final if resizes and given is not None else image_size)
    # What is kept of a resized image stays the same where the model takes images of another size than these.
    share = final[0] / size[0]
    mean, std = (_statistic(fields, name) for name in ("image_mean", "image_std"))
    if not fields.get("do_normalize", True):
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    scale = fields.get("rescale_factor", _PLAIN) if fields.get("do_rescale", True) else 1.0
    if not is_number(scale) or scale <= 0:
        raise _wrong("rescale_factor", scale, "a positive number")
    # ViViT's takes 1 from what it has scaled, before it normalises that.
    if fields.get("offset") and fields.get("do_rescale", True):
        mean = tuple(value + 1 for value in mean)
    if not math.isclose(scale, _PLAIN, rel_tol=1e-4):  # timm's pixels go from 0 to 1
        mean, std = (tuple(value / (255 * scale) for value in values) for values in (mean, std))
    resample = fields.get("resample", 3)
    if resample not in _RESAMPLE:
        raise _wrong("resample", resample, "a number from 0 to 5")
    return {
        "input_size": taken,
        "mean": mean,
        "std": std,
        "interpolation": _RESAMPLE[resample],
        "crop_pct": _crop_pct(taken[0], share),
        "crop_mode": "center" if _keeps_shape(fields.get("size"), usual["size"]) else "squash",
    }


def _keeps_shape(size: Any, usual: Any) -> bool:
    """Whether images are resized by their shorter side; a number alone means what the type's usual size does."""
    told = size if isinstance(size, Mapping) else usual
    return isinstance(told, Mapping) and bool(told.get("shortest_edge") or told.get("longest_edge"))


def _size(value: Any, name: str) -> tuple[Any, Any] | None:
    """Height and width; of an image's shorter side, twice that."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        edge = value.get("shortest_edge") or value.get("longest_edge")
        value = (value.get("height") or edge, value.get("width") or edge)
    found = pair(value)
    if not all(is_whole(side, 1, 1 << 16) for side in found):
        raise _wrong(name, value, "a number of pixels")
    return found


def _crop_pct(side: int, share: float) -> float:
    """What timm divides a side by, rounding down, to have the size that images are resized to."""
    resized = round(side / share)
    exact = side / resized
    return exact if math.floor(side / exact) == resized else side / (resized + 0.25)


def _statistic(fields: Mapping[str, Any], name: str) -> tuple[float, ...]:
    found = fields[name]
    values = tuple(found) if isinstance(found, (list, tuple)) else (found,)
    least = 0 if name == "image_mean" else 1e-6
    if not values or not all(is_number(value) and value >= least for value in values):
        raise _wrong(name, found, "a number for each channel")
    return tuple(float(value) for value in values)


def _wrong(name: str, value: Any, expected: str) -> ModelError:
    return ModelError(f"its preprocessor_config.json says {name} {shorten(value)}, which is not {expected}; correct "
                      "it, or take the file away and tell mean, std and crop_pct yourself")  # fmt: skip
