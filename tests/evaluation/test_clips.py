"""Models of clips are judged, asked and drawn as others are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from video_files import tiny_videomae, write_video, write_videos

import tokencut
from tokencut.data.image_set import images_for
from tokencut.data.sources import open_source
from tokencut.errors import DataError, UsageError
from tokencut.export.runtimes import open_exported
from tokencut.search.run import SearchSettings
from tokencut.sweeping.picture import tiles_of


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return write_videos(tmp_path / "clips", {"a": [12, 9], "b": [10]})


def test_the_mean_of_what_views_say(clips: Path) -> None:
    model, source = tokencut.compress(tiny_videomae(), keep=0.5, layers=[1, 2]), open_source(clips, frame_stride=1,
                                                                                             views=3)  # fmt: skip
    report = tokencut.evaluate(model, source, device="cpu", workers=0, batch_size=2)
    images = images_for(model, source)
    loss = right = 0.0
    for batch in images.batches(3, workers=0):
        with torch.no_grad():
            likely = sum(model(images.prepared.normalise(view, torch.device("cpu"))).softmax(1)
                         for view in batch.views()) / 3  # fmt: skip
        for row, target in zip(likely, (0, 0, 1), strict=True):
            loss -= math.log(row[target]) / 3
            right += float(row.argmax() == target)
    assert report.images == 3
    assert report.loss == pytest.approx(loss, rel=1e-5) and report.top1 == pytest.approx(100 * right / 3)
    one = tokencut.evaluate(model, open_source(clips, frame_stride=1), device="cpu", workers=0)
    assert one.loss != pytest.approx(report.loss, rel=1e-6)


def test_clips_decoded_in_further_processes(clips: Path) -> None:
    model, source = tiny_videomae(), open_source(clips, frame_stride=2)
    here, there = (tokencut.evaluate(model, source, device="cpu", workers=workers).loss for workers in (0, 2))
    assert here == there


def test_notes_of_an_evaluation(clips: Path) -> None:
    report = tokencut.evaluate(tiny_videomae(), clips, device="cpu", workers=0, limit=2)
    assert "an evenly spread sample of 2 of 3 videos" in report.notes
    assert any(note.startswith("videos too short for a clip of 4 frames at a stride of 4") for note in report.notes)


def test_a_prediction_and_a_picture(clips: Path, tmp_path: Path) -> None:
    model = tokencut.compress(tiny_videomae(), keep=0.5, layers=[1], method="tome")
    file = write_video(tmp_path / "one.mp4", 8)
    report = tokencut.predict(model, [file, clips], device="cpu", workers=0)
    assert [Path(one.image).name for one in report.predictions] == ["one.mp4", "1.mp4", "2.mp4", "1.mp4"]
    picture = tokencut.draw(model, file, device="cpu", frame_stride=2)
    [view] = picture.views
    assert (view.stages[0].tokens_in, view.stages[0].tokens_out) == (8, 4)
    height, width = picture.pixels.shape[:2]
    assert width > 900 and height > 900  # two panels of two frames, one below the other
    with pytest.raises(DataError, match="cannot be drawn: .*none.mp4' .does not exist"):
        tokencut.draw(model, tmp_path / "none.mp4", device="cpu")


@pytest.mark.slow
def test_fine_tuning_is_left_to_the_user(clips: Path) -> None:
    model = tokencut.compress(tiny_videomae(), keep=0.5, layers=[1])
    with pytest.raises(UsageError, match="fine-tuning reads images, and this model takes clips; train what"):
        tokencut.finetune(model, clips)


@pytest.mark.slow
def test_a_search_on_clips(clips: Path) -> None:
    model = tiny_videomae()
    dense = tokencut.profile(model, latency=False).dense.gmacs
    settings = SearchSettings(effort=3, images=3, workers=0, device="cpu")
    report = tokencut.find_schedule(model, clips, tokencut.Target(gmacs=0.8 * dense), settings=settings)
    assert report.found.gmacs <= 0.8 * dense and report.images == 3


def test_a_sweep_draws_clips(clips: Path) -> None:
    """Those that can be read, at its stride, which is a part of what it is resumed by."""
    (clips / "a" / "0.mp4").write_bytes(b"no video")
    model = tiny_videomae()
    recipe = tokencut.compress(model, keep=0.5, layers=[1], method="tome").recipe
    images = images_for(model, open_source(clips, frame_stride=2))
    tiles = tiles_of(model, {("tome", 0.5): recipe}, images, device=torch.device("cpu"), precision="fp32")
    assert tiles.names == ("a/1.mp4", "a/2.mp4", "b/1.mp4")
    assert [[tile.tokens_out for tile in row] for row in tiles.models.values()] == [[4, 4, 4]]
    digests = {images_for(model, open_source(clips, frame_stride=stride)).digest() for stride in (1, 2)}
    assert len(digests) == 2


@pytest.mark.slow
def test_an_exported_model_of_clips(clips: Path, tmp_path: Path) -> None:
    model = tokencut.compress(tiny_videomae(), keep=0.5, layers=[1], static_keep=0.75)
    report = tokencut.export_model(model, tmp_path / "m.onnx", data=open_source(clips, frame_stride=2))
    assert (report.info.frames, report.info.input_shape) == (4, (3, 4, 16, 16)) and report.agreement.images == 3
    exported = open_exported(tmp_path / "m.onnx")
    here, there = (tokencut.evaluate(each, clips, device="cpu", workers=0) for each in (model, exported))
    assert there.loss == pytest.approx(here.loss, rel=1e-4) and there.top1 == here.top1
    with pytest.raises(UsageError, match="timm has no models of clips"):
        tokencut.export_model(model, tmp_path / "folder", format="timm")
