"""Trains DeiT of ImageNet's geometry on small images: 56 px in patches of 4 are 14 x 14 = 196 image tokens, as there.

    python examples/benchmarks/run.py train deit_small --train tin100-train.tar.gz --val tin100-val.tar -o runs/small
    python examples/benchmarks/run.py train deit_tiny ... --time-limit 500 --fit      # as many epochs as fit
    python examples/benchmarks/run.py train deit_tiny ... --time-limit 500 --resume   # go on with a run that was cut
    python examples/benchmarks/run.py train swin_small --size 224 --enlarge 4 ...     # crops of 56 px, enlarged to 224

Images are decoded once and held on the GPU, which augments them in batches. timm gives the model, mixup and cutmix, the
optimizer, the schedule and the running average of weights (which is what is judged and saved). Two things make the most
of few images and little time: in the first phase half of the image tokens are left out (`--patch-drop`), which halves
the cost of a step and keeps a large model from learning 45,000 images by heart; and `--small 40` takes smaller images
in the first epochs.

Into the output folder go config.json and model.safetensors (bf16; `local-dir:FOLDER` is then a MODEL for tokencut),
log.csv, and resume.pt until the run is done. `--ship FOLDER` writes the model once more, in parts of under 16 MiB,
which `shards` puts together. The same seed gives the same run, save for the order of a GPU's atomic additions.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import pickle
import time
from pathlib import Path
from typing import Any

import timm
import torch
from jobs import STARTED, Lines, say
from safetensors.torch import load_file
from torch import nn

from reference import shards
from reference.augment import Augmentation
from reference.loop import Recipe, Training, can_drop_patches
from reference.pixels import Held, read
from tokencut.errors import TokencutError
from tokencut.files import atomic_write
from tokencut.models.model_args import parse_model_kwargs
from tokencut.models.names import resolve_name
from tokencut.runtime.devices import describe_device, resolve_device

# What differs between the two: the larger one learns 45,000 images by heart unless it is held back more. At a learning
# rate of 1e-3 DeiT-S stalled at 41 % where DeiT-T came to 46 %.
SIZES: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"epochs": 160, "lr": 1e-3, "weight_decay": 0.05, "drop_path": 0.05, "warmup": 10,
                              "patch_drop_share": 0.6},
    "deit_small_patch16_224": {"epochs": 150, "lr": 6e-4, "weight_decay": 0.1, "drop_path": 0.15, "warmup": 15,
                               "patch_drop_share": 0.7},
}  # fmt: skip
OTHERS: dict[str, Any] = {"epochs": 100, "lr": 5e-4, "weight_decay": 0.1, "drop_path": 0.1, "warmup": 10,
                          "patch_drop_share": 0.7}  # fmt: skip
RESUME, LOG = "resume.pt", "log.csv"
# Seconds kept back from the time limit to judge and save.
RESERVE = 15.0


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a timm name or alias, such as deit_tiny")
    parser.add_argument(
        "--train", required=True, help="training images: a folder with one sub-folder a class, or a tar"
    )
    parser.add_argument("--val", required=True, help="images to judge by, likewise; nothing is chosen by them")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--ship", type=Path, metavar="FOLDER", help="write the model there too, in parts of < 16 MiB")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="end cleanly in time")
    parser.add_argument("--fit", action="store_true", help="plan as many epochs as fit the limit, --epochs at most")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="begin with the weights of a run that is done")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder; with its own recipe")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU")
    parser.add_argument("--judge-every", type=int, default=10, metavar="EPOCHS")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-j", "--workers", type=int, help="processes that decode images")
    parser.add_argument("--size", type=int, default=56, help="px that the model takes")
    parser.add_argument("--stored", type=int, default=64, help="px of the images held, of which crops are made")
    parser.add_argument("--patch", type=int, default=4, help="px of a patch")
    parser.add_argument("--enlarge", type=int, default=1, metavar="N", help="crops are of a N-th of --size, enlarged")
    parser.add_argument("--model-kwargs", action="append", default=[], metavar="KEY=VALUE")
    for name in ("epochs", "warmup"):
        parser.add_argument(f"--{name}", type=int, help="default: by model")
    for name in ("lr", "weight-decay", "drop-path", "patch-drop-share"):
        parser.add_argument(f"--{name}", type=float, help="default: by model; --lr for a batch of 512")
    numbers = {"min_lr": 1e-5, "patch_drop": 0.5, "small_share": 0.4, "mixup": 0.8,
               "cutmix": 1.0, "smoothing": 0.1, "clip": 1.0, "ema_decay": 0.999}  # fmt: skip
    for name, value in {"batch": 512, "small": 0, "seed": 1, **numbers}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    for name in ("rotation", "jitter", "three", "erasing"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Augmentation, name))
    parser.add_argument("--crop-scale", type=float, default=Augmentation.scale[0], help="smallest share of a crop")
    return parser.parse_args(words)


def recipe_of(args: argparse.Namespace, architecture: str) -> Recipe:
    """The recipe: what was typed, and else the model's own."""
    own = SIZES.get(architecture, OTHERS)
    chosen = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(Recipe)}
    chosen |= {name: own[name] for name, value in chosen.items() if value is None}
    chosen["lr"] *= math.sqrt(args.batch / 512)  # Adam's step grows with the square root of the batch
    return Recipe(**chosen)


def build(args: argparse.Namespace, architecture: str, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model with random weights, and timm's arguments for it."""
    # The stem of a PVT is fixed, and it takes images of any size.
    geometry = {} if architecture.startswith("pvt_v2") else {"img_size": args.size, "patch_size": args.patch}
    model_args = {**geometry, **parse_model_kwargs(args.model_kwargs)}
    torch.manual_seed(args.seed)
    # dynamic_img_size lets it take smaller images too, its positions resampled; its weights are the same without.
    dynamic: dict[str, Any] = {"dynamic_img_size": True} if args.small else {}
    return timm.create_model(architecture, num_classes=classes, **model_args, **dynamic), model_args


class Run:
    """A run with its folder: what is written, and when it ends."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        # Whatever timm can build can be trained; an alias is of a family that tokencut knows.
        self.architecture = args.model if timm.is_model(args.model) else resolve_name(args.model).architecture
        args.output.mkdir(parents=True, exist_ok=True)
        self.device = resolve_device(args.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        train, val = (self._read(data) for data in (args.train, args.val))
        if train.classes != val.classes:
            raise TokencutError(f"{args.train} and {args.val} have different class folders; give two with the same")
        if args.fit and math.isinf(args.time_limit):
            raise TokencutError("--fit fits a run into a time; add --time-limit SECONDS")
        if len(train.images) < args.batch:
            count = len(train.images)
            raise TokencutError(f"--batch {args.batch} is more than there are training images, {count}; type --batch "
                                f"{count // 2 * 2}")  # fmt: skip
        if args.size % args.enlarge:
            raise TokencutError(f"--size {args.size} is no multiple of --enlarge {args.enlarge}; type --size "
                                f"{args.size // args.enlarge * args.enlarge}")  # fmt: skip
        state = self._saved() if args.resume else None
        recipe = Recipe(**state["recipe"]) if state else recipe_of(args, self.architecture)
        model, self.model_args = build(args, self.architecture, len(train.classes))
        if recipe.patch_drop and not can_drop_patches(model):
            raise TokencutError(f"{self.architecture} can't leave out image tokens in training; type --patch-drop 0")
        if args.start is not None and state is None:
            model.load_state_dict(load_file(args.start / shards.WEIGHTS))
        typed = Augmentation(scale=(args.crop_scale, 1.0), rotation=args.rotation, jitter=args.jitter, three=args.three,
                             erasing=args.erasing)  # fmt: skip
        augmentation = Augmentation(**state["augmentation"]) if state else typed
        self.training = Training(model.to(self.device), train, val, args.size, recipe, augmentation, say)
        if args.compile if args.compile is not None else self.device.type == "cuda":
            self.training.compile()
        if args.fit and state is None:
            epochs = self.training.plan(recipe.epochs, self._left())
            self.training.recipe = dataclasses.replace(recipe, epochs=epochs)
            self.training._prepare()
        if state:
            self.training.restore(state["state"])
        said = f"epoch {self.training.epoch} of {self.training.recipe.epochs}"
        say(f"{self.architecture} on {describe_device(self.device)}, {len(train.images):,} images: {said} is next "
            f"after {time.monotonic() - STARTED:.0f} s; {self.training.recipe}, {augmentation}")  # fmt: skip

    def _read(self, data: str) -> Held:
        return read(data, self.args.stored, workers=self.args.workers, observer=Lines()).to(self.device)

    def _saved(self) -> dict[str, Any] | None:
        path = self.args.output / RESUME
        if not path.exists():
            if (self.args.output / shards.WEIGHTS).exists():
                raise TokencutError(f"{self.args.output} holds a finished run; leave --resume out to start again")
            say(f"there is nothing to resume in {self.args.output}: starting at the first epoch")
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise TokencutError(
                f"{path} is damaged ({type(error).__name__}); leave --resume out to start again"
            ) from error
        if state["architecture"] != self.architecture:
            raise TokencutError(f"{path} is of {state['architecture']}, not {self.architecture}; give another -o")
        return state

    def _left(self) -> float:
        return self.args.time_limit - (time.monotonic() - STARTED) - RESERVE

    def go(self) -> bool:
        """Trains to the end (True) or until time is up (False), and saves."""
        training, every = self.training, max(1, self.args.judge_every)
        slowest = 0.0
        while training.epoch < training.recipe.epochs and self._left() > 1.3 * slowest:
            row = training.run_epoch()
            slowest = row["seconds"] if row["left_out"] or training.epoch == 1 else max(slowest, row["seconds"])
            if training.epoch % every == 0 or training.epoch == training.recipe.epochs:
                row |= training.judge()
                self._write_log()
            say(", ".join(f"{name} {value:.5g}" for name, value in row.items()))
        done = training.epoch == training.recipe.epochs
        self._save(done=done)
        return done

    def _save(self, *, done: bool) -> None:
        training, output = self.training, self.args.output
        weights = training.ema.module.state_dict()
        config = shards.describe(
            self.architecture, self.model_args, self.args.size, self.args.stored * training.recipe.enlarge,
            training.mean.tolist(), training.std.tolist(), training.train.classes,
            classifier=training.model.pretrained_cfg.get("classifier", "head"), fixed="img_size" in self.model_args,
        )  # fmt: skip
        config["pretrained_cfg"] |= {name: [round(value, 3) for value in config["pretrained_cfg"][name]]
                                     for name in ("mean", "std")}  # fmt: skip
        recipe, augmentation = dataclasses.asdict(training.recipe), dataclasses.asdict(training.augmentation)
        config["training"] = {"epochs": training.epoch, "recipe": recipe, "augmentation": augmentation}
        shards.write(output, config, weights)
        self._write_log()
        if done:
            (output / RESUME).unlink(missing_ok=True)
        else:
            kept = {"recipe": recipe, "augmentation": augmentation, "architecture": self.architecture}
            with atomic_write(output / RESUME) as temporary:
                torch.save({**kept, "state": training.state()}, temporary)
        if self.args.ship:
            shards.write(self.args.ship, config, weights, parts=True)
            (self.args.ship / LOG).write_bytes((output / LOG).read_bytes())
        stored = {name: tensor.to(torch.bfloat16).to(tensor.dtype) for name, tensor in weights.items()}
        training.ema.module.load_state_dict(stored)
        top1 = training.accuracy(training.ema.module, precision="fp32")
        print(f"{self.architecture}: {top1:.2f} % top-1 on {len(training.val.labels):,} images in fp32, as stored, "
              f"after {training.epoch} of {training.recipe.epochs} epochs and {time.monotonic() - STARTED:.0f} s; in "
              f"{output}" + ("" if done else "; type the same with --resume to go on"), flush=True)  # fmt: skip

    def _write_log(self) -> None:
        names = list(dict.fromkeys(name for row in self.training.rows for name in row))
        with atomic_write(self.args.output / LOG) as temporary, temporary.open("w", newline="") as file:
            table = csv.DictWriter(file, names, restval="")
            table.writeheader()
            table.writerows(self.training.rows)


def main() -> None:
    """Trains."""
    Run(parse()).go()
