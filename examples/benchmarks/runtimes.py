"""Do exported files give torch's logits in their runtimes, and how fast are they there? On real images.

    python examples/benchmarks/run.py runtimes local-dir:FOLDER --data val.tar --kinds onnx openvino --keep 0.7 0.5
    python examples/benchmarks/run.py runtimes deit_small --data val.tar --no-pretrained --methods bat topk --rounds 15

Each method at each keep rate is written once a kind of file, for any number of images where the runtime allows that,
and run on the images in batches of each size. `equal` says whether every logit is torch's to 1e-4 and every most likely
class the same. With `--rounds` the files are timed in turns with the dense model's, by medians, with as many threads as
OMP_NUM_THREADS says; `kept` is the speed-up divided by the ratio of multiply-adds.

The method `first`, which is none of the library's, keeps the first tokens: what it keeps of the ratio is what blocks on
fewer tokens allow, without any decision.

`openvino-onnx` is the .onnx, read by OpenVINO; `bf16` behind a kind of OpenVINO's leaves out that it computes in fp32.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from options import IMAGES
from tables import markdown
from timing import ProcessClock
from torch import Tensor, nn

from tokencut.data.image_set import images_for
from tokencut.data.sources import open_source
from tokencut.errors import TokencutError
from tokencut.export.run import export_model
from tokencut.export.runtimes import open_exported, runtimes
from tokencut.export.runtimes.openvino import EXACT
from tokencut.methods import Method, Selection, StageInput, StageShape, register
from tokencut.model import compress, predicted_gmacs
from tokencut.models.loading import load_model
from tokencut.ops.exporting import numbers
from tokencut.profiling.latency import Clock, measure
from tokencut.runtime.compiling import in_batches
from tokencut.runtime.devices import describe_device


@dataclass(frozen=True)
class First(Method):
    """The first tokens stay, whatever they hold."""

    name = "first"
    source = "none"
    prop_attn = False

    def decide(self, stage_input: StageInput, budget: int) -> Selection:
        tokens = stage_input.tokens.image
        return Selection(numbers(tokens, budget).expand(tokens.shape[0], -1))

    def macs(self, shape: StageShape) -> int:
        return 0

    def merges(self) -> bool:
        return False

    def reads_attention(self) -> bool:
        return False


TOLERANCE = 1e-4
METHODS = ("bat", "tome", "evit", "topk", "dpc", "kmedoids")
BF16, ONNX_IN_OPENVINO = "-bf16", "openvino-onnx"
Forward = Callable[[Tensor], Tensor]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as every tokencut command takes it: a timm name, local-dir:FOLDER, digits")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights, where only times matter")
    parser.add_argument("--data", required=True, help=IMAGES)
    parser.add_argument("--limit", type=int, default=64, help="an evenly spread sample of so many")
    parser.add_argument("--kinds", nargs="+", default=["onnx", "openvino"], help="names of formats, as export has them")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.7, 0.5])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--one-size", action="store_true", help="files for batches of the first size alone")
    parser.add_argument("--opset", type=int, help="of .onnx files")
    parser.add_argument("--rounds", type=int, help="time the files, by so many samples of each")
    parser.add_argument("--clock", default="wall", choices=["wall", "process"], help="process: with one thread, where "
                        "others use the machine")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, help="a Markdown file; on the screen alone where left out")
    args = parser.parse_args()
    known = {*runtimes(), ONNX_IN_OPENVINO}
    wrong = [kind for kind in args.kinds if kind.removesuffix(BF16) not in known]
    if wrong:
        parser.error(f"unknown kinds {', '.join(wrong)}, expected some of {', '.join(sorted(known))}")
    return args


def written(model: nn.Module, kind: str, folder: Path, opset: int | None, size: int | None = None) -> Path:
    """A file of a kind for so many images, or any number where None, written once; checked on two images of noise."""
    name = "onnx" if kind.removesuffix(BF16) == ONNX_IN_OPENVINO else kind.removesuffix(BF16)
    path = folder / f"model{runtimes()[name].suffix}"
    if not path.exists():
        takes = runtimes()[name].default_opset is not None
        export_model(
            model, path, limit=2, batch_size=size or 2, dynamic_batch=size is None, opset=opset if takes else None
        )
    return path


def opened(path: Path, kind: str) -> Forward:
    """A file of a kind, as something to call."""
    plain = kind.removesuffix(BF16)
    if kind == plain and plain != ONNX_IN_OPENVINO:
        return open_exported(path)
    runtime = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads()} | ({} if kind != plain else EXACT)
    compiled = runtime.Core().compile_model(str(path), "CPU", settings)
    return lambda images: torch.from_numpy(compiled([images.numpy()])[0].copy())


def agreement(name: str, kind: str, forward: Forward, expected: Tensor, images: Tensor, batch: int) -> list[Any]:
    """A row: the largest difference, and the share of equal classes."""
    found = in_batches(forward, images, batch)
    difference = float((found - expected).abs().max())
    same = 100 * float((found.argmax(1) == expected.argmax(1)).float().mean())
    equal = "yes" if difference <= TOLERANCE and same == 100 else "no"
    return [kind, name, batch, f"{difference:.1e}", f"{same:.1f}", equal]


def times(
    kind: str, files: dict[str, Forward], gmacs: dict[str, float], images: Tensor, rounds: int, clock: Clock | None
) -> Iterator[list[Any]]:
    """Rows: each file's time beside the dense one's."""
    taken = measure(files, images, rounds=rounds, max_seconds=60, clock=clock)
    before = taken["dense"].median_ms
    for name, timing in taken.items():
        low, high = timing.spread_ms
        speedup, ratio = before / timing.median_ms, gmacs["dense"] / gmacs[name]
        yield [kind, name, len(images), f"{timing.median_ms:.2f} ({low:.2f} to {high:.2f})", f"{speedup:.2f}",
               f"{ratio:.2f}", f"{speedup / ratio:.2f}"]  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Writes, opens and compares every file; then times them."""
    args = parse()
    register(First)
    dense = load_model(args.model, pretrained=not args.no_pretrained).dense.eval()
    found = images_for(dense, open_source(args.data), limit=args.limit)
    cpu = torch.device("cpu")
    images = torch.cat([
        found.prepared.normalise(batch.images, cpu)
        for batch in found.decoded(32, workers=0, otherwise="name other images")
        if len(batch)
    ])  # fmt: skip
    models: dict[str, nn.Module] = {"dense": dense}
    models |= {f"{method} {keep:g}": compress(dense, keep=keep, method=method).eval()
               for method in args.methods for keep in args.keep}  # fmt: skip
    gmacs = {name: predicted_gmacs(model) for name, model in models.items()}
    expected = {name: in_batches(model, images, 16) for name, model in models.items()}
    rows, timed = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in args.kinds:
            files = {}
            for name, model in models.items():
                folder = Path(temporary) / name.replace(" ", "-")
                folder.mkdir(exist_ok=True)
                began = time.monotonic()
                try:
                    size = args.batch_size[0] if args.one_size else None
                    files[name] = opened(written(model, kind, folder, args.opset, size), kind)
                    rows += [agreement(name, kind, files[name], expected[name], images, b) for b in args.batch_size]
                except TokencutError as error:
                    rows.append([kind, name, None, None, None, str(error)])
                print(f"{kind}, {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            if args.rounds and "dense" in files:
                for batch in args.batch_size:
                    clock = ProcessClock() if args.clock == "process" else None
                    timed += times(kind, files, gmacs, images[:batch], args.rounds, clock)
    about = f"{args.model}, {describe_device(cpu)}, {len(images)} images, {time.strftime('%Y-%m-%d')}"
    head = ("file", "model", "batch", "largest difference", "same class, %", "equal")
    text = f"{about}\n\n{markdown(head, rows)}\n"
    if timed:
        text += "\n" + markdown(("file", "model", "batch", "ms", "speed-up", "FLOPs ratio", "kept"), timed) + "\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
