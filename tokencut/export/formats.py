"""The two formats of an export: a model as one graph, and that graph as .onnx or as .pt2 (torch.export)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokencut.data.preprocessing import Preprocessing, per_channel
from tokencut.errors import ModelError
from tokencut.export.info import KEY, ExportInfo
from tokencut.export.onnx_model import INPUT, OUTPUT
from tokencut.export.translations import translations
from tokencut.messages import one_line
from tokencut.runtime.compiling import in_batches


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


def captured(model: nn.Module, info: ExportInfo) -> Any:
    """The model as one graph of torch's operators.

    Args:
        model: From images to logits, in eval mode, on the CPU.
        info: What the file will say about it.

    Raises:
        ModelError: It cannot be had as one graph.
    """
    # A batch of 1 would be taken for a size that is always 1.
    example = torch.zeros(info.batch_size or 2, *info.input_shape)
    shapes = ({0: torch.export.Dim("batch", min=1)},) if info.batch_size is None else None
    try:
        with _quiet():
            program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever is in the model, and torch's dozen kinds of its own
        raise ModelError(f"torch.export cannot capture {info.model} as one graph ({one_line(error)}); "
                         "please report the model's name and options") from error  # fmt: skip
    return program


def write_pt2(program: Any, info: ExportInfo, path: Path) -> None:
    """Writes what `captured` gave, for `torch.export.load`."""
    # Through memory: torch turns a full disk into a RuntimeError of its own, and warns of names without .pt2.
    buffer = io.BytesIO()
    with _quiet():
        # Takes out the regions in which autocast is off: what has them, torch.export.load refuses (torch 2.14).
        program = program.run_decompositions({})
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # holds paths of this machine
        torch.export.save(program, buffer, extra_files={KEY: info.to_text()})
    path.write_bytes(buffer.getbuffer())


def write_onnx(program: Any, info: ExportInfo, opset: int, path: Path) -> None:
    """Writes what `captured` gave as one .onnx file.

    Raises:
        ModelError: It holds an operator that ONNX does not have.
    """
    names = ({0: "batch"},) if info.batch_size is None else None
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=names,
                custom_translation_table=translations(),
            )
    except Exception as error:  # the exporter raises kinds of its own, and those of two more packages
        raise ModelError(f"torch.onnx cannot translate {info.model} ({one_line(error)}); "
                         "type `path='FILE.pt2'`, and please report the model's name and "
                         "options") from error  # fmt: skip
    assert made is not None
    for node in made.model.graph:
        node.metadata_props.clear()  # where in torch's and timm's code each came from
    made.model.metadata_props.clear()
    made.model.metadata_props[KEY] = info.to_text()
    made.save(str(path), external_data=False)


def read_pt2(path: Path, info: ExportInfo) -> Callable[[Tensor], Tensor]:
    """What `write_pt2` wrote, as a function of any number of images."""
    with _quiet():
        loaded: nn.Module = torch.export.load(io.BytesIO(path.read_bytes())).module()
    size = info.batch_size
    return loaded if size is None else lambda images: in_batches(loaded, images, size)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what torch's exporters and onnxscript print, log and warn of: nothing that anybody can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
