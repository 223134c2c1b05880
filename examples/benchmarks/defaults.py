"""The table to decide bat's defaults by: a grid of its settings and the other methods, on training images only.

    python examples/benchmarks/run.py defaults local-dir:FOLDER --data train.tar --limit 5000
    python examples/benchmarks/run.py defaults digits --data digits --grid pairs=0,0.25 --methods evit --keep 0.5

Nothing is fine-tuned. For each setting and keep rate it prints top-1 in percent and, in brackets, the mean
Kullback-Leibler divergence KL(dense || compressed) of the predicted classes, in thousandths of a nat. Top-1 on images
that a model was trained on says little, as it knows most of them; the divergence needs no labels, and sees changes that
leave the first class in its place. Lines come in the order of the divergence averaged over the keep rates, best first.
The last two columns hold both minus those of `bat` as it is, averaged over the keep rates image by image and paired
over the images, with their standard errors.

`--data` takes a folder with one sub-folder a class, a `.tar` or `.tar.gz` of one, or `digits`, the training part of the
bundled digits. Never point it at images that results will be reported on.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jobs import Lines
from options import TRAINING_IMAGES, image_parser
from torch import Tensor, nn

from tokencut import compress
from tokencut.data.image_set import open_images
from tokencut.data.sources import open_source
from tokencut.evaluation.statistics import mean_and_error, paired_difference
from tokencut.methods import methods
from tokencut.model import CompressedModel
from tokencut.models.loading import load_model
from tokencut.runtime.devices import inference_state, resolve_device

GRID = [
    "neighbours=3,5",
    "mass=0,0.125",
    "features=unit,normed,tokens,keys",
    "balance=0.35,0.5",
    "keep_norm=true,false",
    "weights=size,attention",
]
KEEPS = [0.7, 0.5, 0.3, 0.2]


@dataclass
class Setting:
    """A line of the table: a method with settings, and what each image gave at each keep rate.

    Attributes:
        method: Its name.
        options: Its settings.
        prop_attn: Whether attention is proportional; the method's default where None.
        layers: Blocks that reduce; the default where None.
        right: Whether top-1 is right, `(images,)` for each keep rate.
        divergence: From the dense model, in thousandths of a nat, `(images,)` for each keep rate.
    """

    method: str
    options: dict[str, str]
    prop_attn: bool | None = None
    layers: Sequence[int] | str | None = None
    right: list[Tensor] = field(default_factory=list)
    divergence: list[Tensor] = field(default_factory=list)

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.options.items()]
        weighed = [] if self.prop_attn is None else ["--prop-attn" if self.prop_attn else "--no-prop-attn"]
        return " ".join([self.method, *words, *weighed])


def settings(grid: Sequence[str], others: Sequence[str], method: str = "bat") -> Iterator[Setting]:
    """bat as it is and as in the paper, every point of the grid, each with proportional attention and without it.

    Args:
        grid: Settings and their values, as `neighbours=3,5`.
        others: Further methods.
        method: The method whose settings the grid combines.
    """
    yield Setting("bat", {})
    yield Setting("bat", {"preset": "paper"}, prop_attn=False)
    axes = [axis.partition("=") for axis in grid]
    for values in itertools.product(*(choices.split(",") for _, _, choices in axes)):
        options = dict(zip((key for key, _, _ in axes), values, strict=True))
        yield Setting(method, options, prop_attn=True)
        yield Setting(method, options, prop_attn=False)
    for method in others:
        yield Setting(method, {})


def log_probabilities(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Log-probabilities of the classes, `(images, classes)`."""
    traced = isinstance(model, CompressedModel)  # methods on trial may look at the source map
    outputs = (model.trace(batch)[0] if traced else model(batch) for batch in batches)
    return torch.cat([F.log_softmax(output.float(), dim=1) for output in outputs])


def load_images(dense: nn.Module, args: argparse.Namespace, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """The training images in normalised batches, and their classes."""
    source = open_source(args.data, split="train", observer=Lines())
    images = open_images(dense, source, limit=args.limit)
    loaded = [batch for batch in images.batches(args.batch_size) if len(batch)]
    batches = [images.prepared.normalise(batch.images, device) for batch in loaded]
    return batches, torch.cat([batch.targets for batch in loaded]).to(device)


def judge(
    setting: Setting, keep: float, dense: nn.Module, batches: Sequence[Tensor], truth: Tensor, wanted: Tensor
) -> None:
    """Adds what a setting comes to at a keep rate; `wanted` holds the dense model's log-probabilities."""
    model = compress(
        dense, keep=keep, layers=setting.layers, method=setting.method, method_options=setting.options,
        prop_attn=setting.prop_attn,
    )  # fmt: skip
    found = log_probabilities(model, batches)
    setting.right.append((found.argmax(dim=1) == truth).cpu())
    setting.divergence.append(1000 * F.kl_div(found, wanted, log_target=True, reduction="none").sum(dim=1).cpu())


def report(table: Sequence[Setting], keeps: Sequence[float]) -> str:
    """The table in Markdown, the smallest mean divergence first; differences are to its first line as given."""
    rates = " | ".join(f"keep {keep:g}" for keep in keeps)
    first = table[0]
    lines = [
        f"| setting | {rates} | mean | top-1 minus {first} | divergence minus {first} |",
        "|---" * (len(keeps) + 4) + "|",
    ]
    for row in sorted(table, key=lambda row: float(torch.stack(row.divergence).mean())):
        right, divergence = torch.stack(row.right), torch.stack(row.divergence)
        means = (100 * right.float().mean(), divergence.mean())
        pairs = [*zip(100 * right.float().mean(1), divergence.mean(1), strict=True), means]
        cells = [f"{top1:.2f} ({kl:.1f})" for top1, kl in pairs]
        if row is not first:
            more = (divergence - torch.stack(first.divergence)).mean(0)
            mean, error = mean_and_error(more)
            cells += [str(paired_difference(right.tolist(), torch.stack(first.right).tolist())),
                      f"{mean:+.2f} ± {error:.2f}"]  # fmt: skip
        else:
            cells += ["", ""]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(grid: Sequence[str] = GRID) -> argparse.Namespace:
    """Reads the command line; `grid` is the default of its option."""
    known = [name for name, method in methods(keeps_grid=False).items() if not method.needs_training and name != "bat"]
    parser = image_parser(__doc__, data=TRAINING_IMAGES, limit=5000, batch_size=100)
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--grid", nargs="*", default=list(grid), metavar="KEY=V,V", help="settings to combine")
    parser.add_argument("--methods", nargs="*", default=known, choices=known, help="the other methods")
    return parser.parse_args()


def main() -> None:
    """Judges every setting at every keep rate, and prints the table."""
    judge_grid("bat", parse())


@torch.no_grad()
def judge_grid(method: str, args: argparse.Namespace) -> None:
    """Judges every setting of a method at every keep rate, and prints the table."""
    dense, device = load_model(args.model).dense, resolve_device(args.device)
    batches, truth = load_images(dense, args, device)
    table = list(settings(args.grid, args.methods, method))
    with inference_state(dense, device):
        wanted, started = log_probabilities(dense, batches), time.monotonic()
        top1 = 100 * (wanted.argmax(dim=1) == truth).float().mean().item()
        print(f"{args.model}, {len(truth):,} training images of {args.data}: dense top-1 {top1:.2f} %", flush=True)
        for done, setting in enumerate(table, start=1):
            for keep in args.keep:
                judge(setting, keep, dense, batches, truth, wanted)
            left = (time.monotonic() - started) / done * (len(table) - done)
            print(f"{done} of {len(table)}, {left / 60:.1f} min left: {setting}", flush=True)
    print(report(table, args.keep))
