"""Videos: which frames of a file a model sees, what cannot be decoded, and how folders of them are read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_folder
from PIL import Image
from timm.models import create_model
from torch import Tensor
from video_files import STEP, tiny_videomae, write_video, write_videos

from tokencut.data import videos
from tokencut.data.image_set import images_for, open_images
from tokencut.data.preprocessing import UnreadableImageError
from tokencut.data.sources import Subset, open_source
from tokencut.data.videos import Sampling, decode_clips
from tokencut.errors import DataError, TokencutError, UsageError


def plain(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image).transpose(2, 0, 1))


def numbers(clips: Tensor) -> list[list[int]]:
    """Which frame of its file each frame of each view is, by its grey."""
    return (clips[:, 0, :, 8, 8].float() / STEP).round().int().tolist()


@pytest.mark.parametrize(
    ("frames", "stride", "views", "count", "expected"),
    [
        (4, 2, 1, 12, [[2, 4, 6, 8]]),  # of 0 2 4 6 8 10 the middle
        (4, 2, 2, 12, [[0, 2, 4, 6], [4, 6, 8, 10]]),
        (2, 3, 3, 13, [[0, 3], [3, 6], [9, 12]]),  # of 0 3 6 9 12 those from 0, 1.5 and 3 on
        (4, 4, 1, 9, [[0, 4, 8, 8]]),
        (3, 1, 2, 1, [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_which_frames_are_seen(frames: int, stride: int, views: int, count: int, expected: list[list[int]]) -> None:
    sampling = Sampling(frames, stride, views)
    assert sampling.clips(count) == expected
    assert sampling.repeats(count) == any(len(set(clip)) < frames for clip in expected)


@pytest.mark.parametrize(("name", "value"), [("stride", 0), ("views", 0), ("views", 1.5), ("frames", 10**6)])
def test_numbers_that_no_sampling_has(name: str, value: float) -> None:
    with pytest.raises(UsageError, match="is not a whole number from 1"):
        Sampling(**{"frames": 4, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx"), ("a.mkv", "mpeg4")])
def test_the_frames_are_those_of_the_file(name: str, codec: str, tmp_path: Path) -> None:
    """Also where the header does not say how many there are, as in .webm and .mkv."""
    with write_video(tmp_path / name, 12, codec=codec).open("rb") as file:
        clips, short = decode_clips(file, Sampling(4, 2, 2), plain)
    assert (clips.shape, clips.dtype, short) == ((2, 3, 4, 32, 32), torch.uint8, False)
    assert numbers(clips) == [[0, 2, 4, 6], [4, 6, 8, 10]]


def test_a_header_that_counts_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "_stated_count", lambda file, av: 20)
    with write_video(tmp_path / "a.mp4", 8).open("rb") as file:
        clips, short = decode_clips(file, Sampling(4, 2), plain)
    assert numbers(clips) == [[0, 2, 4, 6]] and not short


def other_list(path: Path) -> bytes:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n".encode()


@pytest.mark.parametrize("kind", ["text", "nothing", "cut", "list of others", "sound alone"])
def test_what_cannot_be_decoded(kind: str, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", 12).read_bytes()
    sound = io.BytesIO()
    with videos_av().open(sound, "w", format="matroska") as container:
        container.add_stream("aac", rate=8000)
        container.start_encoding()
    content = {"text": b"no video" * 50, "nothing": b"", "cut": whole[: len(whole) // 2], "sound alone":
               sound.getvalue(), "list of others": other_list(tmp_path / "a.mp4")}[kind]  # fmt: skip
    with pytest.raises(UnreadableImageError) as caught:
        decode_clips(io.BytesIO(content), Sampling(4, 2), plain)
    assert "\n" not in str(caught.value) and "Errno" not in str(caught.value)


def videos_av() -> object:
    import av

    return av


def test_a_header_may_say_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Sampling(2, 3, 2).clips(10**12) == [[0, 3], [10**12 - 4, 10**12 - 1]]
    monkeypatch.setattr(videos, "LARGEST", 32 * 31)
    with write_video(tmp_path / "a.mp4", 4).open("rb") as file, pytest.raises(UnreadableImageError) as caught:
        decode_clips(file, Sampling(2, 1), plain)
    assert str(caught.value) == "frames of 32 x 32 px, which is more than 992 in all"


def test_a_folder_of_videos_is_a_source(tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "clips", {"left": [8, 8], "right": [8]})
    (folder / "left" / "thumbnail.jpg").write_bytes(b"")
    source = open_source(folder, frame_stride=2, views=3)
    assert (source.videos, source.holds, len(source), source.classes) == (True, "videos", 3, ("left", "right"))
    assert "files passed over for their extension: 1 ('left/thumbnail.jpg')" in source.notes
    assert (source.stride, source.views) == (2, 3)
    part = Subset(source, [2])
    assert (part.videos, part.stride, part.views) == (True, 2, 3)
    assert not open_source(write_folder(tmp_path / "images", ["a"], 2)).videos


def test_an_archive_of_videos(tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "clips", {"a": [8], "b": [8]})
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        archive.add(folder, arcname="clips")
    images = images_for(tiny_videomae(), open_source(tmp_path / "clips.tar", frame_stride=2))
    [batch] = images.batches(4, workers=0)
    assert (batch.images.shape, len(batch.views())) == ((2, 1, 3, 4, 16, 16), 1)
    assert numbers(batch.images[0]) == [[0, 2, 4, 6]]


def test_clips_are_prepared_frame_by_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "clips" / "a" / "1.mp4", 8, size=(48, 32))
    model = tiny_videomae()
    images = images_for(model, open_source(tmp_path / "clips", frame_stride=2))
    [batch] = images.batches(4, workers=0)
    [clips] = batch.views()
    pixels = images.prepared.normalise(clips, torch.device("cpu"))
    assert pixels.shape == (1, 3, 4, 16, 16) and model(pixels).shape == (1, 2)
    expected = (STEP * 4 / 255 - 0.485) / 0.229  # the third frame is the file's fifth
    assert pixels[0, 0, 2, 5, 5].item() == pytest.approx(expected, abs=0.1)


def test_too_short_and_unreadable_ones_are_told(tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "clips", {"a": [8, 3]})
    images = images_for(tiny_videomae(), open_source(folder, frame_stride=2))
    [batch] = images.batches(4, workers=0)
    assert batch.short == (1,)
    [note] = images.notes(short=batch.short)
    assert note == ("videos too short for a clip of 4 frames at a stride of 2, whose last frame was repeated: 1 of 2 "
                    "('a/2.mp4'); a smaller `frame_stride` fits them")  # fmt: skip
    (folder / "a" / "3.mp4").write_bytes(b"no video")
    images = images_for(tiny_videomae(), open_source(folder))
    [batch] = images.batches(4, workers=0)
    assert [image.index for image in batch.unreadable] == [2] and len(batch) == 2
    with pytest.raises(DataError, match=r"at least 1 of 3 videos in .*'a/3.mp4' \(Invalid data found"):
        images.check_unreadable(batch.unreadable)


def test_a_model_and_data_of_different_kinds(tmp_path: Path) -> None:
    clips = write_videos(tmp_path / "clips", {"a": [8], "b": [8]})
    images = write_folder(tmp_path / "images", ["a", "b"], 1)
    with pytest.raises(DataError, match=r"holds images, and the model takes clips of 4 frames; give a folder"):
        open_images(tiny_videomae(), images)
    with pytest.raises(DataError, match=r"holds videos, and the model takes images; .* frames by `frames=8`"):
        open_images(create_model("test_vit", num_classes=2), clips)
    with pytest.raises(UsageError, match=r"`views` says how clips are taken from videos, and .* holds images"):
        open_source(images, views=2)
    with pytest.raises(DataError, match=r"holds videos \('1.mp4'\) but not in class folders"):
        open_source(clips / "a")


def test_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_videos(tmp_path / "clips", {"a": [8], "b": [8]}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TokencutError, match=r"need av, which is not installed; type pip install 'tokencut\[video\]'"):
        images_for(tiny_videomae(), source)
