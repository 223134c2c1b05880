"""Do seconds fall as FLOPs do? Dense, compressed and naive models side by side, in one process.

    python examples/benchmarks/speed.py --model deit_small_patch16_224 --keep 0.7 0.5 --batch-size 16
    python examples/benchmarks/speed.py --device cuda --precision bf16 --batch-size 256 1 --compile

Each model is timed in alternating rounds beside timm's dense model with fused attention; figures are medians. The naive
form is what research code does: attention materialised in every block. `kept` is the speed-up divided by the FLOPs
ratio: 1.00 means that seconds fall as far as FLOPs. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn

from tokencut import cost
from tokencut.compression import CompressedModel, compress, predicted_macs
from tokencut.latency import Timing, measure, share_of_time, speedup
from tokencut.reduction import methods
from tokencut.runtime import PRECISIONS, describe_device, resolve_device

COLUMNS = ["model", "form", "batch", "GMACs", "images/s", "ms", "speed-up", "FLOPs-ratio", "kept", "stages"]
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="a timm name")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--methods", nargs="+", default=["bat", "topk", "evit", "tome"], choices=sorted(methods()))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=sorted(PRECISIONS), help="the weights are cast to it")
    parser.add_argument("--compile", action="store_true", help="time torch.compile beside eager")
    parser.add_argument("--compile-mode", default="default", choices=["default", "reduce-overhead", "max-autotune"])
    parser.add_argument("--no-naive", action="store_true", help="leave the naive form out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--max-seconds", type=float, default=60.0, help="per batch size and form")
    parser.add_argument("-o", "--output", type=Path, help="write the Markdown table to this file as well")
    return parser.parse_args()


def candidates(args: argparse.Namespace, device: torch.device) -> dict[str, nn.Module]:
    """The dense model, and a compressed one for each method and keep rate, cast and in eval mode."""
    torch.manual_seed(0)
    dense = timm.create_model(args.model, pretrained=False).eval()
    models: dict[str, nn.Module] = {"dense": dense}
    for method in args.methods:
        for keep in args.keep:
            models[f"{method} {keep}"] = compress(dense, keep=keep, method=method)
    return {name: model.to(device, PRECISIONS[args.precision]).eval() for name, model in models.items()}


def naive(model: nn.Module) -> nn.Module:
    """A copy whose attention is materialised in every block that timm runs."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return copied


def gmacs(model: nn.Module) -> float:
    """Billions of multiply-adds per image, by the closed form."""
    if isinstance(model, CompressedModel):
        return cost.total(predicted_macs(model)) / 1e9
    return cost.total(predicted_macs(compress(model, keep=1.0))) / 1e9


def rows(
    form: str, models: dict[str, nn.Module], forwards: dict[str, Callable[[Tensor], object]], images: Tensor,
    args: argparse.Namespace,
) -> list[str]:  # fmt: skip
    """Times one form of all models; every ratio is to the first of `forwards`, timm's fused dense model."""
    timings: dict[str, Timing] = measure(forwards, images, rounds=args.rounds, max_seconds=args.max_seconds)
    reference, dense_gmacs, lines = next(iter(timings.values())), gmacs(models["dense"]), []
    for name, timing in timings.items():
        model = models[name.removeprefix("naive ")]
        faster, flops = speedup(reference, timing)[0], dense_gmacs / gmacs(model)
        stages = ""
        if form == "eager" and isinstance(model, CompressedModel) and not name.startswith("naive"):
            stages = f"{100 * share_of_time(model, model.stages.values(), images):.1f} %"
        lines.append(
            f"| {name} | {form} | {images.shape[0]} | {gmacs(model):.3f} | {timing.images_per_second:,.0f} | "
            f"{timing.median_ms:.2f} | {faster:.2f} | {flops:.2f} | {faster / flops:.2f} | {stages} |"
        )
    return lines


def main() -> None:
    args = parse()
    device = resolve_device(args.device)
    models = candidates(args, device)
    lines = [f"{args.model}, {describe_device(device)}, {args.precision}, torch {torch.__version__}, "
             f"timm {timm.__version__}", "", HEADER]  # fmt: skip
    size = timm.data.resolve_model_data_config(models["dense"])["input_size"]
    for batch in args.batch_size:
        images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)).to(device)
        images = images.to(PRECISIONS[args.precision] or torch.float32)
        forwards: dict[str, Callable[[Tensor], object]] = dict(models)
        if not args.no_naive:
            forwards |= {f"naive {name}": naive(model) for name, model in models.items()}
        lines += rows("eager", models, forwards, images, args)
        if args.compile:
            torch._dynamo.reset()
            mode = None if args.compile_mode == "default" else args.compile_mode
            compiled = {name: torch.compile(model, fullgraph=True, mode=mode) for name, model in models.items()}
            lines += rows(f"compiled ({args.compile_mode})", models, compiled, images, args)
    table = "\n".join(lines) + "\n"
    sys.stdout.write(table)
    if args.output:
        args.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    # Compiling one model after another must not run into the limit of recompilations of a single one.
    torch._dynamo.config.cache_size_limit = 64
    set_fused_attn(True)
    main()
