"""What a model costs, dense and compressed: multiply-adds, parameters, seconds, and where they go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokencut import cost
from tokencut.adapters import plain_model
from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import ModelError, UsageError
from tokencut.limits import check_number
from tokencut.model import CompressedModel, predicted_macs
from tokencut.models.pretrained_cfg import name_of
from tokencut.observers import Observer
from tokencut.profiling.counting import MacCount, count_macs
from tokencut.profiling.latency import Forward, Timing, measure, share_of_time, speedup
from tokencut.profiling.report import Figures, ProfileReport
from tokencut.runtime.compiling import check_mode, compile_model
from tokencut.runtime.devices import (
    describe_device,
    enough_memory,
    inference_state,
    precision_dtype,
    resolve_device,
    versions,
    weights_dtype,
)

# The smallest batch at which two CPU cores and small models are held up by arithmetic rather than by calls; at 1 the
# figure would say more about Python than about the model.
DEFAULT_BATCH_SIZE = 16
# Timing noise of a quiet machine: a ratio nearer to 1 is not a speed-up.
NOISE = 0.02
# Half of the rounds lie within 1 to 5 % on a quiet machine; where it is so much more, times say little.
BUSY = 0.2


def profile(
    model: nn.Module,
    *,
    latency: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    rounds: int = 21,
    compile_mode: str | None = None,
    name: str | None = None,
    observer: Observer | None = None,
) -> ProfileReport:
    """Counts and times a model, dense and compressed side by side; the model stays as it was.

    Multiply-adds are counted by fvcore on a trace, at one image. Times are medians over rounds in which dense and
    compressed alternate, on random images, with timm's own forward (fused attention) as the dense side.

    Args:
        model: A compressed model, or any timm model: then dense and compressed are the same.
        latency: Whether to time it.
        batch_size: Images in a forward that is timed.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
        rounds: How many samples of each to take, at least 3; fewer are taken of large models, that it may end.
        compile_mode: Time both through `torch.compile` in this mode, such as `default`.
        name: What the report calls the model; by default its architecture and tag.
        observer: Told rounds done and rounds in all.

    Returns:
        The report.

    Raises:
        UsageError: An argument is out of range.
        ModelError: The model does not take images, or cannot be compiled.
        TokencutError: The batch does not fit into memory.

    Example:
        >>> import timm, tokencut
        >>> model = tokencut.compress(timm.create_model("test_vit"), keep=0.5, layers=[2, 4])
        >>> report = tokencut.profile(model, latency=False)
        >>> f"{report.dense.gmacs:.3f} becomes {report.compressed.gmacs:.3f} GMACs"
        '0.038 becomes 0.022 GMACs'
    """
    check_number("batch_size", batch_size)
    if hasattr(model, "_orig_mod"):
        raise UsageError("profile times a compiled model beside the compiled dense one, so it compiles both; pass "
                         "`model._orig_mod` and `compile_mode='default'`")  # fmt: skip
    model = plain_model(model)
    target, size = resolve_device(device), preprocessing_of(model).config["input_size"]
    dtype = precision_dtype(precision)
    if compile_mode is not None:
        check_mode(compile_mode)
    recipe = model.recipe if isinstance(model, CompressedModel) else None
    inner = model.model if isinstance(model, CompressedModel) else model
    before, after = count_macs(inner, size), count_macs(model, size)
    timed, called = _Timed(), name or name_of(model)
    if latency:
        smaller = f"type `batch_size={batch_size // 2}`" if batch_size > 1 else "take a smaller model or `device='cpu'`"
        with enough_memory(batch_size, target, smaller), inference_state(model, target, dtype):
            images = random_images(model, (batch_size, *size), target)
            timed = _time(model, inner, images, rounds, compile_mode, observer, f"timing {called}")
    dense, compressed = _figures(inner, before, timed.dense), _figures(model, after, timed.compressed)
    ratio, spread = speedup(timed.dense, timed.compressed) if timed.dense and timed.compressed else (None, None)
    blocks = _blocks(model)
    return ProfileReport(
        model=called,
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
        versions=versions(),
        speedup_spread=spread,
        stage_share=timed.stage_share,
        uncounted={**before.uncounted, **after.uncounted},
        not_counted=after.ignored,
        blocks=blocks,
        notes=(
            *time_notes(ratio if recipe and recipe.stages else None, timed.dense, timed.compressed),
            *_count_notes(after, blocks),
        ),
        compile_mode=compile_mode if latency else None,
    )


@dataclass(frozen=True)
class _Timed:
    """What was timed; all None where nothing was."""

    dense: Timing | None = None
    compressed: Timing | None = None
    stage_share: float | None = None


def _time(
    model: nn.Module,
    inner: nn.Module,
    images: Tensor,
    rounds: int,
    compile_mode: str | None,
    observer: Observer | None,
    task: str,
) -> _Timed:
    sides: dict[str, nn.Module] = {"dense": inner, "compressed": model} if model is not inner else {"dense": inner}
    forwards: dict[str, Forward] = dict(sides)
    if compile_mode is not None:
        forwards = {name: compile_model(side, compile_mode) for name, side in sides.items()}
        with torch.no_grad():
            for forward in forwards.values():
                forward(images)  # compiles: that time is not the model's
    timings = measure(forwards, images, rounds=rounds, observer=observer, task=task)
    if not isinstance(model, CompressedModel):
        return _Timed(timings["dense"], timings["dense"], None if compile_mode else 0.0)
    # Compiled stages are part of one graph, and have no beginning and no end.
    share = None if compile_mode else share_of_time(model, model.stages.values(), images)
    return _Timed(timings["dense"], timings["compressed"], share)


def _figures(model: nn.Module, count: MacCount, timing: Timing | None) -> Figures:
    return Figures.of(count.total / 1e9, sum(weight.numel() for weight in model.parameters()), timing)


def _blocks(model: nn.Module) -> tuple[cost.BlockRow, ...]:
    try:
        return predicted_macs(model)
    except ModelError:
        return ()


def time_notes(ratio: float | None, *timings: Timing | None) -> tuple[str, ...]:
    """What a user should know of times.

    Args:
        ratio: The speed-up that a reduction gives; None where there is none to be had or nothing was timed.
        timings: What was timed.
    """
    notes = []
    if ratio is not None and ratio < 1 + NOISE:
        notes.append(f"no speed-up on this machine: compressed is {ratio:.2f} times as fast as dense")
    spread = max((timing.relative_spread for timing in timings if timing), default=0.0)
    if spread > BUSY:
        notes.append(f"times differ by {spread:.0%} from round to round, so this machine has other work; "
                     "run it again when it is quiet")  # fmt: skip
    return tuple(notes)


def _count_notes(count: MacCount, blocks: tuple[cost.BlockRow, ...]) -> tuple[str, ...]:
    if count.uncounted:
        names = ", ".join(f"{runs} x {kind}" for kind, runs in sorted(count.uncounted.items()))
        return (f"the multiply-adds leave out operators that tokencut has no count for: {names}",)
    if blocks and cost.total(blocks) != count.total:
        return (f"the closed form gives {cost.total(blocks)} multiply-adds where the trace has {count.total}; "
                "please report the model's name and options",)  # fmt: skip
    return ()


def random_images(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise, the same in every run: what a forward costs does not depend on what is in the pictures."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return images.to(device, weights_dtype(model))
