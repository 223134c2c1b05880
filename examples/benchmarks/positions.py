"""Where a token is that holds several patches: the rules for positions (RoPE) and for biases of pairs, on one model.

    python examples/benchmarks/run.py positions local-dir:FOLDER --data val.tar
    python examples/benchmarks/run.py positions local-dir:FOLDER --data val.tar --train-data train.tar.gz --jobs 4

Rules as in `tokencut.adapters.positions`: the mean position of its patches (`centroid`), the patch nearest to it
(`nearest`), its first patch (`first`), or the average of what its patches would have (`average`: of sines and cosines,
or of biases). For families with rotary positions also what methods compare: keys and class attention with the rotation
or before it. `--train-data` fine-tunes each rule for an epoch instead, as `compress --finetune-epochs 1` does.

For each line it prints top-1, and top-1 minus that of the first line, paired over the images with its standard error;
off the shelf also the divergence from the dense model in thousandths of a nat, likewise.
"""

from __future__ import annotations

import argparse
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from defaults import load_images, log_probabilities
from jobs import carried_out, say
from options import IMAGES, add_jobs, image_parser
from tables import hits
from torch import Tensor, nn
from tuning import loaded_once, tuned_and_judged

from tokencut import compress
from tokencut.adapters.positions import POSITION_RULES, PositionedAdapter
from tokencut.adapters.rotary import RotaryAdapter
from tokencut.data.sources import open_source
from tokencut.errors import UsageError
from tokencut.evaluation.statistics import mean_and_error, paired_difference
from tokencut.model import CompressedModel
from tokencut.models.loading import load_model
from tokencut.runtime.devices import inference_state, resolve_device
from tokencut.training.recipe import SHORT
from tokencut.training.setup import TrainingSetup


@dataclass(frozen=True)
class Rule:
    """A line of the table: a method, and what is set on the family's adapter."""

    method: str
    attributes: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.attributes)])


@dataclass(frozen=True)
class Task:
    """A model to fine-tune for an epoch by a rule."""

    rule: Rule
    keep: float
    model: str
    train: str
    data: str
    batch_size: int
    workers: int
    device: str


def rules(dense: nn.Module, methods: list[str], *, trained: bool) -> list[Rule]:
    """The lines for a model, by method; the first of each is the default.

    Raises:
        UsageError: The model's attention does not ask where tokens are.
    """
    adapter = compress(dense).adapter
    if not isinstance(adapter, PositionedAdapter):
        raise UsageError("nothing in this model's blocks asks where tokens are; take one with RoPE or relative biases")
    found = [Rule(method, (("position_rule", rule),)) for method in methods for rule in POSITION_RULES]
    if isinstance(adapter, RotaryAdapter) and not trained:
        usual = ("position_rule", POSITION_RULES[0])
        found += [Rule("tome", (usual, ("raw_keys", raw))) for raw in (False, True)]
        found += [Rule("evit", (usual, ("raw_class_attention", raw))) for raw in (False, True)]
    return found


def reduced(dense: nn.Module, rule: Rule, keep: float) -> CompressedModel:
    """The model compressed by a rule."""
    model = compress(dense, keep=keep, method=rule.method)
    model.adapter = copy(model.adapter)
    for name, value in rule.attributes:
        setattr(model.adapter, name, value)
    return model


def fine_tune(task: Task) -> list[bool]:
    """Which of the images are right after an epoch."""
    setup = TrainingSetup(batch_size=task.batch_size, workers=task.workers)
    told = tuned_and_judged(
        reduced(loaded_once(task.model), task.rule, task.keep), open_source(task.train, split="train"),
        open_source(task.data), SHORT.changed(epochs=1), setup, resolve_device(task.device), precision="fp32",
        limit=None,
    )  # fmt: skip
    return hits(told)


def line(keep: float, rule: Rule, right: list[bool], first: list[bool] | None, *more: str) -> str:
    """A row of the table."""
    against = "" if first is None else str(paired_difference(right, first))
    return f"| {keep:g} | {rule} | {100 * sum(right) / len(right):.2f} | {against} | {' | '.join(more)} |"


@torch.no_grad()
def off_the_shelf(args: argparse.Namespace) -> None:
    """Judges every rule without any fine-tuning."""
    dense, device = load_model(args.model).dense, resolve_device(args.device)
    batches, truth = load_images(dense, args, device)
    with inference_state(dense, device):
        wanted = log_probabilities(dense, batches)
        top1 = 100 * (wanted.argmax(1) == truth).float().mean().item()
        print(f"{args.model}, {len(truth):,} images of {args.data}: dense top-1 {top1:.2f} %\n", flush=True)
        print("| keep | rule | top-1 | minus the method's first | divergence | minus the first's |")
        print(f"|{'---|' * 6}")
        for keep in args.keep:
            firsts: dict[str, tuple[list[bool], Tensor]] = {}
            for rule in rules(dense, args.methods, trained=False):
                found = log_probabilities(reduced(dense, rule, keep), batches)
                right: list[bool] = (found.argmax(1) == truth).tolist()
                lost = 1000 * F.kl_div(found, wanted, log_target=True, reduction="none").sum(1).cpu()
                first = firsts.get(rule.method)
                more = ""
                if first is None:
                    firsts[rule.method] = right, lost
                else:
                    mean, error = mean_and_error(lost - first[1])
                    more = f"{mean:+.2f} ± {error:.2f}"
                print(line(keep, rule, right, first and first[0], f"{lost.mean():.1f}", more), flush=True)


def after_an_epoch(args: argparse.Namespace) -> None:
    """Fine-tunes every rule for an epoch, several at the same time."""
    wanted = [
        Task(rule, keep, args.model, args.train_data, args.data, args.batch_size, args.workers, args.device)
        for keep in args.keep
        for rule in rules(load_model(args.model).dense, args.methods, trained=True)
    ]
    found: dict[Task, list[bool]] = {}
    for task, right in carried_out(fine_tune, wanted, jobs=args.jobs):
        found[task] = right
        say(f"{len(found)} of {len(wanted)}: keep {task.keep:g} {task.rule}")
    print("| keep | rule, after an epoch | top-1 | minus the method's first | |\n|---|---|---|---|---|")
    for task in wanted:
        first = next(other for other in wanted if (other.keep, other.rule.method) == (task.keep, task.rule.method))
        print(line(task.keep, task.rule, found[task], None if first is task else found[first]))


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = image_parser(__doc__, data=IMAGES, limit=5000, batch_size=100)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--methods", nargs="+", default=["bat"])
    add_jobs(parser)
    return parser.parse_args()


def main() -> None:
    """Judges every rule at every keep rate, and prints the table."""
    args = parse()
    off_the_shelf(args) if args.train_data is None else after_an_epoch(args)
