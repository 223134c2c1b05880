"""Clips of video files: which frames of a file a model sees, and how they are decoded (by PyAV)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

from tokencut.data.preprocessing import Transform, UnreadableImageError
from tokencut.limits import check_number
from tokencut.runtime import extras

# What FFmpeg may take a file for, by its content: containers of their own. Left out are lists of other files (HLS,
# concat), by which a file could have others read.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,flv,mpeg,mpegvideo,mpegts,ogg,gif,m4v,h264,hevc,dv,mjpeg"

# Pixels of a frame; Pillow takes an image of more for a decompression bomb, too.
LARGEST = 2 * 89_478_485


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are its clips, as VideoMAE tests: every `stride`-th frame is looked at, and so many
    clips as there are views start at even distances among these, the first at the first and the last so that it ends
    with the last; one view stands in the middle. Where there are too few, the last one is repeated.

    Attributes:
        frames: Frames of a clip.
        stride: Frames of the video from one to the next.
        views: Clips of a video.

    Raises:
        UsageError: A number is out of range.
    """

    frames: int
    stride: int = 4
    views: int = 1

    def __post_init__(self) -> None:
        for name, value in (("frames", self.frames), ("frame_stride", self.stride), ("views", self.views)):
            check_number(name, value)

    def repeats(self, count: int) -> bool:
        """Whether a video of `count` frames is too short for a clip."""
        return -(-count // self.stride) < self.frames

    def clips(self, count: int) -> list[list[int]]:
        """The numbers of the frames of each view, of a video with `count` frames, at least one."""
        seen = -(-count // self.stride)  # the n-th of these is frame n times the stride
        room = max(seen - self.frames, 0)
        starts = [room // 2] if self.views == 1 else [view * room // (self.views - 1) for view in range(self.views)]
        return [[min(start + n, seen - 1) * self.stride for n in range(self.frames)] for start in starts]


def require_decoder(data: str) -> None:
    """Refuses videos where nothing can decode them.

    Args:
        data: What they are called.

    Raises:
        TokencutError: PyAV is not installed.
    """
    extras.require(f"the videos in {data!r} need", "av", extra="video")


def decode_clips(file: BinaryIO, sampling: Sampling, transform: Transform, mode: str = "RGB") -> tuple[Tensor, bool]:
    """Decodes what a model sees of a video.

    Args:
        file: The encoded video.
        sampling: Which of its frames.
        transform: From a frame to bytes `(C, H, W)`.
        mode: Pillow's mode of the frames that the transform takes.

    Returns:
        Bytes `(views, C, frames, H, W)`, and whether the video is too short for a clip.

    Raises:
        UnreadableImageError: It is damaged, holds no video, or is of a kind that is not taken.
    """
    import av

    try:
        count = _stated_count(file, av)
        found, reached = _decoded(file, sampling.clips(count), transform, mode, av)
        if reached < count:  # its header says more than there is
            count = reached
            found, _ = _decoded(file, sampling.clips(count), transform, mode, av)
    except UnreadableImageError:
        raise
    except Exception as error:  # FFmpeg's errors are of a dozen classes, and what PyAV makes of oddities of more
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(reason) from error
    views = [torch.stack([found[number] for number in clip], 1) for clip in sampling.clips(count)]
    return torch.stack(views), sampling.repeats(count)


def _opened(file: BinaryIO, av: Any) -> Any:
    file.seek(0)
    # A codec may log to stderr what the error says as well, or what decoding goes on in spite of.
    av.logging.set_level(None)
    return av.open(file, options={"format_whitelist": _CONTAINERS, "protocol_whitelist": ""}, metadata_errors="ignore")


def _video_in(container: Any) -> Any:
    stream = next(iter(container.streams.video), None)
    if stream is None:
        raise UnreadableImageError("no video in it")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > LARGEST:
        raise UnreadableImageError(f"frames of {width} x {height} px, which is more than {LARGEST:,} in all")
    stream.codec_context.thread_count = 1  # the processes that decode are as many as there are processors
    return stream


def _stated_count(file: BinaryIO, av: Any) -> int:
    """How many frames a video has by its header; where that does not say, by its packets, which takes no decoding."""
    with _opened(file, av) as container:
        stream = _video_in(container)
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if count < 1:
        raise UnreadableImageError("no frames in it")
    return int(count)


def _decoded(
    file: BinaryIO, clips: Sequence[Sequence[int]], transform: Transform, mode: str, av: Any
) -> tuple[dict[int, Tensor], int]:
    """The frames of some clips, transformed, by number; and how many there are, up to the last one wanted."""
    wanted = {number for clip in clips for number in clip}
    found: dict[int, Tensor] = {}
    last, reached = max(wanted), 0
    with _opened(file, av) as container:
        for frame in container.decode(_video_in(container)):
            if reached in wanted:
                image: Image.Image = frame.to_image()
                found[reached] = torch.as_tensor(transform(image if mode == "RGB" else image.convert(mode)))
            reached += 1
            if reached > last:
                return found, last + 1
    if not reached:
        raise UnreadableImageError("no frames in it")
    return found, reached
