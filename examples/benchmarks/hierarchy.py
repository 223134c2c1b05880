"""A hierarchical model with less work in its third stage: where, by what settings, and against plain averages.

    python examples/benchmarks/run.py hierarchy local-dir:FOLDER --data val.tar --layers 2 3 5 --keep 0.75 0.5
    python examples/benchmarks/run.py hierarchy local-dir:FOLDER --data train.tar.gz \\
        --vary method=window method=window+nearest=1 method=window+nearest=4      # to choose by, on training images
    python examples/benchmarks/run.py hierarchy local-dir:FOLDER --data val.tar --train-data train.tar.gz --jobs 5

Every point is the block where it begins, and a keep rate. At each stands the families' method as it comes, another one
or one of its settings (`--vary`), and the control: `window` with plain averages of cells, as of a pooled stage
(`clustering=pool`), or with a token of each, as of a strided one (`clustering=stride`), whichever is better. Each saves
its own share of multiply-adds at the same rate, which stands beside it. Differences of
top-1 are paired over the images, with their standard error: from the dense model, and from the control; the divergence
from the dense model is in thousandths of a nat. With `--vary` another table has each setting's divergence less that of
the first line, averaged over all points image by image.

`--train-data` fine-tunes each instead, as `compress --finetune-epochs` does, the dense model too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from defaults import load_images, log_probabilities
from jobs import STARTED, Lines, carried_out, say
from options import IMAGES, add_jobs, image_parser
from tables import hits, markdown
from torch import Tensor, nn
from tuning import loaded_once, tuned_and_judged

from tokencut import compress
from tokencut.data.sources import open_source
from tokencut.errors import TokencutError
from tokencut.evaluation.statistics import mean_and_error, paired_difference
from tokencut.model import CompressedModel, predicted_gmacs
from tokencut.models.loading import load_model
from tokencut.runtime.devices import inference_state, resolve_device
from tokencut.training.recipe import recipe_named
from tokencut.training.setup import TrainingSetup

Options = tuple[tuple[str, str], ...]
# Given back as clusters are, which is the best way for these too.
CONTROLS: tuple[Options, ...] = tuple((("method", "window"), ("clustering", way)) for way in ("pool", "stride"))


@dataclass(frozen=True)
class Point:
    """Where the grid gets smaller, and to what share of its tokens."""

    layer: int
    keep: float


@dataclass(frozen=True)
class Task:
    """A model to fine-tune for an epoch; the dense one without a point."""

    point: Point | None
    options: Options
    model: str
    train: str
    data: str
    batch_size: int
    workers: int
    device: str
    precision: str
    recipe: str
    epochs: int


def reduced(dense: nn.Module, point: Point | None, options: Options) -> CompressedModel:
    """The model compressed at a point, by the families' method or that of the options; the dense one's equal without a
    point.
    """
    if point is None:
        return compress(dense, keep=1.0)
    settings = dict(options)
    method = settings.pop("method", None)
    return compress(dense, keep=point.keep, layers=[point.layer], method=method, method_options=settings)


def named(options: Options) -> str:
    """Settings in words."""
    return " ".join(f"{name}={value}" for name, value in options) or "as it comes"


def varied(axes: Sequence[str]) -> list[Options]:
    """No setting changed, then one at a time: of `name=value,value` axes; `name=value+name=value` changes both."""
    found: list[Options] = [()]
    for axis in axes:
        if "+" in axis:
            pairs = [each.partition("=") for each in axis.split("+")]
            found.append(tuple((name, value) for name, _, value in pairs))
            continue
        name, _, values = axis.partition("=")
        found += [((name, value),) for value in values.split(",")]
    return found


@dataclass
class Judged:
    """What came of a setting at a point."""

    right: list[bool]
    divergence: Tensor

    @property
    def mean(self) -> float:
        """The mean divergence."""
        return float(self.divergence.mean())


class Judge:
    """Holds the images and what the dense model says of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.dense, device = load_model(args.model).dense, resolve_device(args.device)
        self.gmacs = predicted_gmacs(self.dense)
        self.batches, self.truth = load_images(self.dense, args, device)
        with inference_state(self.dense, device):
            self.wanted = log_probabilities(self.dense, self.batches)
        self.device = device
        self.right: list[bool] = (self.wanted.argmax(1) == self.truth).tolist()

    def __call__(self, model: CompressedModel) -> Judged:
        with inference_state(model, self.device):
            found = torch.cat([F.log_softmax(model(batch).float(), dim=1) for batch in self.batches])
        lost = 1000 * F.kl_div(found, self.wanted, log_target=True, reduction="none").sum(1).cpu()
        return Judged((found.argmax(1) == self.truth).tolist(), lost)


def top1(right: Sequence[bool]) -> str:
    """Percent."""
    return f"{100 * sum(right) / len(right):.2f}"


@torch.no_grad()
def off_the_shelf(args: argparse.Namespace) -> None:
    """Judges every setting at every point."""
    judge, settings = Judge(args), varied(args.vary)
    points = [Point(layer, keep) for layer in args.layers for keep in args.keep]
    print(f"{args.model}, {len(judge.right):,} images of {args.data}: dense top-1 {top1(judge.right)} %, "
          f"{judge.gmacs:.4f} GMACs\n", flush=True)  # fmt: skip
    rows: list[list[object]] = []
    divergences: dict[Options, list[Tensor]] = {options: [] for options in settings}
    for point in points:
        judged, fewer = {}, {}
        for options in [*settings, *CONTROLS]:
            model = reduced(judge.dense, point, options)
            judged[options], fewer[options] = judge(model), 100 * (1 - predicted_gmacs(model) / judge.gmacs)
        control = min(CONTROLS, key=lambda options: judged[options].mean)
        for options in [*settings, *CONTROLS]:
            found = judged[options]
            beside = "" if options is control else paired_difference(found.right, judged[control].right)
            rows.append([point.layer, f"{point.keep:g}", f"{fewer[options]:.1f}", named(options), top1(found.right),
                         paired_difference(found.right, judge.right), beside,
                         f"{found.mean:.1f}"])  # fmt: skip
        for options, listed in divergences.items():
            listed.append(judged[options].divergence)
        say(f"block {point.layer}, keep {point.keep:g}: {len(judged)} settings")
    print(markdown(["block", "keep", "fewer GMACs, %", "setting", "top-1", "minus dense", "minus the control",
                    "divergence"], rows))  # fmt: skip
    if len(settings) > 1:
        print("\n" + summary(divergences))


def summary(divergences: dict[Options, list[Tensor]]) -> str:
    """Each setting's divergence over all points, and how much it is more than that of the first."""
    first, lines = torch.stack(next(iter(divergences.values()))), []
    for options, listed in divergences.items():
        mean, error = mean_and_error((torch.stack(listed) - first).mean(0))
        lines.append((named(options), f"{torch.stack(listed).mean():.1f}", f"{mean:+.2f} ± {error:.2f}"))
    return markdown(["setting", "divergence over all points", "minus the first's"], lines)


def fine_tune(task: Task) -> dict[str, Any]:
    """What a fine-tuned model comes to."""
    setup = TrainingSetup(batch_size=task.batch_size, workers=task.workers, precision=task.precision)
    model, recipe = reduced(loaded_once(task.model), task.point, task.options), recipe_named(task.recipe)
    return tuned_and_judged(
        model, open_source(task.train, split="train"), open_source(task.data), recipe.changed(epochs=task.epochs),
        setup, resolve_device(task.device), precision="fp32", limit=None,
    )  # fmt: skip


def fine_tuned(args: argparse.Namespace) -> None:
    """Fine-tunes the dense model, and each point's model and control, several at the same time."""
    points = [Point(layer, keep) for layer in args.layers for keep in args.keep]
    open_source(args.train_data, split="train", observer=Lines())  # an archive is unpacked once, before the jobs start

    def task(point: Point | None, options: Options) -> Task:
        return Task(point, options, args.model, args.train_data, args.data, args.batch_size, args.workers, args.device,
                    args.precision, args.recipe, args.epochs)  # fmt: skip

    dense, control = task(None, ()), (("method", "window"), ("clustering", args.control))
    wanted = [dense, *(task(point, options) for point in points for options in ((), control))]
    found: dict[Task, dict[str, Any]] = {}
    for done, told in carried_out(fine_tune, wanted, jobs=args.jobs, until=STARTED + args.max_seconds):
        found[done] = told
        say(f"{len(found)} of {len(wanted)}: {done.point} {named(done.options)}: {told['top1']:.2f}")
    if dense not in found:
        raise TokencutError("the dense model was not done in time; give it more `max_seconds`")
    right = {each: hits(told) for each, told in found.items()}
    print(f"{args.model}, {len(right[dense]):,} images of {args.data}, fine-tuned: dense top-1 "
          f"{top1(right[dense])} %\n")  # fmt: skip
    rows = []
    for each in wanted[1:]:
        if each.point is None or each not in found:
            continue
        fewer = 100 * (1 - found[each]["gmacs"] / found[dense]["gmacs"])
        beside = task(each.point, control)
        rows.append([each.point.layer, f"{each.point.keep:g}", f"{fewer:.1f}", named(each.options), top1(right[each]),
                     paired_difference(right[each], right[dense]),
                     "" if each == beside or beside not in found
                     else paired_difference(right[each], right[beside])])  # fmt: skip
    print(markdown(["block", "keep", "fewer GMACs, %", "setting", "top-1", "minus dense", "minus the control"], rows))


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = image_parser(__doc__, data=IMAGES, limit=5000, batch_size=100)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3, 5], help="blocks of the third stage")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--vary", nargs="*", default=[], metavar="NAME=V,V", help="methods and settings to try")
    add_jobs(parser)
    parser.add_argument("--control", default="stride", choices=["pool", "stride"], help="which stands beside them then")
    parser.add_argument("--recipe", default="short", help="of that")
    parser.add_argument("--epochs", type=int, default=1, help="of that")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="then print what is there")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of that")
    return parser.parse_args()


def main() -> None:
    """Judges every setting at every point, and prints the tables."""
    args = parse()
    off_the_shelf(args) if args.train_data is None else fine_tuned(args)
