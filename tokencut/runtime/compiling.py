"""`torch.compile` for a model, and running in batches of one size what was made for just that size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from tokencut.errors import ModelError, UsageError
from tokencut.messages import one_line
from tokencut.model import CompressedModel, require_one_schedule
from tokencut.observers import Observer

# torch's own names; reduce-overhead captures CUDA graphs.
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
# Where it has compiled one function more often, of whatever models, torch fails or falls back to uncompiled code.
MANY = 256


def check_mode(mode: str) -> None:
    """Refuses a mode of `torch.compile` that there is not.

    Raises:
        UsageError: With those there are.
    """
    if mode not in COMPILE_MODES:
        raise UsageError(f"unknown compile mode {mode!r}, expected one of {', '.join(COMPILE_MODES)}; type "
                         "`compile_mode='default'`")  # fmt: skip


def check_form(compile_mode: str | None, capture: bool) -> None:
    """Refuses what does not say in which form a model runs.

    Args:
        compile_mode: The mode of `torch.compile`; None for not at all.
        capture: Whether it runs from CUDA graphs.

    Raises:
        UsageError: There is no such mode, or both are asked for.
    """
    if compile_mode is not None:
        check_mode(compile_mode)
        if capture:
            raise UsageError("`capture` and `compile_mode` are two ways to run a model, expected one of them; type "
                             "`compile_mode='reduce-overhead'`, which compiles it and captures that")  # fmt: skip


def compile_model(model: nn.Module, mode: str = "default") -> Callable[[Tensor], Tensor]:
    """Compiles a model, for batches of one size: another size, mode or precision compiles it once more.

    A compressed model is captured as one graph, or fails; timm's own models may have breaks.

    Args:
        model: Dense or compressed; it stays as it is.
        mode: One of `COMPILE_MODES`.

    Returns:
        A function from images to logits. Its first call compiles, which takes from seconds to minutes. With
        `reduce-overhead` the logits hold until the next call.

    Raises:
        UsageError: There is no such mode.
    """
    check_mode(mode)
    require_one_schedule(model, "compile_model")
    compiled = torch.compile(model, fullgraph=isinstance(model, CompressedModel), dynamic=False, mode=mode)

    def forward(images: Tensor) -> Tensor:
        with _told():
            logits: Tensor = compiled(images)
        return logits

    return forward


def compile_calls(
    calls: Mapping[str, Callable[[], object]], mode: str = "default", observer: Observer | None = None
) -> dict[str, Callable[[], object]]:
    """Compiles calls that give tensors, each as one graph, and makes each once.

    Args:
        calls: What to compile, by name.
        mode: Any of torch's names.
        observer: Told how many are compiled.

    Raises:
        ModelError: One cannot be compiled.
    """
    made: dict[str, Callable[[], object]] = {}
    with _told(), torch.no_grad(), many_compiled():
        for name, call in calls.items():
            made[name] = torch.compile(call, fullgraph=True, dynamic=False, mode=mode)
            made[name]()
            if observer is not None:
                observer.progress("compiling the model's parts", len(made), len(calls), {})
    return made


@contextlib.contextmanager
def many_compiled() -> Iterator[None]:
    """For a while, lets torch compile one function for many models."""
    import torch._dynamo.config as config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    many = max(MANY, getattr(config, name))
    with config.patch({name: many, f"accumulated_{name}": max(many, getattr(config, f"accumulated_{name}"))}):
        yield


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns what torch says of what it cannot compile into an error that says what to do."""
    from torch._dynamo.exc import TorchDynamoException  # a second and more, which only this needs

    try:
        yield
    except TorchDynamoException as error:
        reason = one_line(str(error).partition("\n")[0])
        raise ModelError(f"torch.compile failed ({reason}); it needs a C++ compiler on a CPU and Triton on a GPU: "
                         "install that, or leave out `compile_mode`") from error  # fmt: skip


def in_batches(forward: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """Calls a model with batches of exactly one size.

    Args:
        forward: From `(size, C, H, W)` to one row an image.
        images: Any number of images but none, `(B, C, H, W)`.
        size: Images in a batch. The last one is filled up by repeating an image, and the surplus rows are dropped.

    Returns:
        One row an image, `(B, ...)`.
    """
    rows = []
    for chunk in images.split(size):
        missing = size - chunk.shape[0]
        filled = torch.cat((chunk, chunk[-1:].expand(missing, -1, -1, -1))) if missing else chunk
        rows.append(forward(filled)[: chunk.shape[0]])
    return rows[0] if len(rows) == 1 else torch.cat(rows)
