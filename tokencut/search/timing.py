"""Where a search for seconds takes them from: the device, batch size, precision and form that times hold for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokencut.data.preprocessing import preprocessing_of
from tokencut.model import CompressedModel
from tokencut.observers import Observer
from tokencut.profiling.latency import Forward, Timing, measure
from tokencut.profiling.measuring import random_images
from tokencut.runtime.capturing import CapturedModel, record_calls
from tokencut.runtime.compiling import compile_calls, compile_model, many_compiled
from tokencut.runtime.devices import describe_device, versions

# How the parts of a model are compiled where the whole is so: CUDA graphs are recorded of them afterwards, since those
# that torch records for a part copy what enters it.
PART_MODES = {"max-autotune": "max-autotune-no-cudagraphs"}
WITH_GRAPHS = ("reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class Conditions:
    """What times hold for.

    Attributes:
        device: Its name, and a processor's threads.
        form: `eager`, `compiled (MODE)` or `captured`, as models were really timed.
        batch_size: Images a forward.
        precision: What the model computes in.
        versions: Of torch, timm and tokencut.
    """

    device: str
    form: str
    batch_size: int
    precision: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """A schedule beside the dense model, the two timed in turns; milliseconds for one batch."""

    dense_ms: float
    found_ms: float

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense model it is."""
        return self.dense_ms / self.found_ms


class Bench:
    """Times a model, its parts and its schedules; use it in the model's `inference_state`.

    Attributes:
        images: The batch that forwards are timed on, `(B, C, H, W)`.
        notes: What a user should know of the form: why nothing is captured.
    """

    def __init__(
        self, model: CompressedModel, *, batch_size: int, device: torch.device, precision: str = "fp32",
        compile_mode: str | None = None, capture: bool = False,
    ) -> None:  # fmt: skip
        """Brings the dense model into its form.

        Args:
            model: The model with its method.
            batch_size: Images a forward.
            device: Where it runs.
            precision: What it is cast to, for `conditions`.
            compile_mode: The mode of `torch.compile`; None for not at all.
            capture: Whether it runs from CUDA graphs.
        """
        self.images = random_images(model, (batch_size, *preprocessing_of(model).input_shape), device)
        self.notes: dict[str, None] = {}
        self._device, self._precision = device, precision
        self._compile_mode, self._capture = compile_mode, capture
        self.dense = self.formed(model.model)

    @property
    def captured(self) -> bool:
        """Whether models run from CUDA graphs that `tokencut.capture` records."""
        return self._capture and not self.notes

    @property
    def conditions(self) -> Conditions:
        """What the times hold for."""
        compiled = "eager" if self._compile_mode is None else f"compiled ({self._compile_mode})"
        form = "captured" if self.captured else compiled
        return Conditions(describe_device(self._device), form, len(self.images), self._precision, versions())

    def formed(self, model: nn.Module) -> Forward:
        """A model in the form in which it is timed."""
        if self._capture:
            made = CapturedModel(model)
            made.record(self.images)
            self.notes |= dict.fromkeys(made.notes)
            return made if self.captured else model
        if self._compile_mode is None:
            return model
        compiled = compile_model(model, self._compile_mode)
        with torch.no_grad(), many_compiled():
            compiled(self.images)  # compiles: that time is not the model's
        return compiled

    def formed_parts(
        self, parts: Mapping[str, Callable[[], object]], observer: Observer | None = None
    ) -> Mapping[str, Callable[[], object]]:
        """Parts of the model in that form, each a call that gives tensors; the observer is told how many are compiled.

        Raises:
            ModelError: One cannot be compiled.
        """
        graphs = self.captured
        if self._compile_mode is not None:
            parts = compile_calls(parts, PART_MODES.get(self._compile_mode, "default"), observer)
            graphs = self._device.type == "cuda" and self._compile_mode in WITH_GRAPHS
        return record_calls(parts, self._device) if graphs else parts

    @property
    def few(self) -> bool:
        """Whether each part takes long to prepare, so that few should be timed."""
        return self._compile_mode is not None

    def times(
        self, forwards: Mapping[str, Forward], *, task: str, observer: Observer | None = None, **how: Any
    ) -> dict[str, Timing]:
        """Times whole models, or parts of one, in turns."""
        return measure(forwards, self.images, observer=observer, task=task, **how)

    def beside_dense(self, model: nn.Module, observer: Observer | None = None) -> Measured:
        """Times a model and the dense one in turns."""
        forwards = {"dense": self.dense, "compressed": self.formed(model)}
        times = self.times(forwards, task="timing the schedule", observer=observer)
        return Measured(times["dense"].median_ms, times["compressed"].median_ms)
