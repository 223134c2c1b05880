"""Pictures as a whole: what stands where, every kind of model, files that are the same each time, and refusals."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_files import encoded, picture
from PIL import Image

from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import ArtifactError, ModelError, TokencutError, UsageError
from tokencut.evaluation.prediction import predict
from tokencut.model import CompressedModel, compress
from tokencut.visualization import drawing, grid
from tokencut.visualization.drawing import Picture, check_output, draw
from tokencut.visualization.images import short_names
from tokencut.visualization.plots import COLOURS
from tokencut.visualization.regions import draw_tokens
from tokencut.visualization.stage_views import trace_images

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "PANEL", 128)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Two images of fewer pixels than any model takes."""
    for number in (1, 2):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(picture(number, (60, 48))))
    return [tmp_path / "1.jpg", tmp_path / "2.jpg"]


def small(name: str = "test_vit", timm_args: dict[str, Any] | None = None, **changes: Any) -> CompressedModel:
    """`bat` at keep 0.5 in blocks 2, 4 and 5 of 6, unless told otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **{"img_size": 64, "num_classes": 3, **(timm_args or {})})
    return compress(model, **{"keep": 0.5, **changes})


def captions(found: Picture) -> list[str]:
    return [label.text for label in found.labels if not label.left]


def titles(found: Picture) -> list[str]:
    """What rows are called, without what the model takes the image for."""
    texts = [label.text for label in found.labels if label.left and label.text not in found.legend]
    return [re.sub(r"( – )?class \d \(\d+ %\)$", "", text) for text in texts]


def panel(found: Picture, layout: grid.Layout, *place: int) -> np.ndarray:
    top, left = layout.panel_at(*place)
    return found.pixels[top : top + layout.height, left : left + layout.width]


def test_a_picture_holds_the_image_and_each_stage(photos: list[Path]) -> None:
    model = small()
    found = draw(model, photos, device="cpu")
    assert captions(found) == [
        "image: 16 patches", "block 2: 16 → 8", "block 4: 8 → 4", "block 5: 4 → 2",
    ] * 2  # fmt: skip
    assert titles(found) == ["1.jpg", "2.jpg"]
    assert [(view.image, view.model) for view in found.views] == [(str(photo), "") for photo in photos]
    assert [stage.tokens_out for stage in found.views[0].stages] == [8, 4, 2]
    prepared = preprocessing_of(model)
    pixels = torch.stack([torch.as_tensor(prepared.transform()(Image.open(path).convert("RGB"))) for path in photos])
    seen = trace_images(model, pixels, prepared, torch.device("cpu"), "fp32", 2, False)
    layout, scaled = grid.Layout(2, 1, 3, 128, 128), seen.grid.scaled(32)
    for image in range(2):
        # Of so small a photo the model's own pixels are drawn, each as a square.
        photo = pixels[image].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
        assert np.array_equal(panel(found, layout, image, 0, 0), photo)
        for place, stage in enumerate(seen.stages):
            expected = draw_tokens(photo, stage.source[image], scaled)
            assert np.array_equal(panel(found, layout, image, 0, place + 1), expected)


def test_a_photo_is_drawn_with_its_own_detail_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "LARGEST_PANEL", 384)
    model = small()
    for side, drawn in ((160, 152), (1000, 384)):  # 95 % of the photo, as the model sees it: 152 px
        photo = picture(1, (side + 40, side))
        photo.save(path := tmp_path / f"{side}.png")
        found = draw(model, path)
        expected = preprocessing_of(model).at_size(drawn, drawn).transform()(photo)
        expected = np.asarray(expected).transpose(1, 2, 0)
        assert np.array_equal(panel(found, grid.Layout(1, 1, 3, drawn, drawn), 0, 0, 0), expected)


def test_a_phones_photo_stands_upright(tmp_path: Path) -> None:
    upright, exif = picture(1, (120, 160)), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    upright.save(tmp_path / "upright.png")
    upright.rotate(90, expand=True).save(tmp_path / "phone.png", exif=exif)
    one, other = (draw(small(), tmp_path / name).pixels for name in ("upright.png", "phone.png"))
    assert np.array_equal(one, other)


def test_an_image_is_drawn_the_same_alone_or_among_others(photos: list[Path]) -> None:
    alone, among = draw(small(), photos[:1], attention=True), draw(small(), photos, attention=True)
    layouts = grid.Layout(1, 1, 3, 128, 128), grid.Layout(2, 1, 3, 128, 128)
    for place in range(4):
        assert np.array_equal(panel(alone, layouts[0], 0, 0, place), panel(among, layouts[1], 0, 0, place))


def test_the_legend_tells_of_what_is_there_and_of_nothing_else(photos: list[Path]) -> None:
    merged, parts = "outlined: merged, one token, in its mean colour", "same number: parts of one token"
    alone, dropped = "plain: a token of one patch", "dark: dropped"
    assert draw(small(keep=0.75, layers=(2,)), photos[:1]).legend[0] == merged
    topk = draw(small(method="topk"), photos[:1])
    assert topk.legend == (alone, dropped)
    assert [label.text for label in topk.labels][-6:-4] != list(topk.legend)
    together = draw({"a": small(method="topk"), "b": small()}, photos)
    assert {merged, dropped} <= set(together.legend) <= {merged, parts, alone, dropped}
    hot = draw(small(), photos[:1], attention=True)
    assert hot.legend[0] == "outlined: merged, one token"
    assert hot.legend[-1] == "class attention on tokens that entered, least to most"
    assert draw(small(keep=1.0), photos[:1]).legend == ()


def test_names_lose_the_folders_they_share() -> None:
    assert short_names(["/a/b/1.jpg"]) == ["1.jpg"]
    assert short_names(["/a/b/1.jpg", "/a/c/1.jpg"]) == ["b/1.jpg", "c/1.jpg"]
    assert short_names(["val:ant/1.jpg", "val:ant/2.jpg"]) == ["1.jpg", "2.jpg"]
    assert short_names(["x.png", "x.png", "x.png/y"]) == ["x.png", "x.png", "x.png/y"]


def test_attention_colours_the_panels_and_not_the_image(photos: list[Path]) -> None:
    plain, hot = (draw(small(), photos[:1], attention=attention).pixels for attention in (False, True))
    layout = grid.Layout(1, 1, 3, 128, 128)
    first, second = (layout.panel_at(0, 0, place)[1] for place in (0, 1))
    lines = layout.size[0]
    assert np.array_equal(plain[:lines, first : first + 128], hot[:lines, first : first + 128])
    assert not np.array_equal(plain[:lines, second:], hot[:lines, second:])


def test_models_that_are_compared_stand_in_rows(photos: list[Path]) -> None:
    models = {"bat": small(), "less": small(layers=(2, 6), keep=0.75)}
    found = draw(models, photos)
    assert [(view.image, view.model) for view in found.views] == [
        (str(photo), name) for photo in photos for name in ("bat", "less")
    ]
    assert titles(found) == ["1.jpg", "bat", "less", "2.jpg", "bat", "less"]
    assert titles(draw(models, photos[:1])) == ["1.jpg – bat", "1.jpg – less"]
    # Stages of one block stand below each other; "less" has none in 4 and 5, "bat" none in 6.
    lefts = {label.text: label.x for label in draw(models, photos[:1]).labels}
    assert lefts["block 2: 16 → 8"] == lefts["block 2: 16 → 12"]
    assert lefts["block 5: 4 → 2"] < lefts["block 6: 12 → 9"]


@pytest.mark.parametrize(
    ("name", "args", "grid"),
    [
        ("test_vit", {"num_classes": 0}, (4, 4)),
        ("test_vit2", {}, (4, 4)),
        ("test_vit3", {"num_classes": 0}, (4, 4)),
        ("test_vit", {"class_token": False, "global_pool": "avg"}, (4, 4)),
        ("test_vit", {"img_size": (64, 32)}, (4, 2)),
        ("test_vit", {"in_chans": 1}, (4, 4)),
        ("test_vit", {"dynamic_img_size": True}, (4, 4)),
    ],
    ids=["no head", "no class token", "attention pool", "average pool", "not square", "grey", "dynamic size"],
)
@pytest.mark.parametrize("method", ["bat", "topk"])
def test_every_kind_of_model(
    name: str, args: dict[str, Any], grid: tuple[int, int], method: str, photos: list[Path]
) -> None:
    found = draw(small(name, args, method=method, layers=(2, 4)), photos[:1], attention=True)
    patches = grid[0] * grid[1]
    assert captions(found)[:2] == [f"image: {patches} patches", f"block 2: {patches} → {patches // 2}"]


def test_a_dynamic_model_takes_images_of_any_size_as_bytes() -> None:
    model = small("test_vit", {"dynamic_img_size": True, "dynamic_img_pad": True})
    pixels = torch.randint(0, 256, (1, 3, 40, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = draw(model, pixels)
    assert captions(found)[:2] == ["image: 18 patches", "block 2: 18 → 9"]  # 3 rows, the last filled in half, of 6
    assert found.views[0].image == "0"


def test_nothing_reduced_is_the_image_alone(photos: list[Path]) -> None:
    found = draw(small(keep=1.0), photos[:1])
    assert captions(found) == ["image: 16 patches"]
    assert found.views[0].stages == ()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_files_are_the_same_each_time(form: str, start: bytes, photos: list[Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        draw({"a": small(), "b": small()}, photos, attention=True).save(tmp_path / f"{name}.{form}")
    content = (tmp_path / f"one.{form}").read_bytes()
    assert content.startswith(start)
    assert content == (tmp_path / f"two.{form}").read_bytes()
    assert b"/Type3" not in content


def test_the_pixels_of_a_png_are_those_of_the_picture(photos: list[Path], tmp_path: Path) -> None:
    found = draw(small(), photos[:1])
    path = found.save(tmp_path / "tokens.PNG")
    written = np.asarray(Image.open(path).convert("RGB"))
    assert written.shape == found.pixels.shape
    layout = grid.Layout(1, 1, 3, 128, 128)
    top, left = layout.panel_at(0, 0, 0)
    assert np.array_equal(panel(replace(found, pixels=written), layout, 0, 0, 2), panel(found, layout, 0, 0, 2))
    # Above and below stand the texts, in black.
    for lines in (slice(0, top - 2), slice(top + 130, layout.size[0])):
        assert (found.pixels[lines] == 255).all()
        assert written[lines].min() < 60


def test_a_file_is_replaced_only_when_told_to(photos: list[Path], tmp_path: Path) -> None:
    found, path = draw(small(), photos[:1]), tmp_path / "tokens.png"
    path.write_text("before")
    with pytest.raises(ArtifactError) as caught:
        found.save(path)
    assert str(caught.value) == f"{path} exists; add `force=True` to replace it, or give another `path`"
    assert path.read_text() == "before"
    found.save(path, force=True)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3


def test_an_ending_that_says_nothing() -> None:
    with pytest.raises(UsageError) as caught:
        check_output("a.b/tokens.jpg", force=True)
    assert str(caught.value) == (
        "a.b/tokens.jpg ends in none of .png, .pdf and .svg, which say what to write; type `path='a.b/tokens.png'`"
    )


@pytest.mark.parametrize("args", [{"img_size": 96}, {"patch_size": 8}])
def test_models_that_take_other_images_are_not_drawn_together(args: dict[str, Any], photos: list[Path]) -> None:
    with pytest.raises(UsageError) as caught:
        draw({"one": small(), "other": small(timm_args=args)}, photos)
    assert str(caught.value) == (
        "one and other prepare images or cut them into patches in different ways, and one picture shows one way; draw "
        "them one by one"
    )


def test_a_model_that_is_not_compressed(photos: list[Path]) -> None:
    with pytest.raises(UsageError) as caught:
        draw(small().model, photos)
    assert str(caught.value) == (
        "draw takes a compressed model, and this VisionTransformer is none; type `model = tokencut.compress(model, "
        "keep=0.7)` and then tokencut.draw(model, ...)"
    )


def test_one_path_is_one_image(photos: list[Path]) -> None:
    assert [view.image for view in draw(small(), str(photos[0])).views] == [str(photos[0])]


def test_a_tensor_that_is_not_of_bytes() -> None:
    with pytest.raises(UsageError) as caught:
        draw(small(), torch.rand(3, 64, 64))
    assert str(caught.value) == (
        "a tensor of images is of bytes (B, C, H, W), not torch.float32 of 3 dimensions; give the files' paths "
        "instead, or images.to(torch.uint8)"
    )


def test_nothing_to_draw(photos: list[Path]) -> None:
    with pytest.raises(UsageError, match="no image given to draw; name one, such as photo.jpg, or the word digits"):
        draw(small(), [])
    with pytest.raises(UsageError, match="no model given to draw; give one, or several by name"):
        draw({}, photos)


def test_without_matplotlib_one_line_says_what_to_type(photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TokencutError) as caught:
        draw(small(), photos)
    assert str(caught.value) == "pictures need matplotlib, which is not installed; type pip install 'tokencut[plot]'"


def test_a_users_own_settings_of_matplotlib_change_nothing(photos: list[Path], tmp_path: Path) -> None:
    import matplotlib

    found = draw(small(), photos[:1])
    found.save(tmp_path / "one.png")
    odd = {"savefig.bbox": "tight", "savefig.facecolor": COLOURS[0], "image.interpolation": "bilinear"}
    with matplotlib.rc_context(odd):
        found.save(tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_row_says_what_the_model_takes_the_image_for(photos: list[Path]) -> None:
    model = small()
    model.model.pretrained_cfg = {**model.model.pretrained_cfg, "label_names": ["ant, pismire", "bee", "cat"]}
    told = predict(model, photos, workers=0, device="cpu", top=1).predictions
    found = draw({"a": model, "b": model}, photos, device="cpu")
    for view, of_image in zip(found.views, (told[0], told[0], told[1], told[1]), strict=True):
        assert view.predicted is not None
        assert view.predicted.label == of_image.top[0].label
        assert view.predicted.probability == pytest.approx(of_image.top[0].probability, abs=1e-5)
    best = told[0].top[0]
    shown = f"{best.label.partition(',')[0]} ({100 * best.probability:.0f} %)"
    assert titles(draw(model, photos[0], device="cpu")) == [f"1.jpg – {shown}"]
    assert titles(found)[:3] == ["1.jpg", f"a – {shown}", f"b – {shown}"]


def test_a_model_without_a_head_says_nothing_and_one_without_numbers_is_refused(photos: list[Path]) -> None:
    headless = draw(small(timm_args={"num_classes": 0}), photos[0], device="cpu")
    assert headless.views[0].predicted is None
    assert titles(headless) == ["1.jpg"]
    broken = small()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        draw(broken, photos[0], device="cpu")
