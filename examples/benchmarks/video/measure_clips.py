"""Measures what reductions of a model of clips cost and gain: GMACs, loss and top-1 paired over clips, clips a second.

    python examples/benchmarks/run.py measure_clips moving-digits --data clips/val --frame-stride 2 -o results.json
    python examples/benchmarks/run.py measure_clips moving-digits --held clips.pt --device cuda --capture -o out.json

Every clip is decoded once and shown to all models; a loss or accuracy is told as a difference from the dense model,
paired over the clips, with its standard error. Times are of random clips, all models in turn. `--held` takes what
`torch.save((clips, classes), ...)` wrote instead: bytes `(N, 3, frames, H, W)`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencut import blocks
from tokencut.data.image_set import open_images
from tokencut.data.preprocessing import preprocessing_of
from tokencut.data.sources import open_source
from tokencut.evaluation.statistics import mean_and_error
from tokencut.model import compress, predicted_gmacs
from tokencut.models.loading import load_model
from tokencut.ops.grouping import Selection
from tokencut.ops.ranking import highest
from tokencut.profiling.latency import measure
from tokencut.profiling.measuring import random_images
from tokencut.runtime.capturing import CapturedModel
from tokencut.runtime.devices import describe_device, inference_state, precision_dtype, resolve_device


@dataclass(frozen=True)
class Case:
    """A reduction: a keep rate, what enters the first block, and how tubelets that don't are treated."""

    method: str
    keep: float
    static: float | None = None
    rule: str = "hold"

    @property
    def name(self) -> str:
        """For tables."""
        parts = [f"{self.method} {self.keep:g}" if self.keep < 1 else ""]
        ruled = {"hold": "", "drop": " dropped", "alike": " weighing alike"}[self.rule]
        parts += [f"static {self.static:g}{ruled}"] if self.static else []
        return ", ".join(filter(None, parts)) or "dense"


def cases(methods: list[str], keeps: list[float], statics: list[float]) -> list[Case]:
    """The dense model first; then static removal alone, by each rule; then each method, with and without."""
    alone = [Case(methods[0], 1.0, static, rule) for static in statics for rule in ("hold", "alike", "drop")]
    both = [Case(method, keep, static) for method in methods for static in (None, *statics) for keep in keeps]
    return [Case(methods[0], 1.0), *alone, *both]


@contextmanager
def ruled(rule: str) -> Iterator[None]:
    """Has static tubelets be dropped, as published, in place of held by the token that stands for them."""

    def dropped(changed: Tensor, places: int, count: int) -> Selection:
        return Selection(highest(changed, count))

    with mock.patch.object(blocks, "without_static", dropped) if rule == "drop" else nullcontext():
        yield


def held_clips(args: argparse.Namespace, model: nn.Module) -> tuple[Tensor, Tensor]:
    """All clips as bytes, and the class of each."""
    if args.held is not None:
        clips, classes = torch.load(args.held)
        return clips, classes
    images = open_images(model, open_source(args.data, frame_stride=args.frame_stride), limit=args.limit)
    found = [(batch.views()[0].clone(), batch.targets.clone()) for batch in images.batches(50, workers=args.workers)]
    return torch.cat([clips for clips, _ in found]), torch.cat([classes for _, classes in found])


@torch.no_grad()
def judged(model: nn.Module, clips: Tensor, classes: Tensor, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
    """The loss of each clip, and whether it is right."""
    prepared, losses, right = preprocessing_of(model), [], []
    with inference_state(model, device, torch.float32):
        for part, target in zip(clips.split(size), classes.to(device).split(size), strict=True):
            logits = model(prepared.normalise(part, device)).float()
            losses.append(F.cross_entropy(logits, target, reduction="none").cpu())
            right.append((logits.argmax(1) == target).cpu())
    return torch.cat(losses), torch.cat(right)


def timed(models: Mapping[str, nn.Module], args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Clips a second of each model, all in turn."""
    forwards: dict[str, Callable[[Tensor], Any]] = {}
    dtype = precision_dtype(args.precision)
    for name, model in models.items():
        ready = model.to(device, dtype or torch.float32).eval()
        forwards[name] = CapturedModel(ready) if args.capture else ready
    first = next(iter(models.values()))
    clips = random_images(first, (args.batch_size, *preprocessing_of(first).input_shape), device)
    with torch.no_grad():
        found = measure(forwards, clips, rounds=args.rounds, max_seconds=args.seconds)
    return {name: timing.images_per_second for name, timing in found.items()}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of clips, as tokencut takes it")
    parser.add_argument("--data", help="a folder of videos, one sub-folder a class")
    parser.add_argument("--held", type=Path, help="decoded clips instead")
    parser.add_argument("--frame-stride", type=int, default=4)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--methods", nargs="+", default=["bat", "tome"])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--static", nargs="+", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-j", "--workers", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", help="in which models are timed; judged they are in fp32")
    parser.add_argument("--capture", action="store_true", help="time them from CUDA graphs")
    parser.add_argument("--rounds", type=int, default=7, help="0 for no times")
    parser.add_argument("--seconds", type=float, default=60.0, help="what timing may take")
    parser.add_argument("-o", "--output", type=Path, required=True, help="*.json; the table is printed")
    return parser.parse_args(words)


def main() -> None:
    """Measures, writes and prints."""
    args = parse()
    device = resolve_device(args.device)
    dense = load_model(args.model).model
    clips, classes = held_clips(args, dense)
    rows: list[dict[str, Any]] = []
    models: dict[str, nn.Module] = {}
    reference: tuple[Tensor, Tensor] | None = None
    for case in cases(args.methods, args.keep, args.static):
        alike = False if case.rule == "alike" else None  # in attention; pooled they are by how many they hold
        model = compress(dense, keep=case.keep, method=case.method, static_keep=case.static, prop_attn=alike).eval()
        with ruled(case.rule):
            losses, right = judged(model, clips, classes, device, args.batch_size)
        reference = reference or (losses, right)
        change, error = mean_and_error((losses - reference[0]).double())
        points, points_error = mean_and_error(100 * (right.double() - reference[1].double()))
        row = {**asdict(case), "name": case.name, "gmacs": predicted_gmacs(model), "loss": float(losses.mean()),
               "top1": 100 * float(right.double().mean()), "loss_change": change, "loss_error": error,
               "points": points, "points_error": points_error}  # fmt: skip
        rows.append(row)
        print(f"{case.name:28} {row['gmacs']:.3f} GMACs  loss {row['loss']:.4f} ({change:+.4f} ± {error:.4f})  top-1 "
              f"{row['top1']:.2f} ({points:+.2f} ± {points_error:.2f})", flush=True)  # fmt: skip
        if case.rule == "hold" and args.rounds:
            models[case.name] = model
    speeds = timed(models, args, device) if models else {}
    told = {"model": str(args.model), "clips": len(clips), "device": describe_device(device), "rows": rows,
            "precision": args.precision, "batch_size": args.batch_size, "clips_per_second": speeds,
            "captured": args.capture, "torch": torch.__version__}  # fmt: skip
    args.output.write_text(json.dumps(told, indent=1) + "\n")
    print("\n".join(table(told)))


def table(told: Mapping[str, Any]) -> Iterator[str]:
    """A table in Markdown."""
    yield "| reduction | GMACs | loss | top-1 | clips/s | times as fast | of the GMACs ratio |"
    yield "|---|---|---|---|---|---|---|"
    dense, speeds = told["rows"][0], told["clips_per_second"]
    for row in told["rows"]:
        change, points = "", ""
        if row is not dense:
            change = f" ({row['loss_change']:+.3f} ± {row['loss_error']:.3f})"
            points = f" ({row['points']:+.2f} ± {row['points_error']:.2f})"
        rate = speeds.get(row["name"])
        faster = rate / speeds[dense["name"]] if rate else None
        speed = f"{rate:,.0f} | {faster:.2f} | {faster * row['gmacs'] / dense['gmacs']:.2f}" if rate else "| |"
        loss, top1 = f"{row['loss']:.3f}{change}", f"{row['top1']:.2f}{points}"
        yield f"| {row['name']} | {row['gmacs']:.2f} | {loss} | {top1} | {speed} |"


if __name__ == "__main__":
    main()
