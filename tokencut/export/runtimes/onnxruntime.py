"""ONNX: `.onnx`, in one piece, run by onnxruntime on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencut.errors import ModelError
from tokencut.export.graph import INPUT, OUTPUT, Graph, quiet
from tokencut.export.info import KEY, ExportInfo
from tokencut.export.node_names import block_names, name_nodes
from tokencut.export.onnx_int8 import quantize_onnx
from tokencut.export.runtimes.base import ExportedModel, Runtime, not_loaded, not_translated, register
from tokencut.export.translations import translations


@register
class OnnxRuntime(Runtime):
    """Files for onnxruntime, and whatever else reads ONNX."""

    name = "onnx"
    suffix = ".onnx"
    label = "onnxruntime"
    extra = "onnx"
    to_write = ("onnx", "onnxruntime", "onnxscript")
    to_run = ("onnxruntime",)
    # From 20 on GELU is one operator, which onnxruntime need not find among five. From 23 on attention is one, which
    # onnxruntime 1.32 runs only with a mask for every query: proportional attention has one for all.
    default_opset = 20
    # A message of protobuf, and so a file in one piece, holds less than 2 GiB; the graph takes a few MB of it.
    most_weights = 2_100_000_000
    quantizes = ("int8",)

    def write(self, graph: Graph, path: Path) -> None:
        """Writes one file; see `Runtime.write`."""
        assert graph.opset is not None
        made = onnx_program(graph, graph.opset)
        made.model.metadata_props[KEY] = graph.info.to_text()
        made.save(str(path), external_data=False)

    def quantize(
        self, graph: Graph, info: ExportInfo, source: Path, target: Path, batches: Iterable[Tensor] | None
    ) -> None:
        """Static where there are images, else dynamic; see `Runtime.quantize`."""
        quantize_onnx(source, target, info, block_names(graph.model), batches)

    def _open(self, path: Path) -> ExportedModel:
        runtime = importlib.import_module("onnxruntime")
        session: Any = _session(runtime, path)

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

        text = session.get_modelmeta().custom_metadata_map.get(KEY)
        return ExportedModel(path, text, run, ("onnxruntime", runtime.__version__))

    def form(self, opset: int | None) -> str:
        """What was written, in words."""
        return f"ONNX opset {opset}"


def onnx_program(graph: Graph, opset: int, outputs: Sequence[str] = (OUTPUT,)) -> Any:
    """A model as torch.onnx's program, without paths of this machine.

    Args:
        graph: The model.
        opset: ONNX opset.
        outputs: What its outputs are called.

    Raises:
        ModelError: It holds an operator that ONNX does not have.
    """
    names = ({0: "batch"},) if graph.info.batch_size is None else None
    try:
        with quiet():
            made = torch.onnx.export(
                graph.program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=list(outputs),
                dynamic_shapes=names,
                custom_translation_table=translations(),
            )
    except Exception as error:  # the exporter raises kinds of its own, and those of two more packages
        if isinstance(error, ModelError):  # the capture's
            raise
        raise not_translated("torch.onnx", graph, error, instead=".pt2") from error
    assert made is not None
    name_nodes(made.model.graph, graph.model)
    for node in made.model.graph:
        node.metadata_props.clear()  # where in torch's and timm's code each came from
    made.model.metadata_props.clear()
    return made


def _session(runtime: Any, path: Path) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Idle threads would go on spinning for a while, and slow down what is timed next, another file above all.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # what fails is raised
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a dozen kinds, all of them plain exceptions
        raise not_loaded("onnxruntime", path, error) from error
