"""What a profile reports: a model's cost, dense and compressed side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokencut import cost
from tokencut.profiling.latency import Timing
from tokencut.schedule import StagePlan

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
        peak_memory_mib: Memory held at the peak of a forward, weights included, in MiB; None also where it cannot be
            told.
        captured_ms: Median time of the same forward replayed from a CUDA graph, in milliseconds: of an eager one on a
            GPU, so that it can be told what the GPU works; else None.
    """

    gmacs: float
    params: int
    latency_ms: float | None = None
    images_per_second: float | None = None
    latency_spread_ms: tuple[float, float] | None = None
    peak_memory_mib: float | None = None
    captured_ms: float | None = None

    @classmethod
    def of(cls, gmacs: float, params: int, timing: Timing | None, captured: Timing | None = None) -> Figures:
        """The figures of a model that took this long, and this long from a CUDA graph; None for what was not timed."""
        if timing is None:
            return cls(gmacs, params)
        return cls(gmacs, params, timing.median_ms, timing.images_per_second, timing.spread_ms, timing.peak_memory_mib,
                   None if captured is None else captured.median_ms)  # fmt: skip

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
        compile_mode: torch's name for how the models were compiled; None where they ran as they are.
        captured: Whether they ran from CUDA graphs.
        launch_bound: Whether an eager forward on a GPU takes clearly longer than its work there, since kernels are
            started one by one; None where that was not measured.
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
    compile_mode: str | None = None
    captured: bool = False
    launch_bound: bool | None = None

    def to_dict(self, by_block: bool = False) -> dict[str, Any]:
        """The report for JSON.

        Args:
            by_block: Whether to add `blocks` and `not_counted`.
        """
        values = {name: _plain(value) for name, value in vars(self).items() if name not in ("blocks", "not_counted")}
        if self.compressed.latency_ms is None:
            for name in ("speedup_spread", "stage_share", "compile_mode", "captured", "launch_bound"):
                del values[name]
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
