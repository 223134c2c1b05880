"""A sweep's picture: which images and which keep rate, the same each time, and none rather than an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_files import write_folder
from observing import Seen

from tokencut.data.image_set import open_images
from tokencut.model import compress
from tokencut.sweeping.picture import SweepPicture, picture_of, tiles_of
from tokencut.visualization import drawing, grid
from tokencut.visualization.tiles import Tiles

pytest.importorskip("matplotlib")

CPU = torch.device("cpu")


@pytest.fixture
def model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("test_vit", img_size=64, num_classes=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of four images."""
    return write_folder(tmp_path / "set", ["ant", "bee", "cow"], 4)


def drawn(model: Any, folder: Path, limit: int | None = None, **how: Any) -> SweepPicture | None:
    keeps: tuple[Any, ...] = how.pop("keeps", (0.75, 0.5))
    recipes = {
        (method, keep): compress(model, keep=keep, method=method, layers=(2, 4)).recipe
        for keep in keeps
        for method in ("bat", "topk")
    }
    images = open_images(model, folder, limit=limit)
    return picture_of(model, recipes, images, device=CPU, precision="fp32", **how)


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "PANEL", 64)


def test_three_images_at_the_lowest_keep_with_the_methods_in_rows(model: Any, folder: Path) -> None:
    found = drawn(model, folder)
    assert found is not None
    assert (found.images, found.keep) == (("ant/1.jpg", "bee/1.jpg", "cow/1.jpg"), "0.5")
    assert [(view.image, view.model) for view in found.picture.views] == [
        (f"{folder}:{name}", method) for name in found.images for method in ("bat", "topk")
    ]
    assert [stage.tokens_out for stage in found.picture.views[0].stages] == [8, 4]
    again = drawn(model, folder)
    assert again is not None
    assert np.array_equal(found.picture.pixels, again.picture.pixels)


def test_of_rates_by_layer_the_lowest_mean_counts(model: Any, folder: Path) -> None:
    found = drawn(model, folder, keeps=(0.75, (0.9, 0.5)))
    assert found is not None
    assert found.keep == "0.9/0.5"


def test_images_are_those_that_are_judged(model: Any, folder: Path) -> None:
    found = drawn(model, folder, limit=2)
    assert found is not None
    assert found.images == ("ant/1.jpg", "bee/3.jpg")


def test_the_next_stands_in_for_one_that_cannot_be_read(model: Any, folder: Path) -> None:
    (folder / "bee" / "1.jpg").write_bytes(b"no image")
    found = drawn(model, folder)
    assert found is not None
    assert found.images == ("ant/1.jpg", "bee/2.jpg", "cow/1.jpg")


def test_too_large_a_picture_is_left_out_with_a_note(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "MOST_PIXELS", 1000)
    monkeypatch.setattr(grid, "TALLEST", 100)
    seen = Seen()
    assert drawn(model, folder, observer=seen) is None
    assert seen.notes[0].startswith("the report has no picture of tokens: a picture of 6 rows of 3 panels, each ")


def tiles(model: Any, folder: Path, **changes: Any) -> Tiles:
    recipes = {
        (method, keep): compress(model, keep=keep, method=method, layers=(2, 4), **changes).recipe
        for keep in (1.0, 0.5)
        for method in ("bat", "topk")
    }
    return tiles_of(model, recipes, open_images(model, folder), device=CPU, precision="fp32")


def test_tiles_show_each_row_behind_its_last_stage(model: Any, folder: Path) -> None:
    found = tiles(model, folder)
    assert found.names == ("ant/1.jpg", "bee/1.jpg", "cow/1.jpg")
    assert list(found.models) == ["bat, keep 1.0", "topk, keep 1.0", "bat, keep 0.5", "topk, keep 0.5"]
    whole, dropped = found.models["bat, keep 1.0"], found.models["topk, keep 0.5"]
    assert [(tile.tokens_in, tile.tokens_out) for tile in (whole[0], dropped[0])] == [(16, 16), (16, 4)]
    for photo, same, other in zip(found.photos, whole, dropped, strict=True):
        assert photo.shape == (288, 288, 3)
        assert np.array_equal(photo, same.pixels)
        # 4 of 16 patches, of 72 x 72 px, are as in the photo.
        assert np.isclose((photo == other.pixels).all(2).mean(), 4 / 16, atol=0.02)
    assert [panel.caption for panel in found.legend][-1] == "dark: dropped"


def test_a_page_with_very_many_rows_has_fewer_images(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for most, images in ((9, 2), (8, 2), (7, 1), (1, 1)):
        monkeypatch.setattr("tokencut.sweeping.picture.MOST_TILES", most)
        assert len(tiles(model, folder).photos) == images
