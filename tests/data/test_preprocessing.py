"""From image files to a model's input."""

from __future__ import annotations

import io

import numpy as np
import pytest
import timm
import torch
from image_files import encoded, picture
from PIL import Image, ImageFile
from timm.data.loader import PrefetchLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokencut.data.preprocessing import UnreadableImageError, decode, preprocessing_of, turn_of
from tokencut.errors import ModelError

CPU = torch.device("cpu")


def decoded(content: bytes, mode: str = "RGB") -> np.ndarray:
    """The pixels of an image file."""
    return np.asarray(decode(io.BytesIO(content), mode))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_decodes_as_pillow_does(form: str) -> None:
    content = encoded(picture(1), form)
    assert np.array_equal(decoded(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(form: str) -> None:
    grey = np.array([[0, 255, 256], [0x8000, 0xABCD, 0xFFFF]], dtype=np.uint16)
    pixels = decoded(encoded(Image.fromarray(grey), form))
    assert pixels[..., 0].tolist() == [[0, 0, 1], [0x80, 0xAB, 0xFF]]
    assert (pixels == pixels[..., :1]).all()


def test_a_png_of_16_bits_that_pillow_opens_as_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older releases of Pillow do."""
    opened = Image.open(io.BytesIO(encoded(Image.new("I;16", (1, 1), 0x8000), "PNG"))).convert("I")
    opened.format = "PNG"
    monkeypatch.setattr(Image, "open", lambda *_, **__: opened)
    assert np.asarray(decode(io.BytesIO())).tolist() == [[[0x80] * 3]]


@pytest.mark.parametrize(
    ("image", "form", "expected"),
    [
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 40)), "PNG", (10, 20, 30)),
        (Image.new("LA", (2, 2), (90, 0)), "PNG", (90, 90, 90)),
        (Image.new("L", (2, 2), 90), "PNG", (90, 90, 90)),
        (Image.new("1", (2, 2), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (2, 2), (255, 0, 0)).convert("P"), "PNG", (255, 0, 0)),
    ],
    ids=["cmyk", "alpha", "grey and alpha", "grey", "black and white", "palette"],
)
def test_other_modes_become_colour(image: Image.Image, form: str, expected: tuple[int, ...]) -> None:
    assert (decoded(encoded(image, form)) == expected).all()


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    pixels = decoded(encoded(Image.new("CMYK", (8, 8), (0, 200, 200, 0)))).astype(int)
    assert abs(pixels - (255, 55, 55)).max() < 8


def test_a_palette_with_transparency_needs_no_warning() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (255, 0, 0)).convert("P").save(buffer, "PNG", transparency=bytes([0, 128]))
    assert (decoded(buffer.getvalue()) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(picture(1))[:-200], "image file is truncated"),
        (b"just text", "not a JPEG, PNG, WEBP, BMP or TIFF image"),
        (b"", "not a JPEG, PNG, WEBP, BMP or TIFF image"),
        (encoded(picture(1), "PPM"), "not a JPEG, PNG, WEBP, BMP or TIFF image"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "floating-point pixels, whose range is unknown"),
    ],
    ids=["truncated", "text", "empty", "ppm", "float"],
)
def test_what_cannot_be_decoded_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        decode(io.BytesIO(content))


def test_a_decompression_bomb_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(picture(1, (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # 1,600 pixels are more than twice that
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        decode(io.BytesIO(content))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # Pillow only warns of less
    assert decode(io.BytesIO(content)).size == (40, 40)


def test_an_error_without_a_message_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise IndexError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UnreadableImageError, match="^IndexError$"):
        decode(io.BytesIO(encoded(picture(1), "PNG")))


def batch_of(transform: object, size: int) -> Tensor:
    """A batch of transformed pictures."""
    return torch.stack([transform(picture(seed)) for seed in range(size)])  # type: ignore[operator]


def test_normalises_to_the_bit_as_timm() -> None:
    prepared = preprocessing_of(timm.create_model("test_vit", img_size=32))
    images = batch_of(prepared.transform(), 3)
    assert (images.dtype, images.shape) == (torch.uint8, (3, 3, 32, 32))
    config = prepared.config
    timms = PrefetchLoader(
        DataLoader([(image, 0) for image in images], batch_size=3),  # type: ignore[arg-type]
        mean=config["mean"],
        std=config["std"],
        device=CPU,
    )
    assert torch.equal(prepared.normalise(images, CPU), next(iter(timms))[0])


def test_normalises_into_the_models_own_type() -> None:
    prepared = preprocessing_of(timm.create_model("test_vit", img_size=32))
    images = batch_of(prepared.transform(), 1)
    assert torch.equal(
        prepared.normalise(images, CPU, torch.bfloat16), prepared.normalise(images, CPU).to(torch.bfloat16)
    )


def test_training_transforms_come_from_the_same_place() -> None:
    prepared = preprocessing_of(timm.create_model("test_vit", img_size=32))
    transform = prepared.transform(is_training=True, hflip=1.0, scale=(1.0, 1.0), ratio=(1.25, 1.25), color_jitter=None)
    image = picture(1, (40, 32))
    flipped = transform(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert torch.equal(flipped, prepared.transform(crop_mode="squash", crop_pct=1.0)(image))


def test_the_size_and_the_channels_are_those_the_model_was_built_for() -> None:
    prepared = preprocessing_of(timm.create_model("test_vit", img_size=(32, 48), in_chans=1))
    assert prepared.config["input_size"] == (1, 32, 48)
    assert prepared.mode == "L"
    images = torch.stack([prepared.transform()(picture(1).convert("L"))])
    assert prepared.normalise(images, CPU).shape == (1, 1, 32, 48)


def test_a_wrapped_model_is_looked_into() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = timm.create_model("test_vit", img_size=32)
            self.pretrained_cfg = self.model.pretrained_cfg

    assert preprocessing_of(Wrapper()).config["input_size"] == (3, 32, 32)


def test_a_model_that_does_not_tell_is_taken_at_its_config() -> None:
    model = nn.Identity()
    model.pretrained_cfg = {"input_size": (3, 20, 20), "first_conv": "stem.conv"}  # type: ignore[assignment]
    assert preprocessing_of(model).config["input_size"] == (3, 20, 20)


def test_no_image_can_be_read_for_other_channels() -> None:
    prepared = preprocessing_of(timm.create_model("test_vit", img_size=32, in_chans=4))
    assert prepared.config["input_size"] == (4, 32, 32)
    with pytest.raises(ModelError) as caught:
        _ = prepared.mode
    assert str(caught.value) == (
        "image files have 3 channels (colour) or 1 (grey), and the model takes 4: what reads images cannot run it; "
        "compressing, profiling and exporting do without, and so does a loop of your own; or build it with `in_chans=3`"
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 50)])
def test_the_smallest_images_work(size: tuple[int, int]) -> None:
    prepared = preprocessing_of(timm.create_model("test_vit", img_size=32))
    image = decode(io.BytesIO(encoded(Image.new("RGB", size, (1, 2, 3)), "PNG")))
    assert prepared.transform()(image).shape == (3, 32, 32)


@pytest.mark.parametrize("value", [200, 40_000, 3_000_000])
def test_pixels_of_32_bits_are_unreadable_rather_than_black(value: int) -> None:
    content = encoded(Image.fromarray(np.full((8, 8), value, np.int32)), "TIFF")
    with pytest.raises(UnreadableImageError, match="^32-bit pixels, whose range is unknown$"):
        decode(io.BytesIO(content))


def test_a_gif_under_another_name_is_its_first_frame() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    file = io.BytesIO()
    red.save(file, "GIF", save_all=True, append_images=[blue])
    file.seek(0)
    assert decode(file).getpixel((3, 3)) == (255, 0, 0)


def stored_turned(form: str, orientation: int) -> tuple[Image.Image, bytes]:
    """A picture, and a file that holds it turned so that its EXIF's orientation turns it back."""
    upright = picture(1, (40, 32))
    back = {3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}  # fmt: skip
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    upright.transpose(back[orientation]).save(buffer, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    return upright, buffer.getvalue()


@pytest.mark.parametrize(("form", "orientation"), [("PNG", 5), ("PNG", 6), ("PNG", 7), ("PNG", 8), ("JPEG", 3)])
def test_a_photo_is_turned_upright_where_that_is_asked_for(form: str, orientation: int) -> None:
    upright, content = stored_turned(form, orientation)
    seen = decode(io.BytesIO(content), upright=True)
    assert seen.size == upright.size
    # JPEG loses a little.
    assert np.abs(np.asarray(seen, dtype=int) - np.asarray(upright, dtype=int)).max() <= (40 if form == "JPEG" else 0)
    # As timm, which opens with Pillow and converts.
    stored = decode(io.BytesIO(content))
    assert np.array_equal(stored, Image.open(io.BytesIO(content)).convert("RGB"))
    assert turn_of(stored) is not None


def test_a_tiff_which_pillow_turns_itself_is_turned_once() -> None:
    upright, content = stored_turned("TIFF", 6)
    for asked in (True, False):
        seen = decode(io.BytesIO(content), upright=asked)
        assert np.array_equal(seen, upright)
        assert turn_of(seen) is None


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b""])
def test_damaged_exif_turns_nothing(exif: bytes) -> None:
    buffer = io.BytesIO()
    picture(1).save(buffer, "JPEG", exif=exif)
    assert decode(io.BytesIO(buffer.getvalue()), upright=True).size == (40, 32)
