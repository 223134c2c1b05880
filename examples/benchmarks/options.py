"""The options of every script that judges a model by images."""

from __future__ import annotations

import argparse

# What `--data` takes.
IMAGES = "a folder with one sub-folder a class, a tar, or digits"
TRAINING_IMAGES = "training images: a folder, a tar, or digits"


def image_parser(about: str | None, *, data: str, limit: int | None, batch_size: int) -> argparse.ArgumentParser:
    """A parser that takes a model, images to judge it by, and where that runs.

    Args:
        about: What the script is for.
        data: What images are wanted.
        limit: The default sample; all images where None.
        batch_size: The default batch.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as every tokencut command takes it: a timm name, local-dir:FOLDER, digits")
    parser.add_argument("--data", required=True, help=data)
    parser.add_argument("--limit", type=int, default=limit, help="an evenly spread sample of so many")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--device", default="auto")
    return parser


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a script that can fine-tune each model before it is judged, several at the same time."""
    parser.add_argument("--train-data", help="fine-tune each by these images first")
    parser.add_argument("--jobs", type=int, default=1, help="fine-tunes at the same time")
    parser.add_argument("-j", "--workers", type=int, default=2, help="processes that load images, for each job")
