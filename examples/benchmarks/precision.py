"""Does half precision keep the same patches, and what does it cost beyond what it costs the dense model?

    python examples/benchmarks/run.py precision local-dir:FOLDER --data val.tar --limit 1000
    python examples/benchmarks/run.py precision deit_small --data /imagenet/val --device cuda --methods bat evit tome

Selection is made in fp32 whatever a model computes in, so on the same features it is the same. End to end the features
differ by then, as bf16 and fp16 round them in every block before. For each method, keep rate and precision (weights and
images are cast, as models are served) the table says

- `kept`: of the patches that are left behind the last stage in fp32, the share that stands in a token with the same
  first patch in half precision. For methods that drop tokens these are the patches kept in both;
- `together`: of the pairs of patches that share a token in either, the share that does in both; nothing to tell for
  methods that merge none;
- `lost`: the points of top-1 lost against the same model in fp32, less those that the dense model loses: the mean over
  the images, with its standard error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jobs import Lines
from options import IMAGES, image_parser
from torch import Tensor, nn

from tokencut import compress
from tokencut.data.image_set import HELD_BYTES, HeldBatches, open_images
from tokencut.data.preprocessing import preprocessing_of
from tokencut.evaluation.statistics import Difference, paired_difference
from tokencut.methods import methods
from tokencut.model import CompressedModel
from tokencut.models.loading import load_model
from tokencut.runtime.devices import describe_device, inference_state, precision_dtype, resolve_device

HALVES = ["bf16", "fp16"]
COLUMNS = ["method", "keep", "precision", "kept, %", "together, %", "dense lost", "lost beyond, points"]


@dataclass
class Judged:
    """One model in one precision, image by image.

    Attributes:
        right: Whether top-1 is right, `(B,)` a batch.
        source: The token of each patch behind the last stage, -1 where it was dropped, `(B, patches)` a batch.
    """

    right: list[Tensor] = field(default_factory=list)
    source: list[Tensor] = field(default_factory=list)

    def hits(self) -> Tensor:
        """1 or 0 for each image."""
        return torch.cat(self.right).double()


def judge(model: nn.Module, images: HeldBatches, device: torch.device, precision: str) -> Judged:
    """Runs a model over all images in a precision."""
    found, dtype, prepared = Judged(), precision_dtype(precision), preprocessing_of(model)
    with inference_state(model, device, dtype):
        for batch in images:
            if not len(batch):
                continue
            pixels = prepared.normalise(batch.images, device, dtype or torch.float32)
            if isinstance(model, CompressedModel):
                logits, traces = model.trace(pixels)
                source = traces[-1].tokens.source
                assert source is not None
                found.source.append(source.cpu())
            else:
                logits = model(pixels)
            found.right.append(logits.argmax(1).cpu() == batch.targets)
    return found


def first_patches(source: Tensor) -> Tensor:
    """For each patch the lowest patch in its token, `(B, patches)`; -1 where it was dropped."""
    count = source.shape[1]
    places = torch.arange(count).expand_as(source)
    slot = torch.where(source < 0, count, source)
    first = torch.full((source.shape[0], count + 1), count).scatter_reduce(1, slot, places, "amin")
    return torch.where(source < 0, -1, first.gather(1, slot))


def kept_overlap(full: Tensor, half: Tensor) -> float:
    """The share of the patches left in `full` whose token has the same first patch in `half`."""
    left = full >= 0
    return float((first_patches(full) == first_patches(half))[left].double().mean())


def together_overlap(full: Tensor, half: Tensor) -> float | None:
    """Pairs of patches that share a token in both, over those that do in either; None where there is no such pair."""
    both = either = 0
    for one, other in zip(full, half, strict=True):
        pairs = [(s.unsqueeze(0) == s.unsqueeze(1)).triu(1) & (s >= 0).unsqueeze(0) for s in (one, other)]
        both += int((pairs[0] & pairs[1]).sum())
        either += int((pairs[0] | pairs[1]).sum())
    return both / either if either else None


def lost_beyond(full: Judged, half: Judged, dense_full: Judged, dense_half: Judged) -> Difference:
    """Points of top-1 lost beyond the dense model's loss, with the standard error over the images."""
    return paired_difference((full.hits() - half.hits()).tolist(), (dense_full.hits() - dense_half.hits()).tolist())


def row(method: str, keep: float, precision: str, full: Judged, half: Judged, dense: Sequence[Judged]) -> str:
    """A line of the table; `dense` in fp32 and in half."""
    sources = torch.cat(full.source), torch.cat(half.source)
    together = together_overlap(*sources)
    cells = [
        method,
        f"{keep:g}",
        precision,
        f"{100 * kept_overlap(*sources):.2f}",
        "" if together is None else f"{100 * together:.2f}",
        f"{100 * float((dense[0].hits() - dense[1].hits()).mean()):+.2f}",
        str(lost_beyond(full, half, *dense)),
    ]
    return f"| {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    """Reads the command line."""
    untrained = [name for name, method in methods(keeps_grid=False).items() if not method.needs_training]
    parser = image_parser(__doc__, data=IMAGES, limit=None, batch_size=50)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--methods", nargs="+", default=["bat", "evit", "tome"], choices=untrained)
    parser.add_argument("--precision", nargs="+", default=HALVES, choices=HALVES)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Judges every model in every precision, and prints the table line by line."""
    args = parse()
    dense, device = load_model(args.model).dense, resolve_device(args.device)
    images = open_images(dense, args.data, limit=args.limit, observer=Lines()).batches(
        args.batch_size, device=device, held_bytes=HELD_BYTES
    )
    untouched = {precision: judge(dense, images, device, precision) for precision in ["fp32", *args.precision]}
    hits = untouched["fp32"].hits()
    print(f"{args.model}, {len(hits):,} images of {args.data}: dense top-1 {100 * hits.mean():.2f} % in fp32, "
          f"on {describe_device(device)}\n")  # fmt: skip
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for method in args.methods:
        for keep in args.keep:
            model = compress(dense, keep=keep, method=method)
            full = judge(model, images, device, "fp32")
            for precision in args.precision:
                half = judge(model, images, device, precision)
                sides = untouched["fp32"], untouched[precision]
                print(row(method, keep, precision, full, half, sides), flush=True)
