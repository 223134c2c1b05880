"""Where stages stand, at equal multiply-adds: early, late, even and gradual placements, on training images.

    python examples/benchmarks/run.py placements local-dir:FOLDER --data train.tar --layers 3,6,9 late gradual

Each placement gets the one keep rate at which it costs what blocks 4, 7 and 10 of 12 cost at `--keep`, or a little
less. Nothing is fine-tuned. For each it prints top-1 minus that of the default blocks and the divergence from the dense
model minus theirs, in thousandths of a nat, both paired over the images with their standard errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction

import torch
from defaults import Setting, judge, load_images, log_probabilities
from options import TRAINING_IMAGES, image_parser
from torch import nn

from tokencut import compress
from tokencut.cli.options import read_layers
from tokencut.evaluation.statistics import mean_and_error, paired_difference
from tokencut.model import predicted_gmacs
from tokencut.models.loading import load_model
from tokencut.runtime.devices import inference_state, resolve_device

KEEPS = [0.9, 0.8, 0.7, 0.6, 0.5]
COLUMNS = ("layers", "keep", "GMACs", "beside 4,7,10 of 12 at", "top-1 minus theirs", "divergence minus theirs")
LAYERS = ("3,6,9", "5,7,9", "5,8,11", "late", "7,9,11", "4,6,8,10", "5-9", "gradual", "5-11")
STEPS = 1000  # keep rates tried: a thousandth apart


def rate_for(dense: nn.Module, layers: Sequence[int] | str, gmacs: float, method: str) -> float:
    """The highest keep rate at which a placement costs no more."""
    low, high = 1, STEPS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if price(dense, layers, middle / STEPS, method) <= gmacs else (low, middle - 1)
    return float(Fraction(low, STEPS))


def price(dense: nn.Module, layers: Sequence[int] | str | None, keep: float, method: str) -> float:
    """Multiply-adds per image, in units of 1e9."""
    return predicted_gmacs(compress(dense, keep=keep, layers=layers, method=method))  # type: ignore[arg-type]


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = image_parser(__doc__, data=TRAINING_IMAGES, limit=5000, batch_size=100)
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS, help="of the default blocks")
    parser.add_argument("--layers", nargs="+", default=LAYERS, metavar="LAYERS", help="as the option of that name")
    parser.add_argument("--method", default="bat")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Judges every placement at every price, and prints the table line by line."""
    args = parse()
    dense, device = load_model(args.model).dense, resolve_device(args.device)
    batches, truth = load_images(dense, args, device)
    usual = Setting(args.method, {})
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    with inference_state(dense, device):
        wanted = log_probabilities(dense, batches)
        for at, keep in enumerate(args.keep):
            judge(usual, keep, dense, batches, truth, wanted)
            gmacs = price(dense, None, keep, args.method)
            alone = f"{usual.divergence[at].mean():.1f} in all"
            print(f"| 4,7,10 | {keep:g} | {gmacs:.3f} | {keep:g} | | {alone} |", flush=True)
            for text in args.layers:
                layers = read_layers(text)
                rate, other = rate_for(dense, layers, gmacs, args.method), Setting(args.method, {}, layers=layers)
                judge(other, rate, dense, batches, truth, wanted)
                ahead = paired_difference(other.right[0].tolist(), usual.right[at].tolist())
                mean, error = mean_and_error(other.divergence[0] - usual.divergence[at])
                cells = [text, f"{rate:g}", f"{price(dense, layers, rate, args.method):.3f}", f"{keep:g}", str(ahead),
                         f"{mean:+.1f} ± {error:.1f}"]  # fmt: skip
                print(f"| {' | '.join(cells)} |", flush=True)
