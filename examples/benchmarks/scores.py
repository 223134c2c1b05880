"""Are a token's scores the same at every stage? How much they change from stage to stage, in the dense model.

    python examples/benchmarks/run.py scores local-dir:FOLDER --data VAL.tar --limit 1000

Scores of all image tokens at each of some blocks, before which no token has been taken: the class attention of that
block, the density that `bat` reads, and its score of a centre, density and separation together. For each pair of blocks
the rank correlation of the two rows of scores, and the share of the tokens in the better half at the first that are in
it at the second (0.5 by chance), each the mean over images and its standard deviation over them; and the same of two
images in one block, place by place, which would be 1 if scores depended on the place alone.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
from jobs import Lines
from options import IMAGES, image_parser
from tables import markdown
from torch import Tensor

from tokencut import compress
from tokencut.blocks import BlockLoop
from tokencut.data.image_set import open_images
from tokencut.methods import StageInput, make_method
from tokencut.methods.bat import Bat
from tokencut.models.loading import load_model
from tokencut.ops.density_peaks import peak_scores, squared_distances
from tokencut.runtime.devices import describe_device, inference_state, precision_dtype, resolve_device


def scores_of(seen: StageInput, rule: Bat) -> dict[str, Tensor]:
    """A stage's scores of its tokens, each `(B, N)`, higher for more."""
    points = seen.features("tokens").float()
    distances = squared_distances(points, cosine=True)
    centres, before = peak_scores(distances, torch.ones_like(distances[:, 0]), points.shape[2], rule.rule)
    nearest = distances.sort(2).values[:, :, : rule.neighbours].mean(2)
    return {
        "class attention": seen.attention.class_attention(),
        "density": -nearest,
        "score of a centre": torch.where(before == 0, centres, before * torch.inf),
    }


def along(loop: BlockLoop, pixels: Tensor, blocks: list[int], rule: Bat) -> list[dict[str, Tensor]]:
    """The scores at each of some blocks of the dense model."""
    tokens, found = loop.embed(pixels), []
    for number in range(1, max(blocks) + 1):
        if number in blocks:
            found.append(scores_of(loop.stage_input(number, tokens), rule))
        tokens = loop.step(number, tokens)
    return found


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation and share of the first's better half in the second's, `(2, B)`, of scores `(B, N)`."""
    one, other = (scores.argsort(dim=1, stable=True).argsort(1).double() for scores in (first, second))
    middle = (one.shape[1] - 1) / 2
    correlation = ((one - middle) * (other - middle)).mean(1) / (one - middle).square().mean(1)
    upper = one > middle
    return torch.stack((correlation, (upper & (other > middle)).sum(1) / upper.sum(1))).cpu()


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = image_parser(__doc__, data=IMAGES, limit=1000, batch_size=100)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 7, 10], help="1-based")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Compares the scores of every image, and prints the table."""
    args = parse()
    args.blocks.sort()
    dense, device = load_model(args.model).dense.float(), resolve_device(args.device)
    images = open_images(dense, args.data, limit=args.limit, observer=Lines())
    model, rule = compress(dense, keep=1.0), make_method("bat", {})
    assert isinstance(rule, Bat)
    dtype = precision_dtype(args.precision) or torch.float32
    pairs = [*pairwise(args.blocks), *([(args.blocks[0], args.blocks[-1])] if len(args.blocks) > 2 else [])]
    found: dict[tuple[str, str], list[Tensor]] = {}
    with inference_state(model, device, dtype):
        for batch in images.batches(args.batch_size, device=device):
            pixels = images.prepared.normalise(batch.images, device, dtype)
            at = dict(zip(args.blocks, along(model.loop, pixels, args.blocks, rule), strict=True))
            for name in at[args.blocks[0]]:
                for one, other in pairs:
                    found.setdefault((name, f"blocks {one} and {other}"), []).append(
                        agreement(at[one][name], at[other][name]))  # fmt: skip
                for block in args.blocks:  # sources are ordered by class: half a batch apart, classes differ
                    scores, where = at[block][name], f"block {block}, two images"
                    rolled = scores.roll(max(1, len(batch) // 2), 0)
                    found.setdefault((name, where), []).append(agreement(scores, rolled))
    print(f"{args.model}, {len(images):,} images of {args.data}, {args.precision}, on {describe_device(device)}\n")
    rows = []
    for (name, where), parts in found.items():
        every = torch.cat(parts, 1)
        cells = (f"{mean:.2f} ({apart:.2f})" for mean, apart in zip(every.mean(1), every.std(1), strict=True))
        rows.append((name, where, *cells))
    print(markdown(("score", "between", "rank correlation", "in both better halves"), rows))
