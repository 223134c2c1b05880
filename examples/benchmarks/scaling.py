"""What does it cost to see more? Dense and compressed models against the number of tokens, stages and whole.

    python examples/benchmarks/run.py scaling --threads 2 --plot scaling.png
    python examples/benchmarks/run.py scaling --model deit_small_patch16_224 \\
        --device cuda --precision bf16 --batch-size 16

The model is built for each image size (224 px is 196 tokens at patch 16, 1024 px is 4,096), with random weights: costs
do not depend on them. Each compressed model is timed in turns with timm's dense one of the same size, with fused
attention. Linear layers grow with the tokens; attention grows with their square, and so do stages that compare all
tokens with each other: `stages` is their share of the forward, measured, beside the multiply-adds that they add. `peak`
is the memory held at the peak of a forward, weights included: on a CPU the results of all operators for as long as they
live, on a GPU what its allocator held (all models of that size are there). Other columns as in `speed`.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from timing import EAGER, add_run_options, in_turns, prepared, timed_table
from timing_table import BESIDE_DENSE, Columns, Row, plus_minus
from torch import nn

from tokencut.methods import methods
from tokencut.model import compress
from tokencut.profiling.measuring import random_images
from tokencut.runtime import extras
from tokencut.runtime.devices import resolve_device
from tokencut.visualization.plots import COLOURS, MARKERS, PNG_DPI, SIZE_IN, STYLE

SIZES = [224, 384, 512, 768, 1024]
COLUMNS: Columns = {
    "tokens": lambda row: f"{row.tokens:,}",
    "model": lambda row: row.model,
    "GMACs": lambda row: f"{row.gmacs:.3f}",
    "stage GMACs": lambda row: "" if row.stage_share is None else f"{row.stage_gmacs:.3f}",
    "ms an image": lambda row: f"{row.ms / row.batch:.2f}",
    "±": plus_minus,
    **BESIDE_DENSE,
    "peak, MiB": lambda row: "" if row.memory_mib is None else f"{row.memory_mib:,.0f}",
}


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm name that takes img_size")
    parser.add_argument("--size", type=int, nargs="+", default=SIZES, help="of the images, in px")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--methods", nargs="+", default=["bat"], choices=sorted(methods()))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw milliseconds against tokens")
    add_run_options(parser, rounds=7, max_seconds=30.0)
    return parser.parse_args()


def models_of(size: int, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The dense model for images of a size, and one compressed by each method."""
    torch.manual_seed(0)
    dense = timm.create_model(args.model, pretrained=False, img_size=size).eval()
    reduced = {f"{of} {args.keep:g}": compress(dense, keep=args.keep, method=of) for of in args.methods}
    return {name: prepared(model, args) for name, model in ({"dense": dense} | reduced).items()}


def measured(args: argparse.Namespace, note: Callable[[str], None]) -> Iterator[Row]:
    """The dense model's row and the others', size by size; goes on where one does not fit into memory."""
    device = resolve_device(args.device)
    for size in args.size:
        models = models_of(size, args)
        images = random_images(models["dense"], (args.batch_size, 3, size, size), device)
        yield from in_turns(f"{size} px", EAGER, models, models.__getitem__, images, args, note)


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draws milliseconds an image against tokens, each model a line and its stages a dashed one."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        axes = figure.add_subplot()
        for number, name in enumerate(dict.fromkeys(row.model for row in rows)):
            points = [row for row in rows if row.model == name]
            tokens, times = [row.tokens for row in points], [row.ms / row.batch for row in points]
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.plot(tokens, times, color=colour, marker=marker, label=name)
            staged = [(row.tokens, row.ms / row.batch * row.stage_share) for row in points if row.stage_share]
            if staged:
                places = zip(*staged, strict=True)
                axes.plot(*places, color=colour, marker=marker, linestyle=":", label=f"{name}, stages")
        ticks = sorted({row.tokens for row in rows})
        axes.set(xscale="log", yscale="log", xlabel="image tokens", ylabel="ms an image")
        axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
        axes.minorticks_off()
        figure.legend(loc="outside right center", frameon=False)
        figure.suptitle(textwrap.fill(title, 100), fontsize=6)
        figure.savefig(path, dpi=PNG_DPI)


def main() -> None:
    """Times everything, here or in several processes; prints the table and draws the plot."""
    args = parse()
    if args.plot:
        extras.require("the plots need", "matplotlib", extra="plot")
    batch = f", batch {args.batch_size}"
    title, rows = timed_table("scaling", args, COLUMNS, partial(measured, args), versions={}, more=batch)
    if args.plot and not args.rows_to:
        draw(rows, args.plot, title)
