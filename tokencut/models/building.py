"""Builds timm models from what a user typed: arguments tried out before any weights are touched, and a clean stderr.

timm tells users things through warnings and its logger; here they become notes, for the command line to show.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from tokencut.adapters import adapter_for
from tokencut.errors import ModelError, UsageError
from tokencut.messages import nearest_known, one_line
from tokencut.models.checkpoints import random_state
from tokencut.models.model_args import RESERVED


def check_arguments(source: str, args: Mapping[str, Any]) -> None:
    """Builds a model without memory or weights, to see that it can be built and is supported.

    Args:
        source: What timm takes: a name, or `local-dir:FOLDER`.
        args: More arguments for timm.

    Raises:
        UsageError: timm does not take the arguments, or the weights would not fit into this machine's memory.
        ModelError: The model is not supported, or cannot be built without arguments either.
    """
    try:
        with capture_timm_messages(), torch.device("meta"):
            model = _created(source, args, pretrained=False)
    except Exception as error:  # timm asserts and raises as it likes over arguments that do not go together
        raise _refused(source, args, error) from error
    adapter_for(model)
    size, memory = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())), _memory()
    if memory is not None and size > memory:
        given = f" with {_given(args)}" if args else ""
        raise UsageError(f"{source}{given} has {size / 2**30:,.0f} GiB of weights, and this machine "
                         f"{memory / 2**30:,.0f} GiB of memory; give a smaller model")  # fmt: skip


def _memory() -> int | None:
    """This machine's memory in bytes, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def build(source: str, args: Mapping[str, Any], *, pretrained: bool, seed: int,
          overlay: Mapping[str, Any] | None = None) -> tuple[nn.Module, tuple[str, ...]]:  # fmt: skip
    """Builds a model, with what is random in it drawn from `seed`.

    Args:
        source: What timm takes: a name, or `local-dir:FOLDER`.
        args: More arguments for timm.
        pretrained: Whether timm is to load its weights.
        seed: For random weights.
        overlay: Entries that replace those of timm's description.

    Returns:
        The model, and what timm had to say.

    Raises:
        Exception: Whatever timm raises; the caller knows what the weights are called and where they come from.
    """
    with capture_timm_messages() as notes, random_state(seed):
        model = _created(source, args, pretrained=pretrained, overlay=overlay)
    return model, tuple(notes)


def _created(
    source: str, args: Mapping[str, Any], *, pretrained: bool, overlay: Mapping[str, Any] | None = None
) -> nn.Module:
    """timm's model. One that takes images of any size has no argument for it, and its description tells then."""
    cfg = dict(overlay or {})
    try:
        model: nn.Module = timm.create_model(source, pretrained=pretrained, pretrained_cfg_overlay=cfg or None, **args)
    except TypeError as error:
        size = args.get("img_size")
        if "unexpected keyword argument 'img_size'" not in str(error) or size is None:
            raise
        others = {name: value for name, value in args.items() if name != "img_size"}
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        cfg["input_size"] = (args.get("in_chans", 3), height, width)
        model = timm.create_model(source, pretrained=pretrained, pretrained_cfg_overlay=cfg, **others)
        described: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
        if described.get("fixed_input_size", True):
            raise
    return model


@dataclass(frozen=True)
class Sizes:
    """How large a model is, whatever its weights.

    Attributes:
        width: Numbers a token.
        depth: Blocks.
        heads: Heads of the first block's attention; None where it does not tell.
        tensors: The shapes of its tensors, by name.
    """

    width: int
    depth: int
    heads: int | None
    tensors: Mapping[str, tuple[int, ...]]


def sizes_of(source: str, args: Mapping[str, Any]) -> Sizes:
    """Builds a model without memory or weights, to see how large it is; its arguments are known to be good."""
    with capture_timm_messages(), torch.device("meta"):
        model: Any = _created(source, args, pretrained=False)
    adapter = adapter_for(model)
    blocks = adapter.blocks(model)
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None)
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Sizes(adapter.cost(model).blocks[0].width, len(blocks), heads, tensors)


@contextlib.contextmanager
def capture_timm_messages() -> Iterator[list[str]]:
    """Collects what timm warns and logs inside the block, instead of letting it out on stderr."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(one_line(record.getMessage()))

    logger, collector = logging.getLogger("timm"), Collector(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(collector)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
        lines.extend(one_line(warning.message) for warning in caught)
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagate


def _refused(source: str, args: Mapping[str, Any], error: Exception) -> UsageError | ModelError:
    """Whether it is the arguments that timm does not take, and which."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown and unknown[1] in args:
        known = _arguments(source)
        hint = nearest_known(unknown[1], known, cutoff=0.6)
        return UsageError(f"{source} takes no argument {unknown[1]!r}{hint} its arguments are {', '.join(known)}")
    if not args:
        return ModelError(f"timm cannot build {source}: {one_line(error)}; name another model, such as deit_tiny")
    return UsageError(
        f"timm cannot build {source} with {_given(args)}: {one_line(error)}; change or leave out an argument"
    )


def _given(args: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in args.items())


def _arguments(source: str) -> list[str]:
    """The arguments that the class of a model takes."""
    with capture_timm_messages(), torch.device("meta"):
        model = timm.create_model(source, pretrained=False)
    classes = [kind for kind in type(model).__mro__ if kind.__module__.startswith("timm.")]
    names = {name: None for kind in classes for name in inspect.signature(kind).parameters}
    return [name for name in names if name not in {"args", "kwargs", *RESERVED}]
