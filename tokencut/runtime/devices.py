"""Where and how a model runs: devices, batches, precisions, versions, and leaving the model as it was found."""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import timm
import torch
from torch import nn

from tokencut.composite import is_composite
from tokencut.errors import TokencutError, UsageError
from tokencut.version import __version__

# What weights are cast to; None: as they are.
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def available_devices() -> tuple[str, ...]:
    """The names of this machine's devices, `cpu` first, the fastest kind last."""
    mps = ["mps"] if torch.backends.mps.is_available() else []
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ("cpu", *mps, *gpus)


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of a name.

    Args:
        name: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        UsageError: The name means nothing, or there is no such device here.
    """
    wanted, there = str(name), available_devices()
    if wanted == "auto":
        wanted = there[-1].partition(":")[0]
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,3})?", wanted):
        raise UsageError(f"unknown device {wanted!r}, expected auto, cpu, cuda, cuda:N or mps; type `device='auto'`")
    if (wanted if wanted != "cuda" else "cuda:0") not in there:
        raise UsageError(
            f"there is no device {wanted!r}, this machine has {', '.join(there)}; type `device={there[-1]!r}`"
        )
    return torch.device(wanted)


def weights_dtype(model: nn.Module) -> torch.dtype:
    """What a model computes in: the dtype of its first floating-point weight, fp32 where there is none.

    Numbers of eight bits are stored, and computed with in another type.
    """
    floating = (weight.dtype for weight in model.parameters() if weight.is_floating_point() and weight.itemsize > 1)
    return next(floating, torch.float32)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means that memory has run out, for which every device has its own."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


@contextlib.contextmanager
def enough_memory(batch_size: int, device: torch.device, otherwise: str) -> Iterator[None]:
    """Turns running out of memory into an error that says what to do.

    Args:
        batch_size: Images a batch.
        device: Where they do not fit.
        otherwise: What to do; the end of the error.

    Raises:
        TokencutError: Memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
        if not lacks_memory(error):
            raise
        images = f"{batch_size} image{'s' if batch_size > 1 else ''}"
        raise TokencutError(f"a batch of {images} does not fit into the memory of {device}; {otherwise}") from error


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {"torch": torch.__version__, "timm": timm.__version__, "tokencut": __version__}


def describe_device(device: torch.device) -> str:
    """What a measurement ran on, in words: the processor and its threads, or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    processor = f"{_processor_name()}, {threads} thread{'s' if threads != 1 else ''}"
    return processor if device.type == "cpu" else f"{device.type} of {processor}"


def _processor_name() -> str:
    """The processor as its maker calls it, where the system tells."""
    described = Path("/proc/cpuinfo")
    if described.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", described.read_text(errors="replace"), re.MULTILINE)
        if named:
            return " ".join(named.group(1).split())
    if platform.system() == "Darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    return platform.processor() or platform.machine()


def precision_dtype(precision: str) -> torch.dtype | None:
    """What a precision casts weights and images to, as models are served.

    Autocasting, which leaves weights in fp32, casts in every layer of every forward: DeiT-S at batch 1 took 30 % longer
    in bf16 on a CPU, and a compressed one 55 %.

    Args:
        precision: `fp32` (the model as it is), `bf16` or `fp16`.

    Returns:
        The type; None for the model as it is.

    Raises:
        UsageError: There is no such precision.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}, expected fp32, bf16 or fp16; type `precision='bf16'`")
    return PRECISIONS[precision]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """A context in which a model computes in a precision, its weights staying as they are: for training.

    Args:
        device: Where the model runs.
        precision: `fp32` (the model as it is), `bf16` or `fp16`.

    Raises:
        UsageError: There is no such precision.
    """
    dtype = precision_dtype(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def inference_state(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    """Has a model on a device, cast and in eval mode for a while, and leaves it as it was found.

    Modes, weights, buffers and gradients are as before: what was on another device or of another type is put back, not
    copied back. It is held all the while, so that a GPU where the model already was holds its weights twice.

    Args:
        model: The model, moved in place.
        device: Where to.
        dtype: What to cast floating-point weights and buffers to (`precision_dtype`); they stay as they are where None.

    Yields:
        The same model.
    """
    modes = [(module, module.training) for module in model.modules()]
    held = [
        (module, name, tensor)
        for module in model.modules()
        for named in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in named
    ]
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    weights = [*model.parameters(), *gradients]
    values = [(tensor, tensor.data) for tensor in weights if not is_composite(tensor)]
    composite = [(tensor, nn.Parameter(tensor.detach(), tensor.requires_grad)) for tensor in weights
                 if is_composite(tensor)]  # fmt: skip
    try:
        yield model.to(device, dtype).eval()
    finally:
        # Moving or casting a module gives some of its tensors other data, and puts others in the place of the rest.
        for tensor, value in values:
            tensor.data = value
        for tensor, kept in composite:  # which `Module.to` swaps for others, since they have no data to set
            torch.utils.swap_tensors(tensor, kept)
        for module, name, tensor in held:
            setattr(module, name, tensor)
        for module, training in modes:
            module.training = training
