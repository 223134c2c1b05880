"""Small videos for tests: plain frames whose grey tells their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import timm
import torch

# The grey of a frame is its number times this: far enough apart to survive a codec.
STEP = 8


def write_video(path: Path, frames: int = 12, size: tuple[int, int] = (32, 32), codec: str = "mpeg4") -> Path:
    """A video of plain frames, the n-th of grey `8 n`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), STEP * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_videos(root: Path, classes: dict[str, list[int]]) -> Path:
    """A folder with one sub-folder a class, and in it a video for each number of frames."""
    for name, lengths in classes.items():
        for number, frames in enumerate(lengths, 1):
            write_video(root / name / f"{number}.mp4", frames)
    return root


def tiny_videomae(classes: int = 2, **more: Any) -> Any:
    """A model of clips of 4 frames of 16 px, in tubelets of 2 x 8 x 8: 8 tokens."""
    import tokencut.adapters  # noqa: F401  (gives timm the name)

    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "num_frames": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.create_model("videomae_small_patch16_224", num_classes=classes, **{**sizes, **more}).eval()
