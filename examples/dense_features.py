"""A compressed model as the backbone of a segmentation head: how near are its feature maps to the dense model's?

    python examples/dense_features.py
    python examples/dense_features.py digits --keep 0.5 --method topk --blocks 5 8 11
    python examples/dense_features.py out.safetensors photo.jpg other.jpg
    python examples/dense_features.py deit_tiny photo.jpg --keep 0.7

`tokencut.features_only` stands in for `timm.create_model(..., features_only=True)`: the same module, arguments and
shapes, with the tokens un-merged to the full grid. For some blocks the script prints the cosine similarity of both
models' maps, averaged over patches and images. Then it fits a segmentation head (one 1 x 1 convolution) to the dense
model's maps, and gives it the compressed model's instead, without fitting it again. The head is to tell pixels that are
brighter than their image's average: a stand-in that needs no labels, for your own head and masks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokencut
from tokencut.cost import total
from tokencut.data import digits
from tokencut.data.preprocessing import UnreadableImageError, decode, preprocessing_of
from tokencut.errors import DataError, TokencutError
from tokencut.methods import methods
from tokencut.model import CompressedModel, predicted_macs
from tokencut.models.loading import load_model


class SegmentationHead(nn.Module):
    """One 1 x 1 convolution over all maps together, enlarged to the size of the images."""

    def __init__(self, channels: Sequence[int], classes: int, patch: int) -> None:
        """Builds the head from what a backbone's `feature_info` says.

        Args:
            channels: Channels of each map.
            classes: Classes to tell apart.
            patch: Px to a patch.
        """
        super().__init__()
        self.classify = nn.Conv2d(sum(channels), classes, kernel_size=1)
        self.patch = patch

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits `(B, classes, H, W)` from maps `(B, D, rows, columns)`."""
        logits = self.classify(torch.cat(list(maps), 1))
        return F.interpolate(logits, scale_factor=self.patch, mode="bilinear")


def read_images(model: nn.Module, spec: str, paths: Sequence[Path], limit: int) -> Tensor:
    """Images as the model takes them, `(B, 3, H, W)`; `limit` of the bundled digits where none is named."""
    prepared = preprocessing_of(model)
    if paths:
        opened = []
        for path in paths:
            try:
                with path.open("rb") as file:
                    opened.append(decode(file, prepared.mode))
            except (OSError, UnreadableImageError) as error:
                reason = getattr(error, "strerror", None) or error
                raise DataError(f"cannot read {path} ({reason}); name an image file, such as photo.jpg") from error
    elif spec == "digits":
        opened = digits.images("test")[0][:limit]
    else:
        raise DataError(f"no image to show {spec}; name one behind it, such as photo.jpg")
    transform = prepared.transform()
    return prepared.normalise(torch.stack([torch.as_tensor(transform(image)) for image in opened]), torch.device("cpu"))


def bright_pixels(images: Tensor) -> Tensor:
    """Whether each pixel is brighter than its image's average, int64 `(B, H, W)`."""
    grey = images.mean(1)
    return (grey > grey.mean((1, 2), keepdim=True)).long()


def fit(head: nn.Module, maps: Sequence[Tensor], target: Tensor, steps: int) -> None:
    """Trains a head on given maps."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(maps), target).backward()
        optimizer.step()


def similarity(maps: Tensor, others: Tensor) -> float:
    """Cosine similarity of `(B, D, rows, columns)`, averaged over patches and images."""
    return float(F.cosine_similarity(maps, others, dim=1).mean())


def at_least(fewest: int) -> Callable[[str], int]:
    """What reads a whole number that is not too small."""

    def number(text: str) -> int:
        if int(text) < fewest:
            raise argparse.ArgumentTypeError(f"{text} is too few; give {fewest} or more")
        return int(text)

    return number


def parse() -> argparse.Namespace:
    """Reads the command line."""
    untrained = [name for name, method in methods(keeps_grid=False).items() if not method.needs_training]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits", help="a tokencut file, a timm name, digits (the default)")
    parser.add_argument("images", nargs="*", type=Path, help="image files; digits come with the bundled model")
    parser.add_argument("--keep", type=float, help="0.7 where MODEL is not a tokencut file; else instead of its recipe")
    parser.add_argument("--method", choices=untrained, help="bat where MODEL is not a tokencut file")
    parser.add_argument("--blocks", type=int, nargs="+", help="blocks to take maps of, from 0 on; the last three")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights")
    parser.add_argument("--limit", type=at_least(2), default=100, help="so many of the digits")
    parser.add_argument("--steps", type=at_least(1), default=100, help="steps of fitting the head")
    parser.add_argument("--seed", type=int, default=0, help="for random weights and the head's first ones")
    return parser.parse_args()


def load_pair(args: argparse.Namespace) -> tuple[CompressedModel, CompressedModel]:
    """The model with nothing reduced, which runs as timm runs it, and the compressed one."""
    loaded = load_model(args.model, pretrained=not args.no_pretrained, seed=args.seed)
    if isinstance(loaded.model, CompressedModel) and args.keep is None and args.method is None:
        compressed = loaded.model
    else:
        keep = 0.7 if args.keep is None else args.keep
        compressed = tokencut.compress(loaded.dense, keep=keep, method=args.method or "bat")
    return tokencut.compress(loaded.dense, keep=1.0), compressed


def main() -> None:
    """Compares maps block by block, then what one head makes of both."""
    args = parse()
    dense, compressed = load_pair(args)
    blocks = tuple(args.blocks) if args.blocks else 3
    backbones = [tokencut.features_only(model, out_indices=blocks, norm=True) for model in (dense, compressed)]
    images = read_images(compressed, args.model, args.images, args.limit)
    with torch.no_grad():
        dense_maps, maps = (backbone(images) for backbone in backbones)

    before, after = (total(predicted_macs(model)) / 1e9 for model in (dense, compressed))
    recipe, info = compressed.recipe, backbones[1].feature_info
    print(f"{args.model}, {recipe.method}, keep {recipe.keep}: {after:.4g} of {before:.4g} GMACs; {len(images)} images")
    print("block  map             px to a patch  cosine similarity to dense")
    sides = zip(sorted(backbones[1].out_indices), info.reduction(), maps, dense_maps, strict=True)
    for block, reduction, each, other in sides:
        print(f"{block:<5}  {'x'.join(map(str, each.shape[1:])):<14}  {reduction:<13}  {similarity(each, other):.3f}")

    # Fitted to one half of the images and judged on the other; a single image is both.
    half, target = (len(images) + 1) // 2, bright_pixels(images)
    judged = slice(half, None) if len(images) > 1 else slice(None)
    torch.manual_seed(args.seed)
    head = SegmentationHead(info.channels(), 2, info.reduction()[0])
    fit(head, [each[:half] for each in dense_maps], target[:half], args.steps)
    with torch.no_grad():
        right = [float((head([each[judged] for each in side]).argmax(1) == target[judged]).double().mean())
                 for side in (dense_maps, maps)]  # fmt: skip
    print(f"a head fitted to the dense model's maps finds bright pixels: {100 * right[0]:.1f} % right from the dense "
          f"model's, {100 * right[1]:.1f} % from the compressed model's")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except TokencutError as error:
        raise SystemExit(f"error: {error}") from None
