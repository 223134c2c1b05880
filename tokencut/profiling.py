"""What a model costs, dense and compressed: multiply-adds, parameters, seconds, and where they go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tokencut import __version__, cost
from tokencut.adapters import adapter_for
from tokencut.compression import CompressedModel, predicted_macs
from tokencut.counting import MacCount, count_macs
from tokencut.errors import ModelError, TokencutError, UsageError
from tokencut.latency import Timing, measure, share_of_time, speedup
from tokencut.preprocessing import preprocessing_of
from tokencut.runtime import autocast, describe_device, inference_state, resolve_device
from tokencut.schedule import StagePlan

# The smallest batch at which two CPU cores and small models are held up by arithmetic rather than by calls; at 1 the
# figure would say more about Python than about the model.
DEFAULT_BATCH_SIZE = 16
# Timing noise of a quiet machine: a ratio nearer to 1 is not a speed-up.
NOISE = 0.02
# Half of the rounds lie within 1 to 5 % on a quiet machine; where it is so much more, times say little.
BUSY = 0.2
# What `cost.BlockRow.block` says where it is no block.
_ROW_NAMES = {0: "embedding", -1: "head"}


@dataclass(frozen=True)
class Figures:
    """The cost of one model.

    Attributes:
        gmacs: Multiply-adds per image, in units of 1e9.
        params: Number of parameters.
        latency_ms: Median time of a forward of one batch, in milliseconds; None where nothing was timed.
        images_per_second: The batch over that time.
        latency_spread_ms: The quartiles around the median, in milliseconds.
        peak_memory_mib: Memory held at the peak of a forward, in MiB; None also where the device does not tell.
    """

    gmacs: float
    params: int
    latency_ms: float | None = None
    images_per_second: float | None = None
    latency_spread_ms: tuple[float, float] | None = None
    peak_memory_mib: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON; what was not measured is not there."""
        return {name: _plain(value) for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ProfileReport:
    """What a profile found.

    Attributes:
        model: The model's name.
        method: The reduction method; None for a model that is not compressed.
        keep: As in the recipe: a number, one a layer, or None with `reduce_by`; 1.0 for a model that is not compressed.
        dense: The model as timm has it.
        compressed: The model with its stages; the same as `dense` for a model that is not compressed.
        flops_reduction: The share of the multiply-adds that is saved: 0.35 is 35 % fewer.
        speedup: Dense time over compressed time; None where nothing was timed.
        stages: The stages, in order.
        device: What it ran on, with its threads.
        precision: `fp32`, `bf16` or `fp16`.
        batch_size: Images in a forward that was timed.
        versions: Of torch, timm and tokencut.
        speedup_spread: The quartiles of the speed-up, round by round.
        stage_share: The share of a compressed forward's time that is spent in its stages.
        uncounted: Operators that nobody has a handle for, with how often they ran: their products are missing from
            `gmacs`. Normally empty.
        not_counted: The operators that by convention are not counted, by group.
        blocks: The compressed model's multiply-adds, row by row, by the closed form; empty for a family that tokencut
            does not know.
        notes: What a user should know.
    """

    model: str
    method: str | None
    keep: float | list[float] | None
    dense: Figures
    compressed: Figures
    flops_reduction: float
    speedup: float | None
    stages: tuple[StagePlan, ...]
    device: str
    precision: str
    batch_size: int
    versions: Mapping[str, str]
    speedup_spread: tuple[float, float] | None
    stage_share: float | None
    uncounted: Mapping[str, int]
    not_counted: Mapping[str, tuple[str, ...]]
    blocks: tuple[cost.BlockRow, ...]
    notes: tuple[str, ...]

    def to_dict(self, by_block: bool = False) -> dict[str, Any]:
        """The report for JSON.

        Args:
            by_block: Whether to add `blocks` and `not_counted`.
        """
        values = {name: _plain(value) for name, value in vars(self).items() if name not in ("blocks", "not_counted")}
        if self.speedup is None:
            del values["speedup_spread"], values["stage_share"]
        if by_block:
            values["blocks"] = [{**asdict(row), "block": _ROW_NAMES.get(row.block, row.block)} for row in self.blocks]
            values["not_counted"] = _plain(self.not_counted)
        return values


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Figures):
        return value.to_dict()
    if isinstance(value, StagePlan):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def profile(
    model: nn.Module,
    *,
    latency: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    rounds: int = 21,
    name: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ProfileReport:
    """Counts and times a model, dense and compressed side by side; the model stays as it was.

    Multiply-adds are counted by fvcore on a trace, at one image. Times are medians over rounds in which dense and
    compressed alternate, on random images, with timm's own forward (fused attention) as the dense side.

    Args:
        model: A compressed model, or any timm model: then dense and compressed are the same.
        latency: Whether to time it.
        batch_size: Images in a forward that is timed.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16` by autocasting.
        rounds: How many samples of each to take, at least 3; fewer are taken of large models, that it may end.
        name: What the report calls the model; by default its architecture and tag.
        on_progress: Told rounds done and rounds in all.

    Returns:
        The report.

    Raises:
        UsageError: An argument is out of range.
        ModelError: The model does not take images.
        TokencutError: The batch does not fit into memory.
    """
    if batch_size < 1:
        raise UsageError(f"a batch size of {batch_size} is too small, expected at least 1; "
                         f"type --batch-size {DEFAULT_BATCH_SIZE}")  # fmt: skip
    target, size = resolve_device(device), preprocessing_of(model).config["input_size"]
    precise = autocast(target, precision)
    recipe = model.recipe if isinstance(model, CompressedModel) else None
    inner = model.model if isinstance(model, CompressedModel) else model
    before, after = count_macs(inner, size), count_macs(model, size)
    timed = _Timed()
    if latency:
        with _enough_memory(batch_size), inference_state(model, target), precise:
            timed = _time(model, inner, _random_images(model, (batch_size, *size), target), rounds, on_progress)
    dense, compressed = _figures(inner, before, timed.dense), _figures(model, after, timed.compressed)
    ratio, spread = speedup(timed.dense, timed.compressed) if timed.dense and timed.compressed else (None, None)
    blocks = _blocks(model)
    return ProfileReport(
        model=name or _name(model),
        method=recipe.method if recipe else None,
        keep=recipe.keep if recipe else 1.0,
        dense=dense,
        compressed=compressed,
        flops_reduction=1 - after.total / before.total,
        speedup=ratio,
        stages=recipe.stages if recipe else (),
        device=describe_device(target),
        precision=precision,
        batch_size=batch_size,
        versions={"torch": torch.__version__, "timm": timm.__version__, "tokencut": __version__},
        speedup_spread=spread,
        stage_share=timed.stage_share,
        uncounted={**before.uncounted, **after.uncounted},
        not_counted=after.ignored,
        blocks=blocks,
        notes=_notes(after, blocks, ratio if recipe and recipe.stages else None, timed),
    )


@dataclass(frozen=True)
class _Timed:
    """What was timed; all None where nothing was."""

    dense: Timing | None = None
    compressed: Timing | None = None
    stage_share: float | None = None


def _time(
    model: nn.Module, inner: nn.Module, images: Tensor, rounds: int, on_progress: Callable[[int, int], None] | None
) -> _Timed:
    if not isinstance(model, CompressedModel):
        alone = measure({"dense": model}, images, rounds=rounds, on_round=on_progress)["dense"]
        return _Timed(alone, alone, 0.0)
    both = measure({"dense": inner, "compressed": model}, images, rounds=rounds, on_round=on_progress)
    return _Timed(both["dense"], both["compressed"], share_of_time(model, model.stages.values(), images))


def _figures(model: nn.Module, count: MacCount, timing: Timing | None) -> Figures:
    gmacs, params = count.total / 1e9, sum(weight.numel() for weight in model.parameters())
    if timing is None:
        return Figures(gmacs, params)
    return Figures(gmacs, params, timing.median_ms, timing.images_per_second, timing.spread_ms, timing.peak_memory_mib)


def _blocks(model: nn.Module) -> tuple[cost.BlockRow, ...]:
    if isinstance(model, CompressedModel):
        return predicted_macs(model)
    try:
        return cost.predict(adapter_for(model).cost(model), {})
    except ModelError:
        return ()


def _notes(count: MacCount, blocks: tuple[cost.BlockRow, ...], ratio: float | None, timed: _Timed) -> tuple[str, ...]:
    notes = []
    if ratio is not None and ratio < 1 + NOISE:
        notes.append(f"no speed-up on this machine: compressed is {ratio:.2f} times as fast as dense")
    spread = max((timing.relative_spread for timing in (timed.dense, timed.compressed) if timing), default=0.0)
    if spread > BUSY:
        notes.append(f"times differ by {spread:.0%} from round to round, so this machine has other work; "
                     "run it again when it is quiet")  # fmt: skip
    if count.uncounted:
        names = ", ".join(f"{runs} x {kind}" for kind, runs in sorted(count.uncounted.items()))
        notes.append(f"the multiply-adds leave out operators that tokencut has no count for: {names}")
    elif blocks and cost.total(blocks) != count.total:
        notes.append(f"the closed form gives {cost.total(blocks)} multiply-adds where the trace has {count.total}; "
                     "please report the model's name and options")  # fmt: skip
    return tuple(notes)


def _random_images(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise, the same in every run: what a forward costs does not depend on what is in the pictures."""
    floating = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return images.to(device, next(floating, torch.float32))


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    parts = (config.get("architecture") or type(model).__name__, config.get("tag"))
    return ".".join(part for part in parts if part)


@contextlib.contextmanager
def _enough_memory(batch_size: int) -> Iterator[None]:
    """Turns running out of memory, for which every device has its own error, into one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        smaller = f"type --batch-size {batch_size // 2}" if batch_size > 1 else "take a smaller model or --device cpu"
        raise TokencutError(f"a batch of {batch_size} does not fit into memory; {smaller}") from error
