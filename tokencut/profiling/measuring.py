"""What a model costs, dense and compressed: multiply-adds, parameters, seconds, and where they go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tokencut import cost
from tokencut.adapters import known_adapter, plain_model
from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import ModelError, UsageError
from tokencut.limits import check_number
from tokencut.model import CompressedModel, predicted_macs, require_one_schedule
from tokencut.models.pretrained_cfg import name_of
from tokencut.observers import Observer
from tokencut.over_frames import OverFrames, of_images
from tokencut.profiling.counting import MacCount, count_macs
from tokencut.profiling.latency import Forward, Timing, measure, share_of_time, speedup
from tokencut.profiling.report import Figures, ProfileReport
from tokencut.recipe import Recipe
from tokencut.runtime.capturing import CapturedModel
from tokencut.runtime.compiling import check_form, compile_model
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
# Multiply-adds an image, in units of 1e9, below which a forward is mostly fixed cost: a DeiT-T has 1.25, `digits` 0.03.
SMALL = 0.5
TOO_SMALL = (
    "at {gmacs:.3g} GMACs an image much of its time does not depend on tokens; in a model of 4.6 it falls with them, "
    "as tokencut profile deit_small shows"
)
# Half of the rounds lie within 1 to 5 % on a quiet machine; where it is so much more, times say little.
BUSY = 0.2
# Gaps between kernels of large batches add up to less than a tenth of a forward; where the rest of an eager one takes
# more, the GPU waits for the host.
LAUNCHES = 0.1
# What a few rounds beside the profile's own may take.
REPLAY_ROUNDS, REPLAY_SECONDS = 7, 3.0


def profile(
    model: nn.Module,
    *,
    latency: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    rounds: int = 21,
    compile_mode: str | None = None,
    capture: bool = False,
    name: str | None = None,
    observer: Observer | None = None,
) -> ProfileReport:
    """Counts and times a model, dense and compressed side by side; the model stays as it was.

    Multiply-adds are counted by fvcore on a trace, at one image. Times are medians over rounds in which dense and
    compressed alternate, on random images, with timm's own forward (fused attention) as the dense side. On a GPU it is
    also told whether an eager forward is held up by its work or by starting its kernels.

    Args:
        model: A compressed model, or any timm model: then dense and compressed are the same.
        latency: Whether to time it.
        batch_size: Images in a forward that is timed.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
        rounds: How many samples of each to take, at least 3; fewer are taken of large models, that it may end.
        compile_mode: Time both through `torch.compile` in this mode, such as `default`.
        capture: Time both from CUDA graphs, as `tokencut.capture` runs them; as they are where nothing can be captured,
            with a note.
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
    if isinstance(model, CapturedModel):
        raise UsageError("profile times a captured model beside the captured dense one, so it captures both; pass "
                         "`model.model` and `capture=True`")  # fmt: skip
    model = plain_model(model)
    require_one_schedule(model, "profile")
    target, size = resolve_device(device), preprocessing_of(model).input_shape
    dtype = precision_dtype(precision)
    check_form(compile_mode, capture)
    recipe, inner = _without_stages(model)
    before, after = count_macs(inner, size), count_macs(model, size)
    timed, called = _Timed(), name or name_of(model)
    if latency:
        smaller = f"type `batch_size={batch_size // 2}`" if batch_size > 1 else "take a smaller model or `device='cpu'`"
        with enough_memory(batch_size, target, smaller), inference_state(model, target, dtype):
            images = random_images(model, (batch_size, *size), target)
            timed = _time(model, inner, images, rounds, compile_mode, capture, observer, f"timing {called}")
    dense = _figures(inner, before, timed.dense, timed.replayed.get("dense"))
    compressed = _figures(model, after, timed.compressed, timed.replayed.get("compressed", timed.replayed.get("dense")))
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
            *timed.notes,
            *time_notes(ratio if recipe and recipe.stages else None, timed.dense, timed.compressed, gmacs=dense.gmacs),
            *_bound_notes(dense, compressed, reduces=bool(recipe and recipe.stages), precision=precision),
            *(attention_notes(of_images(inner), target) if latency else ()),
            *_count_notes(after, blocks),
        ),
        compile_mode=compile_mode if latency else None,
        captured=timed.captured,
        launch_bound=is_launch_bound(compressed),
    )


@dataclass(frozen=True)
class _Timed:
    """What was timed; all None where nothing was.

    Attributes:
        dense: The dense model.
        compressed: The compressed one; the same for a plain model.
        stage_share: The share of its time that its stages take.
        captured: Whether they ran from CUDA graphs.
        replayed: Where they did not, the same from graphs, by name, if that can be.
        notes: Why they did not although they should have.
    """

    dense: Timing | None = None
    compressed: Timing | None = None
    stage_share: float | None = None
    captured: bool = False
    replayed: Mapping[str, Timing] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _time(
    model: nn.Module,
    inner: nn.Module,
    images: Tensor,
    rounds: int,
    compile_mode: str | None,
    capture: bool,
    observer: Observer | None,
    task: str,
) -> _Timed:
    sides: dict[str, nn.Module] = {"dense": inner, "compressed": model} if model is not inner else {"dense": inner}
    forwards: dict[str, Forward] = dict(sides)
    graphs: Mapping[str, Forward] = {}
    notes: tuple[str, ...] = ()
    if capture:
        graphs, notes = _captured(sides, images)
        forwards |= graphs
    elif compile_mode is not None:
        forwards = {name: compile_model(side, compile_mode) for name, side in sides.items()}
        with torch.no_grad():
            for forward in forwards.values():
                forward(images)  # compiles: that time is not the model's
    timings = measure(forwards, images, rounds=rounds, observer=observer, task=task)
    eager, share = not graphs and compile_mode is None, None
    if eager:  # else stages are part of one graph, and have no beginning and no end
        seen = of_images(model)
        share = share_of_time(model, seen.stages.values(), images) if isinstance(seen, CompressedModel) else 0.0
    replayed = {} if notes or not eager else _replayed(sides, images, observer, f"{task}, captured")
    return _Timed(timings["dense"], timings.get("compressed", timings["dense"]), share, bool(graphs), replayed, notes)


def _captured(sides: Mapping[str, nn.Module], images: Tensor) -> tuple[dict[str, Forward], tuple[str, ...]]:
    """The same models from CUDA graphs, recorded for such images; none, and why, where one of them cannot be."""
    graphs = {name: CapturedModel(side) for name, side in sides.items()}
    recorded = [graph.record(images) for graph in graphs.values()]
    notes = dict.fromkeys(note for graph in graphs.values() for note in graph.notes)
    return (dict(graphs), ()) if all(recorded) else ({}, tuple(notes))


def _replayed(
    sides: Mapping[str, nn.Module], images: Tensor, observer: Observer | None, task: str
) -> dict[str, Timing]:
    """What the models take from CUDA graphs, which is what the GPU works; nothing where that cannot be measured."""
    graphs = _captured(sides, images)[0] if images.is_cuda else {}
    if not graphs:
        return {}
    return measure(graphs, images, rounds=REPLAY_ROUNDS, max_seconds=REPLAY_SECONDS, observer=observer, task=task)


def _figures(model: nn.Module, count: MacCount, timing: Timing | None, replayed: Timing | None) -> Figures:
    return Figures.of(count.total / 1e9, sum(weight.numel() for weight in model.parameters()), timing, replayed)


def is_launch_bound(figures: Figures) -> bool | None:
    """Whether an eager forward takes clearly longer than from a CUDA graph; None where that was not measured."""
    if figures.latency_ms is None or figures.captured_ms is None:
        return None
    return figures.captured_ms < (1 - LAUNCHES) * figures.latency_ms


def _without_stages(model: nn.Module) -> tuple[Recipe | None, nn.Module]:
    """What is done to a model, and the same without it."""
    if isinstance(model, CompressedModel):
        return model.recipe, model.model
    if isinstance(model, OverFrames):
        recipe, inner = _without_stages(model.model)
        return recipe, model if recipe is None else OverFrames(inner, model.frames)
    return None, model


def _blocks(model: nn.Module) -> tuple[cost.BlockRow, ...]:
    frames = model.frames if isinstance(model, OverFrames) else 1
    try:
        rows = predicted_macs(of_images(model))
    except ModelError:
        return ()
    return tuple(replace(row, macs=row.macs * frames, stage_macs=row.stage_macs * frames) for row in rows)


def time_notes(ratio: float | None, *timings: Timing | None, gmacs: float | None = None) -> tuple[str, ...]:
    """What a user should know of times.

    Args:
        ratio: The speed-up that a reduction gives; None where there is none to be had or nothing was timed.
        timings: What was timed.
        gmacs: Multiply-adds an image of the dense model, in units of 1e9, where it was timed as it was built.
    """
    notes = []
    if ratio is not None and ratio < 1 + NOISE:
        small = gmacs is not None and gmacs < SMALL
        notes.append(f"no speed-up on this machine: compressed is {ratio:.2f} times as fast as dense"
                     + (f"; {TOO_SMALL.format(gmacs=gmacs)}" if small else ""))  # fmt: skip
    spread = max((timing.relative_spread for timing in timings if timing), default=0.0)
    if spread > BUSY:
        notes.append(f"times differ by {spread:.0%} from round to round, so this machine has other work; "
                     "run it again when it is quiet")  # fmt: skip
    return tuple(notes)


def _bound_notes(dense: Figures, compressed: Figures, *, reduces: bool, precision: str) -> tuple[str, ...]:
    """In a sentence, what holds up an eager forward on a GPU, and what to do; none where it was not measured."""
    eager, replayed = compressed.latency_ms, compressed.captured_ms
    if eager is None or replayed is None:
        return ()
    if is_launch_bound(compressed):
        gain = dense.captured_ms / replayed if reduces and dense.captured_ms else None
        beside = "" if gain is None else f" ({gain:.2f} times as fast as dense)"
        return (f"launch-bound: the GPU works {replayed:.2f} of {eager:.2f} ms a batch, and else waits for kernels to "
                f"be started; type `capture=True` for CUDA graphs{beside}, or a larger `batch_size`",)  # fmt: skip
    fewer = "a lower `keep`" if reduces else "`tokencut.compress(model)`"
    faster = "`precision='bf16'`" if precision == "fp32" else "`compile_mode='default'`"
    return (f"compute-bound: the GPU works all the time, which {fewer} or {faster} shortens, and `capture` would not",)


def attention_notes(model: nn.Module, device: torch.device) -> tuple[str, ...]:
    """In a sentence, what keeps a GPU from its fastest attention in a model; none on other devices."""
    adapter = known_adapter(model) if device.type == "cuda" else None
    note = None if adapter is None else adapter.attention_note(model)
    return () if note is None else (note,)


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
