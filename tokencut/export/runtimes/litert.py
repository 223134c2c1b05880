"""LiteRT: `.tflite`, for phones, run by its interpreter with XNNPACK's kernels."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencut.errors import ArtifactError
from tokencut.export.graph import Graph, quiet, quiet_library
from tokencut.export.info import KEY
from tokencut.export.lowering import lowered
from tokencut.export.runtimes.base import ExportedModel, Runtime, not_loaded, not_translated, register

# What a file of this kind says of itself, in its first bytes.
IDENTIFIER = b"TFL3"


@register
class LiteRT(Runtime):
    """Files for LiteRT, once TensorFlow Lite: for one number of images, since its converter takes no other."""

    name = "litert"
    suffix = ".tflite"
    label = "LiteRT"
    extra = "litert"
    to_write = ("litert_torch", "ai_edge_litert")
    to_run = ("ai_edge_litert",)
    one_batch = True
    # Offsets in a file are of 32 bits, of which one is a sign.
    most_weights = 2_100_000_000

    def write(self, graph: Graph, path: Path) -> None:
        """Writes one file; see `Runtime.write`."""
        program = graph.program
        try:
            with quiet(), quiet_library():
                converter = importlib.import_module("litert_torch")
                made = converter.convert(lowered(program).module(), (graph.example,))
                made.export(str(path))
        except Exception as error:  # of torch, of jax and of the converter behind them
            raise not_translated("LiteRT", graph, error) from error
        path.write_bytes(_with_text(path.read_bytes(), graph.info.to_text()))

    def _open(self, path: Path) -> ExportedModel:
        interpreters = importlib.import_module("ai_edge_litert.interpreter")
        content = path.read_bytes()
        if content[4:8] != IDENTIFIER:  # what is no such file would be followed wherever it leads
            raise ArtifactError(f"LiteRT cannot load {path} (it is no .tflite file); export the model again")
        try:
            text = _text_of(content)
            with quiet(), quiet_library():
                model = interpreters.Interpreter(model_content=content, num_threads=torch.get_num_threads())
                model.allocate_tensors()
        except Exception as error:  # of the interpreter plain ones, of reading a damaged file any
            raise not_loaded("LiteRT", path, error) from error
        (given,), (made,) = model.get_input_details(), model.get_output_details()

        def run(images: Tensor) -> Tensor:
            model.set_tensor(given["index"], images.numpy())
            model.invoke()
            return torch.from_numpy(model.get_tensor(made["index"]))

        return ExportedModel(path, text, run, ("litert", version("ai-edge-litert")))


def _schema() -> Any:
    return importlib.import_module("ai_edge_litert.schema_py_generated")


def _with_text(content: bytes, text: str) -> bytes:
    """A file with what it says about its model among its metadata."""
    schema, flatbuffers = _schema(), importlib.import_module("flatbuffers")
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = list(text.encode())
    entry.name, entry.buffer = KEY, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


def _text_of(content: bytes) -> str | None:
    model = _schema().Model.GetRootAsModel(content, 0)
    for number in range(model.MetadataLength()):
        entry = model.Metadata(number)
        if entry.Name() == KEY.encode():
            return bytes(model.Buffers(entry.Buffer()).DataAsNumpy()).decode("utf-8")
    return None
