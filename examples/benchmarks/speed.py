"""Do seconds fall as FLOPs do? Dense, compressed and naive models, each timed in turns with timm's dense model.

    python examples/benchmarks/run.py speed --model deit_small_patch16_224 --batch-size 1 16 --processes 5
    python examples/benchmarks/run.py speed --clock process --threads 1 --onnxruntime --no-naive --batch-size 1 16
    python examples/benchmarks/run.py speed --device cuda --precision bf16 --batch-size 256 1 \\
        --capture --compile --compile-mode default reduce-overhead
    python examples/benchmarks/run.py speed --device cuda --precision bf16 --batch-size 256 --no-naive --train --compile

The dense side is timm's own forward with fused attention, in the same form: eager beside eager, captured as a CUDA
graph beside captured, compiled beside compiled, onnxruntime beside onnxruntime. `kept` is the speed-up divided by the
FLOPs ratio: 1.00 means that seconds fall as far as FLOPs. `spread` holds the quartiles of the speed-up over rounds or,
with `--processes`, its lowest and highest over the processes, and `±` half of the same for the milliseconds. The naive
form is what research code does: attention materialised in every block that timm runs. Weights are random: speed does
not depend on them. What `topk` and `random` reach is about the most that any method could, since their stages cost next
to nothing: at batch 1, say, reading the weights takes its time however few the tokens are.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import timm
import torch
from onnx_forward import onnx_forward
from timing import EAGER, NAIVE, add_run_options, in_turns, prepared, time_limit, timed_table
from timing_table import BESIDE_DENSE, Columns, Row, plus_minus
from timm.layers import set_fused_attn
from torch import Tensor, nn

from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import ModelError
from tokencut.export.run import export_model
from tokencut.messages import listed
from tokencut.methods import methods
from tokencut.model import compress
from tokencut.profiling.latency import Forward
from tokencut.profiling.measuring import random_images
from tokencut.runtime.capturing import CapturedModel
from tokencut.runtime.compiling import COMPILE_MODES, compile_model
from tokencut.runtime.devices import PRECISIONS, resolve_device

ONNX = "onnxruntime"
COLUMNS: Columns = {
    "model": lambda row: row.model,
    "form": lambda row: row.form,
    "batch": lambda row: str(row.batch),
    "GMACs": lambda row: f"{row.gmacs:.3f}",
    "images/s": lambda row: f"{1000 * row.batch / row.ms:,.0f}",
    "ms": lambda row: f"{row.ms:.2f}",
    "±": plus_minus,
    **BESIDE_DENSE,
}


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="a timm name")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="KEY=NUMBER", help="for timm, as img_size=384")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--methods", nargs="+", default=["bat", "topk", "evit", "tome"], choices=sorted(methods()))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16])
    parser.add_argument("--no-eager", action="store_true", help="leave eager out")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive form out")
    parser.add_argument("--capture", action="store_true", help="time CUDA graphs as well, on a GPU")
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well")
    parser.add_argument("--compile-mode", nargs="+", default=["default"], choices=COMPILE_MODES)
    parser.add_argument("--train", action="store_true", help="time training steps: forward and backward under autocast")
    parser.add_argument("--onnxruntime", action="store_true", help="export, and time onnxruntime as well, in fp32")
    parser.add_argument("--onnx-folder", type=Path, help=argparse.SUPPRESS)  # where several processes share files
    add_run_options(parser, rounds=15, max_seconds=60.0)
    args = parser.parse_args()
    if args.onnxruntime and args.precision != "fp32":
        parser.error(f"exported files compute in fp32, and --precision is {args.precision}; leave out --onnxruntime")
    if args.train and (args.onnxruntime or args.capture or not args.no_naive):
        parser.error("--train takes eager and --compile only; leave out --capture and --onnxruntime, give --no-naive")
    return args


def candidates(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The dense model, and a compressed one for each method and keep rate, in fp32 on the CPU."""
    torch.manual_seed(0)
    kwargs = {key: int(value) for key, _, value in (pair.partition("=") for pair in args.model_kwargs)}
    dense = timm.create_model(args.model, pretrained=False, **kwargs).eval()
    reduced = {f"{method} {keep:g}": (method, keep) for method in args.methods for keep in args.keep}
    return {"dense": dense} | {name: compress(dense, keep=keep, method=of) for name, (of, keep) in reduced.items()}


def naive(model: nn.Module) -> nn.Module:
    """A copy whose attention is materialised in every block that timm runs."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return copied


def exported(models: Mapping[str, nn.Module], folder: Path) -> dict[str, Path]:
    """An .onnx of each model for any batch, unless another process has written it."""
    files = {name: folder / f"{name.replace(' ', '-')}.onnx" for name in models}
    for name, path in files.items():
        if not path.exists():
            print(f"exporting {name}", file=sys.stderr, flush=True)
            export_model(models[name], path, batch_size=2, limit=2)  # two images show that it runs
    return files


def captured(model: nn.Module, images: Tensor) -> Forward:
    """A model from a CUDA graph, recorded for these images.

    Raises:
        ModelError: It cannot be recorded.
    """
    graph = CapturedModel(model)
    if not graph.record(images):
        raise ModelError(listed(graph.notes))
    return graph


def compiled(model: nn.Module, mode: str, images: Tensor, seconds: float) -> Forward:
    """A model behind `torch.compile`, compiled for these images within a time."""
    forward = compile_model(model, mode)
    with torch.no_grad(), time_limit(seconds):
        forward(images)
    return forward


def training(model: nn.Module, precision: str, mode: str | None = None) -> Forward:
    """A training step: forward by autocast, a loss, backward; the gradients are thrown away."""
    forward = model if mode is None else compile_model(model, mode)

    def step(images: Tensor) -> Tensor:
        half = PRECISIONS[precision]
        with torch.enable_grad():
            with torch.autocast(images.device.type, half, enabled=half != torch.float32):
                logits = forward(images)
            loss = logits.float().square().mean()
            loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def trained(args: argparse.Namespace, device: torch.device, note: Callable[[str], None]) -> Iterator[Row]:
    """The rows of training steps: for each batch size each form, for each form each model."""
    models = {name: model.to(device).train() for name, model in candidates(args).items()}
    size = preprocessing_of(models["dense"]).config["input_size"]
    for batch in args.batch_size:
        images = random_images(models["dense"], (batch, *size), device)
        for mode in (None, *(args.compile_mode if args.compile else ())):
            if mode is None and args.no_eager:
                continue
            form = "training" if mode is None else f"training, compiled ({mode})"

            def make(name: str, mode: str | None = mode) -> Forward:
                return training(models[name], args.precision, mode)

            torch._dynamo.reset()
            yield from in_turns(f"{form}, batch {batch}", form, models, make, images, args, note)


def measured(args: argparse.Namespace, folder: Path, note: Callable[[str], None]) -> Iterator[Row]:
    """All rows: for each batch size each form, for each form each model."""
    device = resolve_device(args.device)
    if args.train:
        yield from trained(args, device, note)
        return
    models = candidates(args)
    size = preprocessing_of(models["dense"]).config["input_size"]
    files = exported(models, folder) if args.onnxruntime else {}
    models = {name: prepared(model, args) for name, model in models.items()}
    eager = models if args.no_naive else models | {f"{NAIVE} {name}": naive(model) for name, model in models.items()}
    for batch in args.batch_size:
        images = random_images(models["dense"], (batch, *size), device)

        def timed(form: str, make: Callable[[str], Forward], images: Tensor = images) -> Iterator[Row]:
            which = eager if form == EAGER else models
            return in_turns(f"{form}, batch {len(images)}", form, which, make, images, args, note)

        if not args.no_eager:
            yield from timed(EAGER, eager.__getitem__)
        if args.capture:
            yield from timed("captured", lambda name, images=images: captured(models[name], images))  # type: ignore[misc]
        for mode in args.compile_mode if args.compile else ():

            def compiling(name: str, mode: str = mode, images: Tensor = images) -> Forward:
                return compiled(models[name], mode, images, args.max_seconds)

            torch._dynamo.reset()
            yield from timed(f"compiled ({mode})", compiling)
        if files:
            yield from timed(ONNX, lambda name: onnx_forward(files[name], device))


def main() -> None:
    """Times everything, here or in several processes, and prints the table."""
    args = parse()
    versions = {ONNX: importlib.import_module(ONNX).__version__} if args.onnxruntime else {}
    set_fused_attn(True)
    # Compiling one model after another must not run into the limit of recompilations of a single one.
    with tempfile.TemporaryDirectory() as temporary, torch._dynamo.config.patch(cache_size_limit=64):
        folder = args.onnx_folder or Path(temporary)
        shared = ["--onnx-folder", str(folder)]
        timed_table("speed", args, COLUMNS, partial(measured, args, folder), versions=versions, shared=shared)
