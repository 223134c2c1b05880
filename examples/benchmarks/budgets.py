"""Budgets per image: a keep rate for each image by a signal before its first stage, against one rate for all.

    python examples/benchmarks/run.py budgets local-dir:FOLDER --calibration TRAIN.tar.gz --data VAL.tar --held out.npz
    python examples/benchmarks/run.py budgets --held out.npz

Every image is run at every keep rate, in each of the surroundings of budget_images.py, and what came out is kept in
`--held`; without `--data` the tables are made of what is held. Levels, their limits and the sign of a signal are chosen
on calibration images, training ones, to diverge least from the dense model at a mean cost, of which the signal's own
cost is a part; images are judged on others. An image's level depends on nothing but the image. What one rate for all
would get at exactly the same mean cost is read off the line between the two nearest rates; differences are paired over
the images, all of one image's surroundings averaged first, with their standard error.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import budget_signals
import numpy as np
import torch
import torch.nn.functional as F
from budget_images import KINDS, InSurroundings
from budget_levels import at_cost, knowing
from jobs import Lines, say
from options import IMAGES, TRAINING_IMAGES
from tables import markdown
from torch import Tensor, nn

from tokencut import compress
from tokencut.data.image_set import ImageSet, images_for
from tokencut.data.labels import classes_for
from tokencut.data.loading import ImageDataset, make_loader
from tokencut.data.preprocessing import decode
from tokencut.data.sources import open_source
from tokencut.errors import DataError
from tokencut.evaluation.statistics import mean_and_error
from tokencut.model import CompressedModel, predicted_gmacs
from tokencut.models.loading import load_model
from tokencut.ops.spread import SPREAD_MACS
from tokencut.runtime.devices import describe_device, inference_state, precision_dtype, resolve_device
from tokencut.schedule import StagePlan
from tokencut.search.sorting import Floats, Whole, calibrated

RATES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0)
# Images whose pieces make a crowded ground.
OTHERS = 64
# How many matrices of products between all tokens a signal takes, by the first word of its name.
PRODUCTS = {"pixels": 0, "patches": 1, "tokens": 1, "attention": 0, "stage": 2, "all": 3}


@dataclass(frozen=True)
class Results:
    """What images got, in each of some surroundings.

    Attributes:
        correct: 1 where the class was right, `(kinds, rates, images)`.
        divergence: KL divergence of the class probabilities from the dense model's, in nats, likewise.
        signals: By name, `(kinds, images)`.
    """

    correct: Floats
    divergence: Floats
    signals: dict[str, Floats]

    def of(self, kinds: Sequence[int]) -> Results:
        """Those in some of the surroundings."""
        signals = {name: values[list(kinds)] for name, values in self.signals.items()}
        return Results(self.correct[list(kinds)], self.divergence[list(kinds)], signals)

    def flat(self, values: Floats) -> Floats:
        """Values of `(kinds, rates, images)` as `(rates, kinds * images)`."""
        return np.moveaxis(values, 0, 1).reshape(values.shape[1], -1)


class Bench:
    """A dense model, and the schedules that share its blocks before the first stage."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, resolve_device(args.device)
        dense: nn.Module = load_model(args.model).dense.float()
        compressed = [compress(dense, keep=rate, method=args.method) for rate in sorted(args.rates)]
        self.gmacs = [predicted_gmacs(model) for model in compressed]
        self.plans = [model.recipe.stages for model in compressed]
        self.model: CompressedModel = compressed[0]
        self.first = self.plans[0][0].block

    def product_gmacs(self) -> float:
        """What the products between all tokens of an image cost."""
        shape = self.model.adapter.cost(self.model.model)
        return shape.patches**2 * shape.blocks[self.first - 1].width / 1e9

    def images(self, data: str, split: str, limit: int | None) -> ImageSet:
        source = open_source(data, split=split, observer=Lines())
        return images_for(self.model.model, source, classes_for(self.model.model, source), limit=limit)

    def judged(self, images: ImageSet, others: Sequence[Any]) -> Results:
        """Runs images in all surroundings at all rates."""
        every = []
        for kind in KINDS:
            every.append(self._kind(images, InSurroundings(kind, images.prepared.transform(), others)))
            say(f"{kind}: {len(images):,} images of {images.name}")
        correct, divergence, signals = zip(*every, strict=True)
        named = {name: np.stack([one[name] for one in signals]) for name in signals[0]}
        return Results(np.stack(correct), np.stack(divergence), named)

    def _kind(self, images: ImageSet, transform: InSurroundings) -> tuple[Floats, Floats, dict[str, Floats]]:
        assert images.class_map is not None
        dataset = ImageDataset(images.source, transform, targets=images.class_map.targets, indices=images.indices,
                               mode=images.prepared.mode)  # fmt: skip
        loader = make_loader(dataset, batch_size=self.args.batch_size, workers=self.args.workers)
        dtype = precision_dtype(self.args.precision) or torch.float32
        found: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        with inference_state(self.model, self.device, dtype), torch.no_grad():
            for batch in loader:
                if batch.unreadable:
                    raise DataError(f"{images.filenames(batch.unreadable)[0]!r} cannot be decoded; leave it out")
                pixels = images.prepared.normalise(batch.images, self.device, dtype)
                found.append(self._batch(pixels, batch.targets.to(self.device)))
        correct, divergence = (torch.cat([one[part] for one in found], 1) for part in (0, 1))
        signals = {name: torch.cat([one[2][name] for one in found]).double().numpy() for name in found[0][2]}
        return correct.double().numpy(), divergence.double().numpy(), signals

    def _batch(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loop = self.model.loop
        embedded = loop.embed(pixels, source=True)
        entering = embedded
        for number in range(1, self.first):
            entering = loop.step(number, entering)
        logits = torch.stack([self._rest(entering, plans) for plans in self.plans])
        dense = self._rest(entering, ()).log_softmax(1)
        divergence = F.kl_div(logits.log_softmax(2), dense.expand_as(logits), reduction="none", log_target=True).sum(2)
        signals = budget_signals.of_image(loop, pixels, embedded, entering, self.first)
        return (logits.argmax(2) == targets).cpu(), divergence.cpu(), {name: s.cpu() for name, s in signals.items()}

    def _rest(self, tokens: Any, plans: Sequence[StagePlan]) -> Tensor:
        """Logits of tokens that enter the block of the first stage."""
        loop, budgets = self.model.loop, {plan.block: plan.tokens_out for plan in plans}
        for number in range(self.first, loop.depth + 1):
            tokens = loop.step(number, tokens, budgets.get(number))
        return loop.head(tokens).float()


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything, and gives what is to be held."""
    bench = Bench(args)
    training = bench.images(args.calibration, "train", args.images)
    judging = bench.images(args.data, "test", args.limit)
    others = [_picture(training, index) for index in list(training.indices)[:: max(1, len(training) // OTHERS)]]
    about = (f"{args.model}, {args.method}, {len(judging):,} images of {args.data}, calibrated on {len(training):,} of "
             f"{args.calibration}, {args.precision}, on {describe_device(bench.device)}")  # fmt: skip
    held: dict[str, Any] = {"about": about, "rates": sorted(args.rates), "gmacs": bench.gmacs,
                            "product_gmacs": bench.product_gmacs()}  # fmt: skip
    for name, images in (("calibration", training), ("judged", judging)):
        results = bench.judged(images, others)
        held[f"{name}.correct"] = results.correct == 1
        held[f"{name}.divergence"] = results.divergence.astype(np.float32)
        held |= {f"{name}.signal.{signal}": values.astype(np.float32) for signal, values in results.signals.items()}
    return held


def _picture(images: ImageSet, index: int) -> Any:
    file, _ = images.source[index]
    with file:
        return decode(file, images.prepared.mode, upright=False)


def results_of(held: dict[str, Any], part: str) -> Results:
    """The results that are held of calibration or judged images."""
    start = f"{part}.signal."
    signals = {name.removeprefix(start): held[name].astype(float) for name in held if name.startswith(start)}
    return Results(held[f"{part}.correct"].astype(float), held[f"{part}.divergence"].astype(float), signals)


class Comparison:
    """Ways to give images levels, against one level for all, at a mean cost on some of the surroundings."""

    def __init__(
        self, calibration: Results, judged: Results, costs: Floats, budget: float, product: float, most: int
    ) -> None:
        self.calibration, self.judged = calibration, judged
        self.costs, self.budget, self.product, self.most = costs, budget, product, most

    def row(self, name: str, levels: Whole, rates: str = "", signal: float = 0.0) -> tuple[Any, ...]:
        """A line of the table for the levels of all judged images, by a signal of some GMACs."""
        cost = self.costs[levels].mean() + signal
        cells: list[Any] = [name, f"{cost:.3f}"]
        for values, scale, digits in ((self.judged.correct, 100, 2), (self.judged.divergence, 1000, 1)):
            flat = self.judged.flat(values)
            here, fixed = flat[levels, np.arange(levels.size)], at_cost(flat, self.costs, cost)
            mean, error = mean_and_error(scale * (here - fixed).reshape(values.shape[0], -1).mean(0))
            cells += [f"{scale * here.mean():.{digits}f}", f"{mean:+.{digits}f} ± {error:.{digits}f}"]
        return (*cells, rates)

    def by_signal(self, name: str, rates: Sequence[float], calibration: Floats, judged: Floats) -> tuple[float, Any]:
        """A signal's loss on calibration images, and its line."""
        loss = self.calibration.flat(self.calibration.divergence)
        read = name.strip("*").partition(":")[0].partition(",")[0]
        cost = self.product * PRODUCTS[read] + (SPREAD_MACS / 1e9 if read in ("pixels", "all") else 0)
        rule = calibrated(calibration.ravel(), loss, self.costs, self.budget - cost, self.most)
        levels = rule(judged.ravel())
        used = ", ".join(f"{rates[level]:g} ({share:.0%})" for level, share in _shares(levels))
        return rule.loss, self.row(name, levels, used, cost)

    def fitted(self) -> tuple[Floats, Floats]:
        """What all signals together say: the logarithm of the divergence at the budget, by least squares."""
        level = int(np.argmin(np.abs(self.costs - self.budget)))
        points = [np.stack([np.ravel(part.signals[name]) for name in self.calibration.signals], 1)
                  for part in (self.calibration, self.judged)]  # fmt: skip
        mean, deviation = points[0].mean(0), points[0].std(0) + 1e-12
        first, second = (np.column_stack((np.ones(len(each)), (each - mean) / deviation)) for each in points)
        wanted = np.log(self.calibration.flat(self.calibration.divergence)[level] + 1e-4)
        weights = np.linalg.lstsq(first, wanted, rcond=None)[0]
        return first @ weights, second @ weights

    def by_kind(self) -> Whole:
        """One level for each of the surroundings, told which is which; chosen on calibration images."""
        loss = self.calibration.divergence.mean(2)
        kinds = range(loss.shape[0])
        choices = itertools.product(range(len(self.costs)), repeat=len(kinds))
        within = [chosen for chosen in choices if self.costs[list(chosen)].mean() <= self.budget + 1e-9]
        best = min(within, key=lambda chosen: sum(loss[kind, level] for kind, level in zip(kinds, chosen, strict=True)))
        return np.repeat(best, self.judged.correct.shape[2])

    def rows(self, rates: Sequence[float]) -> list[tuple[Any, ...]]:
        """The table: every signal, the best on calibration images first, then what is told more than a signal knows."""
        signals = {name: (values, self.judged.signals[name]) for name, values in self.calibration.signals.items()}
        told = [self.by_signal(name, rates, *both) for name, both in {**signals, "all, fitted": self.fitted()}.items()]
        taken, kinds = "pixels: spread", self.by_kind()
        shuffled = np.random.default_rng(0).permuted(self.judged.signals[taken].ravel())
        mistaken = self.by_signal(f"*{taken}, of another image*", rates, self.calibration.signals[taken], shuffled)
        known = ", ".join(f"{rates[level]:g}" for level in kinds[:: self.judged.correct.shape[2]])
        divergence, wrong = self.judged.flat(self.judged.divergence), 1 - self.judged.flat(self.judged.correct)
        return [
            *(row for _, row in sorted(told, key=lambda pair: pair[0])),
            mistaken[1],
            self.row("*told its surroundings*", kinds, known),
            self.row("*told its divergence*", knowing(divergence, self.costs, self.budget)),
            self.row("*told its answer*", knowing(wrong, self.costs, self.budget)),
        ]


def _shares(levels: Whole) -> list[tuple[int, float]]:
    numbers, counts = np.unique(levels, return_counts=True)
    return [(int(number), count / levels.size) for number, count in zip(numbers, counts, strict=True)]


def tables(held: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints what one rate gets in each of the surroundings, and a table for each budget."""
    rates, costs, product = held["rates"].tolist(), held["gmacs"].astype(float), float(held["product_gmacs"])
    calibration, judged = results_of(held, "calibration"), results_of(held, "judged")
    print(f"{held['about']}\n")
    alone = []
    for level, (rate, cost) in enumerate(zip(rates, costs, strict=True)):
        both = zip(100 * judged.correct.mean(2)[:, level], 1000 * judged.divergence.mean(2)[:, level], strict=True)
        alone.append((f"{rate:g}", f"{cost:.3f}", *(f"{top1:.2f}, {apart:.1f}" for top1, apart in both)))
    print(markdown(("keep", "GMACs", *(f"{kind}: top-1, KL" for kind in KINDS)), alone))
    head = ("level by", "GMACs", "top-1", "against one rate", "KL", "against one rate", "keep (images)")
    for kinds in ([0], range(len(KINDS))):
        for keep in args.keep:
            budget = float(costs[rates.index(keep)])
            comparison = Comparison(calibration.of(kinds), judged.of(kinds), costs, budget, product, args.levels)
            print(f"\n## {', '.join(KINDS[kind] for kind in kinds)}: the mean cost of keep {keep:g}\n")
            print(markdown(head, comparison.rows(rates)), flush=True)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="as every tokencut command takes it")
    parser.add_argument("--calibration", help=TRAINING_IMAGES)
    parser.add_argument("--data", help=f"images to judge by, none of those: {IMAGES}")
    parser.add_argument("--held", type=Path, required=True, help="a file for what was measured")
    parser.add_argument("--method", default="bat")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="keep rates that levels may have")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.7, 0.5], help="budgets: what these rates cost")
    parser.add_argument("--levels", type=int, default=4, help="how many there may be")
    parser.add_argument("--images", type=int, default=3000, help="calibration images")
    parser.add_argument("--limit", type=int, help="judge by a sample of so many images")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    args = parser.parse_args()
    if args.data and not (args.model and args.calibration):
        parser.error("--data needs a model and --calibration")
    return args


def main() -> None:
    """Measures where there is data, and prints the tables."""
    args = parse()
    if args.data:
        np.savez_compressed(args.held, **measured(args))
    with np.load(args.held) as held:
        tables(dict(held), args)
