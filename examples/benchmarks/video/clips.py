"""Writes clips of moving digits as video files, one folder a class: a stand-in for videos that can't be had here.

    python examples/benchmarks/run.py clips -o clips/            # clips/val (1,000 files) and clips/train (200)

Each clip shows two of scikit-learn's handwritten digits on a coloured ground under sensor noise. One moves, the other
stands still, and the class is the moving one and its direction: `3-left`. So there are 40 classes, no single frame
tells them apart, and most tubelets do not change, as before a camera on a tripod. Digits of the validation files are
those of the test part, which no training clip shows.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.data import digits

DIRECTIONS = ("right", "down", "left", "up")
CLASSES = tuple(f"{digit}-{direction}" for digit in digits.LABELS for direction in DIRECTIONS)
SIDE, FRAMES, RATE = 64, 32, 25


def inks(split: str) -> tuple[Tensor, Tensor]:
    """Ink of the digits of a split, `(N, 8, 8)` from 0 to 1, and which digit each is."""
    images, labels = digits.images(split)
    ink = np.stack([np.asarray(image)[..., 0] for image in images])
    return torch.from_numpy(ink).float() / 255, torch.tensor(labels)


def render(moving: Tensor, still: Tensor, direction: Tensor, frames: int, rng: torch.Generator) -> Tensor:
    """Clips of one digit that moves and one that does not, on the generator's device.

    Args:
        moving: Ink of the first, `(B, 8, 8)` from 0 to 1.
        still: Ink of the other, likewise.
        direction: Number in `DIRECTIONS`, `(B,)`.
        frames: Frames of a clip; however many, a digit goes equally far.
        rng: What is random is drawn from it.

    Returns:
        `(B, 3, frames, 64, 64)`, from 0 to 1.
    """
    count, device = len(moving), moving.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=rng, device=device)

    ground = F.interpolate(uniform(0.1, 0.6, 3, 4, 4), size=SIDE, mode="bicubic")
    ground = ground + F.interpolate(uniform(-0.08, 0.08, 3, 32, 32), size=SIDE, mode="bilinear")
    angle = direction * math.pi / 2 + uniform(-0.25, 0.25)
    heading = torch.stack((angle.cos(), angle.sin()), 1)
    way = torch.linspace(-0.5, 0.5, frames, device=device)[None, :, None] * uniform(14, 28, 1, 1)
    places = SIDE / 2 + uniform(-9, 9, 1, 2) + way * heading[:, None]
    stands = uniform(14, SIDE - 14, 1, 2).expand(-1, frames, -1)
    clips = ground[:, :, None].expand(-1, -1, frames, -1, -1)
    for ink, where in ((still, stands), (moving, places)):
        colour, side = uniform(0.75, 1.0, 3, 1, 1, 1), uniform(18, 28, 1)
        cover = _placed(ink, where, side)[:, None]
        clips = clips + cover * (colour - clips)
    noise = torch.randn(clips.shape, generator=rng, device=device) * uniform(0.005, 0.02, 1, 1, 1, 1)
    return (clips + noise).clamp(0, 1)


def _placed(ink: Tensor, where: Tensor, side: Tensor) -> Tensor:
    """Ink `(B, 8, 8)` drawn around places `(B, frames, 2)` at sizes `(B, 1)`, both in px: `(B, frames, 64, 64)`."""
    count, frames = where.shape[:2]
    pixel = torch.arange(SIDE, device=ink.device) + 0.5
    across, down = ((pixel - where[..., axis : axis + 1]) / (side[..., None] / 2) for axis in (0, 1))
    grid = torch.stack((across[:, :, None, :].expand(-1, -1, SIDE, -1), down[..., None].expand(-1, -1, -1, SIDE)), -1)
    drawn = F.grid_sample(ink.repeat_interleave(frames, 0)[:, None], grid.flatten(0, 1), align_corners=False)
    return drawn.view(count, frames, SIDE, SIDE)


def batch(ink: Tensor, label: Tensor, count: int, frames: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips of classes at random, and their classes' numbers: `(B, 3, frames, 64, 64)` from 0 to 1, `(B,)`."""
    first, second = (torch.randint(len(ink), (count,), generator=rng, device=ink.device) for _ in range(2))
    direction = torch.randint(len(DIRECTIONS), (count,), generator=rng, device=ink.device)
    return render(ink[first], ink[second], direction, frames, rng), label[first] * len(DIRECTIONS) + direction


def write(path: Path, clip: Tensor, quality: int = 20) -> None:
    """Writes a clip, `(3, frames, H, W)` from 0 to 1, as an H.264 file; a lower `quality` (its CRF) is a better one."""
    import av  # training needs no PyAV

    pixels = (clip * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": str(quality), "threads": "1"})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--val", type=int, default=1000, help="validation files; default 1000")
    parser.add_argument("--train", type=int, default=200, help="training files, to calibrate by; default 200")
    return parser.parse_args(words)


def main() -> None:
    """Writes the files."""
    args = parse()
    for split, part, count, seed in (("val", "test", args.val, 1), ("train", "train", args.train, 2)):
        ink, label = inks(part)
        rng = torch.Generator().manual_seed(seed)
        for name in CLASSES:
            (args.output / split / name).mkdir(parents=True)
        for number in range(count):
            clips, classes = batch(ink, label, 1, FRAMES, rng)
            write(args.output / split / CLASSES[int(classes)] / f"{number:04}.mp4", clips[0])
    print(f"wrote {args.val} + {args.train} clips of {FRAMES} frames to {args.output}")


if __name__ == "__main__":
    main()
