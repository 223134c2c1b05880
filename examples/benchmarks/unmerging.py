"""How near are un-merged feature maps to the dense model's?

    python examples/benchmarks/run.py unmerging local-dir:FOLDER --data train.tar --limit 64
    python examples/benchmarks/run.py unmerging deit_small --data /imagenet/val --keep 0.7 --methods tome --device cuda

For each method, keep rate and rule, and for each block (1-based) without and with the model's final norm: the relative
error of the map, `||y - dense|| / ||dense||` over all patches, and in brackets the mean cosine similarity of a patch to
the dense model's, both averaged over images. The last column is the last block's error over that of copying.

Rules are the library's `copy` and `change` (`Unmerging` in tokencut/unmerging.py), and two on trial, with all weights
of a softmax over the `--neighbours` tokens behind a stage that are nearest to a patch, whichever it went into: `soft
copy` averages their features (Expedit, arXiv 2210.01035), `soft change` what they changed by. The softmax is over
`-d2 / (temperature * mean d2 of the image)`, so that it does not depend on the features' scale.

A method may be given settings: `bat:features=keys,window=256`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from jobs import Lines
from options import IMAGES, image_parser
from torch import Tensor, nn

from tokencut import compress
from tokencut.data.image_set import HELD_BYTES, HeldBatches, open_images
from tokencut.data.preprocessing import preprocessing_of
from tokencut.features import Intermediates
from tokencut.methods import methods
from tokencut.model import CompressedModel
from tokencut.models.loading import load_model
from tokencut.runtime.devices import describe_device, inference_state, resolve_device
from tokencut.tokens import Tokens
from tokencut.unmerging import UNMERGE_RULES, Unmerging

TRIALS = ["soft copy", "soft change"]
ALL_RULES = ["copy", *(rule for rule in UNMERGE_RULES if rule != "copy"), *TRIALS]


class Softmax(Unmerging):
    """A rule on trial: every patch takes from several tokens behind the last stage."""

    def __init__(self, rule: str, neighbours: int, temperature: float) -> None:
        super().__init__(rule)
        self._neighbours, self._temperature = neighbours, temperature
        self._weights: Tensor | None = None
        self._behind: Tensor | None = None

    def stage(self, entering: Tokens, leaving: Tokens) -> None:
        self._own, self._behind = self.patches(entering), leaving.image
        self._weights = softmax_weights(self._own, self._behind, self._neighbours, self._temperature)

    def patches(self, tokens: Tokens) -> Tensor:
        if self._own is None:
            return tokens.image
        if self._rule == "copy":
            return torch.bmm(self._weights, tokens.image)
        return torch.baddbmm(self._own, self._weights, tokens.image - self._behind)


def softmax_weights(points: Tensor, centres: Tensor, neighbours: int, temperature: float) -> Tensor:
    """What each point takes from each centre, `(B, N, M)`: 0 but for its nearest."""
    shared = points.square().sum(2, keepdim=True) + centres.square().sum(2).unsqueeze(1)
    squared = torch.baddbmm(shared, points, centres.transpose(1, 2), alpha=-2).clamp(min=0)
    near = squared.topk(min(neighbours, centres.shape[1]), dim=2, largest=False)
    weights = (-near.values / (temperature * squared.mean((1, 2), keepdim=True))).softmax(2)
    return torch.zeros_like(squared).scatter(2, near.indices, weights)


def unmerging_of(rule: str, model: CompressedModel, neighbours: int, temperature: float) -> Unmerging:
    """A fresh one for a run."""
    if rule in TRIALS:
        return Softmax(rule.removeprefix("soft "), neighbours, temperature)
    return Unmerging(rule, similar=not model.method.averages())


class Several:
    """An observer that un-merges by several rules in one run."""

    def __init__(self, observers: Sequence[Intermediates]) -> None:
        self._observers = observers

    def stage(self, *told: Any) -> None:
        for observer in self._observers:
            observer.stage(*told)

    def block(self, *told: Any) -> None:
        for observer in self._observers:
            observer.block(*told)


def maps_of(
    model: CompressedModel, pixels: Tensor, blocks: Sequence[int], unmergings: Sequence[Unmerging]
) -> list[list[Tensor]]:
    """For each rule the maps of 1-based blocks, with prefix tokens, without the final norm and with it."""
    observers = [Intermediates([block - 1 for block in blocks], unmerging) for unmerging in unmergings]
    # `forward_intermediates` knows no rules on trial.
    tokens, norm = model.loop.embed(pixels, source=True), model.model.norm
    model.loop.run(tokens, model.recipe.stages_for(tokens.count), Several(observers))
    return [
        [each[:, tokens.num_prefix_tokens :] for one in observer.found for each in (one, norm(one))]
        for observer in observers
    ]


def compare(found: Tensor, dense: Tensor) -> Tensor:
    """Relative error and mean cosine similarity of each image, `(2, B)`."""
    error = (found - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
    return torch.stack((error, torch.cosine_similarity(found, dense, dim=2).mean(1))).double().cpu()


def judge(model: CompressedModel, images: HeldBatches, dense: Sequence[list[Tensor]], device: torch.device,
          args: argparse.Namespace) -> dict[str, Tensor]:  # fmt: skip
    """For each rule error and similarity, `(2 * blocks, 2)`: without the norm and with it, block by block.

    `dense` holds the dense model's maps of each batch, on the CPU.
    """
    judged: dict[str, list[Tensor]] = {rule: [] for rule in args.rules}
    prepared = preprocessing_of(model)
    with inference_state(model, device):
        for batch, wanted in zip(images, dense, strict=True):
            pixels = prepared.normalise(batch.images, device, torch.float32)
            unmergings = [unmerging_of(rule, model, args.neighbours, args.temperature) for rule in judged]
            maps = maps_of(model, pixels, args.blocks, unmergings)
            for rows, found in zip(judged.values(), maps, strict=True):
                pairs = zip(found, wanted, strict=True)
                rows.append(torch.stack([compare(one, other.to(device)) for one, other in pairs]))
    return {rule: torch.cat(rows, 2).mean(2) for rule, rows in judged.items()}


def dense_maps(
    dense: nn.Module, images: HeldBatches, device: torch.device, blocks: Sequence[int]
) -> list[list[Tensor]]:
    """The dense model's maps of each batch, on the CPU."""
    model, maps, prepared = compress(dense, keep=1.0), [], preprocessing_of(dense)
    with inference_state(model, device):
        for batch in images:
            pixels = prepared.normalise(batch.images, device, torch.float32)
            maps.append([each.cpu() for each in maps_of(model, pixels, blocks, [Unmerging("copy")])[0]])
    return maps


def row(method: str, keep: float, rule: str, found: Tensor, copied: Tensor) -> str:
    """A line of the table."""
    cells = [f"{error:.3f} ({cosine:.3f})" for error, cosine in found.tolist()]
    ratios = [f"{float(found[at, 0] / copied[at, 0]):.2f}" for at in (-2, -1)]
    return f"| {' | '.join([method, f'{keep:g}', rule, *cells, ', '.join(ratios)])} |"


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = image_parser(__doc__, data=IMAGES, limit=64, batch_size=16)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    parser.add_argument("--methods", nargs="+", default=["bat", "dpc", "tome", "topk", "evit"], type=method_of,
                        metavar="METHOD[:KEY=VALUE,...]")  # fmt: skip
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 9, 12], help="1-based")
    parser.add_argument("--rules", nargs="+", default=ALL_RULES, choices=ALL_RULES)
    parser.add_argument("--neighbours", type=int, default=8, help="tokens that a softmax is over")
    parser.add_argument("--temperature", type=float, default=0.1, help="of the softmax")
    args = parser.parse_args()
    args.rules = ["copy", *(rule for rule in args.rules if rule != "copy")]  # what the others are held against
    args.blocks = sorted(set(args.blocks))
    return args


def method_of(text: str) -> tuple[str, dict[str, str]]:
    """A method's name and settings."""
    name, _, settings = text.partition(":")
    if name not in methods() or methods()[name].needs_training:
        raise argparse.ArgumentTypeError(f"{name!r} is not a method that works untrained")
    return name, dict(setting.split("=", 1) for setting in settings.split(",") if setting)


@torch.no_grad()
def main() -> None:
    """Judges every method at every keep rate, and prints the table line by line."""
    args = parse()
    dense, device = load_model(args.model).dense.float(), resolve_device(args.device)
    found = open_images(dense, args.data, limit=args.limit, observer=Lines())
    images = found.batches(args.batch_size, device=device, held_bytes=HELD_BYTES)
    wanted = dense_maps(dense, images, device, args.blocks)
    print(f"{args.model}, {len(found):,} images of {args.data}, fp32, on {describe_device(device)}: error "
          "(cosine similarity)\n")  # fmt: skip
    columns = [name for block in args.blocks for name in (f"block {block}", "normed")]
    columns = ["method", "keep", "rule", *columns, "last over copy"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for method, options in args.methods:
        for keep in args.keep:
            model = compress(dense, keep=keep, method=method, method_options=options)
            judged = judge(model, images, wanted, device, args)
            for rule, found in judged.items():
                print(row(method, keep, rule, found, judged["copy"]), flush=True)
