"""What the tests of the reference models share: the arguments of a small run."""

from __future__ import annotations

import argparse
from pathlib import Path

from reference import augment, train

CLASSES = ("ant", "bee", "cat")
STILL = augment.Augmentation((1, 1), (1, 1), hflip=0, rotation=0, jitter=0, three=0, erasing=0)
TINY = "embed_dim=16,depth=3,num_heads=1"


def arguments(data: Path, output: Path, *words: str) -> argparse.Namespace:
    fixed = f"deit_tiny --train {data / 'train'} --val {data / 'val'} -o {output} --size 16 --stored 20 --batch 8 -j 0"
    return train.parse([*fixed.split(), "--model-kwargs", TINY, "--device", "cpu", "--epochs", "3", *words])
