"""A model as one graph of torch's operators, which every runtime's file is made of."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tokencut.blocks import Stage
from tokencut.data.preprocessing import Preprocessing, per_channel
from tokencut.errors import ModelError
from tokencut.export.baking import bake_resampling
from tokencut.export.info import ExportInfo
from tokencut.messages import one_line
from tokencut.runtime.quiet import quiet_libraries

# What a graph's input and output are called wherever they have names.
INPUT, OUTPUT = "images", "logits"
_STAGE = f"{Stage.__module__}.{Stage.__qualname__}"


class Normalised(nn.Module):
    """A model behind its own normalisation, for RGB from 0 to 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, prepared: Preprocessing) -> None:
        super().__init__()
        self.model = model
        channels = prepared.config["input_size"][0]
        for name in ("mean", "std"):
            values = torch.tensor(per_channel(prepared.config[name], channels), dtype=torch.float32)
            self.register_buffer(name, values.view(1, channels, *(1,) * (len(prepared.input_shape) - 1)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class Graph:
    """What a runtime writes.

    Attributes:
        model: From images to logits, in eval mode, on the CPU, in fp32.
        info: What the file will say about it.
        opset: ONNX opset, where the kind of file has one.
        largest_batch: The most images that a graph for any number takes; None where there is no limit.
    """

    model: nn.Module
    info: ExportInfo
    opset: int | None = None
    largest_batch: int | None = None

    @cached_property
    def example(self) -> Tensor:
        """Images to capture by."""
        # A batch of 1 would be taken for a size that is always 1.
        return torch.zeros(self.info.batch_size or 2, *self.info.input_shape)

    @cached_property
    def program(self) -> Any:
        """The model as torch.export has it.

        Raises:
            ModelError: It cannot be had as one graph.
        """
        batch = torch.export.Dim("batch", min=1, max=self.largest_batch)
        shapes = ({0: batch},) if self.info.batch_size is None else None
        try:
            with quiet():
                program = torch.export.export(self.model, (self.example,), dynamic_shapes=shapes, strict=False)
                drop_checks(program)
                bake_resampling(program)
                return program
        except Exception as error:  # whatever is in the model, and torch's dozen kinds of its own
            raise ModelError(f"torch.export cannot capture {self.info.model} as one graph ({one_line(error)}); "
                             "please report the model's name and options") from error  # fmt: skip


def drop_checks(program: Any) -> None:
    """Takes out checks of dtypes, which the graph says anyway: runtimes have no operator for them."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    program.graph_module.recompile()


def in_stage(node: Any) -> bool:
    """Whether a node of a program belongs to a stage: to its scores, its decision, or what carries that out."""
    around = node.meta.get("nn_module_stack") or {}
    return any(kind == _STAGE for _, kind in around.values())


def without_paths(program: Any) -> Any:
    """A program that torch can load again, and that names no files of this machine."""
    # Takes out the regions in which autocast is off: what has them, torch.export.load refuses (torch 2.14).
    program = program.run_decompositions({})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what torch's exporters and onnxscript print, log and warn of: nothing that anybody can act on."""
    with quiet_libraries(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Keeps back what a library in C++ writes to the process's error output: what matters is raised as well."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
