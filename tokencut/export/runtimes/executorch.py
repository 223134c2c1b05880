"""ExecuTorch: `.pte`, for phones and boards, with XNNPACK's kernels for processors."""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencut.export.arithmetic import without_truths
from tokencut.export.baking import bake_sizes
from tokencut.export.graph import Graph, quiet, quiet_library
from tokencut.export.info import KEY
from tokencut.export.lowering import lowered
from tokencut.export.runtimes.base import ExportedModel, Runtime, not_loaded, not_translated, register

# Where a program without another name for it begins.
FORWARD = "forward"


@register
class ExecuTorch(Runtime):
    """Files for ExecuTorch, in which XNNPACK computes what it can."""

    name = "executorch"
    suffix = ".pte"
    label = "ExecuTorch"
    extra = "executorch"
    to_write = ("executorch",)
    to_run = ("executorch",)
    # Memory for so many images is planned when the file is written.
    largest_batch = 32

    def write(self, graph: Graph, path: Path) -> None:
        """Writes one file; see `Runtime.write`."""
        program = graph.program
        try:
            with quiet():
                exir = importlib.import_module("executorch.exir")
                partition = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
                # In a graph for any number of images some linear layers are not known again by their parts, and
                # computed without XNNPACK: one of them took as long as eleven blocks.
                core = lowered(program, torch.ops.aten.linear.default)
                without_truths(core)
                bake_sizes(core)
                edge = exir.to_edge_transform_and_lower(
                    core,
                    partitioner=[partition.XnnpackPartitioner()],
                    constant_methods={KEY: graph.info.to_text()},
                )
                buffer = edge.to_executorch().buffer
        except Exception as error:  # of torch, of its export and of the backend
            raise not_translated("ExecuTorch", graph, error) from error
        path.write_bytes(buffer)

    def _open(self, path: Path) -> ExportedModel:
        try:
            with quiet(), quiet_library():
                runtime = importlib.import_module("executorch.runtime").Runtime.get()
                _set_threads()
                program = runtime.load_program(path.read_bytes())
                told = program.load_method(KEY).execute([])[0] if KEY in program.method_names else None
                method = program.load_method(FORWARD)
                largest = method.metadata.input_tensor_meta(0).sizes()[0]
        except RuntimeError as error:
            raise not_loaded("ExecuTorch", path, error) from error

        def run(images: Tensor, program: Any = program) -> Tensor:  # a method does not keep its program, nor its bytes
            logits: Tensor = method.execute([images])[0]
            return logits.clone()  # the next call writes into the same memory

        text = told if isinstance(told, str) else None
        return ExportedModel(path, text, run, ("executorch", version("executorch")), largest_batch=largest)


@functools.cache  # what is loaded computes in the pool that there was: another in its place ends the process
def _set_threads() -> None:
    """Gives the process's one pool as many threads as torch uses when the first file is opened."""
    bindings = importlib.import_module("executorch.extension.pybindings.portable_lib")
    bindings._unsafe_reset_threadpool(torch.get_num_threads())
