"""OpenVINO: `.xml`, with its weights beside it in a `.bin`, run on the CPU."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencut.errors import ArtifactError
from tokencut.export.graph import INPUT, OUTPUT, Graph, in_stage, quiet
from tokencut.export.info import KEY, ExportInfo
from tokencut.export.openvino_int8 import quantize_openvino
from tokencut.export.openvino_thread import off_this_thread
from tokencut.export.runtimes.base import ExportedModel, Runtime, not_loaded, not_translated, register

# Where a file says which weights it belongs to, as a hexadecimal SHA-256.
DIGEST = f"{KEY}_weights"
# Under this key OpenVINO keeps the computation of a node in the precision that the file has, where bf16 and fp16 are
# the rule: on processors that compute in them by themselves it takes them by default.
PRECISE = "precise_0"
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@register
class OpenVino(Runtime):
    """Files for OpenVINO, made from torch's own graph."""

    name = "openvino"
    suffix = ".xml"
    label = "OpenVINO"
    extra = "openvino"
    to_write = ("openvino",)
    to_run = ("openvino",)
    quantizes = ("int8",)
    to_quantize = ("nncf",)
    needs_calibration = True
    beside = (".bin",)
    advice = (
        "OpenVINO computes in bf16 where the processor has it, all but the stages; it gives these logits with "
        "INFERENCE_PRECISION_HINT=f32",
    )

    def write(self, graph: Graph, path: Path) -> None:
        """Writes the graph and its weights; see `Runtime.write`."""
        _save(_converted(graph), graph.info, path)

    def quantize(
        self, graph: Graph, info: ExportInfo, source: Path, target: Path, batches: Iterable[Tensor] | None
    ) -> None:
        """Static, with the ranges that images show; see `Runtime.quantize`."""
        assert batches is not None
        runtime = importlib.import_module("openvino")
        plain = runtime.Core().read_model(str(source), str(source.with_suffix(".bin")))
        _save(quantize_openvino(plain, graph, batches), info, target)

    def _open(self, path: Path) -> ExportedModel:
        runtime = importlib.import_module("openvino")
        weights = path.with_suffix(".bin")
        if not weights.is_file():
            raise ArtifactError(f"the weights of {path} are not there: {weights} does not exist; copy both files")
        try:
            core = runtime.Core()
            model = core.read_model(str(path), str(weights))
            text, digest = (_told(model, key) for key in (KEY, DIGEST))
            if text is not None and digest != _digest(weights):
                raise ArtifactError(f"{weights} is not the file that was written with {path}; copy both files, or "
                                    "export the model again")  # fmt: skip
            settings = {**EXACT, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            compiled = off_this_thread(partial(core.compile_model, model, "CPU", settings))
        except Exception as error:  # the runtime's kinds are all plain RuntimeErrors
            if isinstance(error, ArtifactError):
                raise
            raise not_loaded("OpenVINO", path, error) from error
        request = compiled.create_infer_request()

        def run(images: Tensor) -> Tensor:
            request.infer([images.numpy()], share_inputs=True)
            return torch.from_numpy(request.get_output_tensor(0).data.copy())

        return ExportedModel(path, text, run, ("openvino", runtime.__version__))


def _converted(graph: Graph) -> Any:
    """A model as OpenVINO's, with the nodes of its stages kept in fp32.

    OpenVINO's own `convert_model` does the same, and tells its makers of each call over the network.

    Raises:
        ModelError: OpenVINO does not know an operator of it.
    """
    runtime = importlib.import_module("openvino")
    manager = importlib.import_module("openvino.frontend").FrontEndManager()
    decoders = importlib.import_module("openvino.frontend.pytorch.fx_decoder")
    program = graph.program
    try:
        with quiet():
            decoder = decoders.TorchFXPythonDecoder.from_exported_program(program, dynamic_shapes=False)
            frontend = manager.load_by_framework("pytorch")
            model = frontend.convert(frontend.load(decoder))
            size = -1 if graph.info.batch_size is None else graph.info.batch_size
            model.reshape({model.inputs[0]: runtime.PartialShape([size, *graph.example.shape[1:]])})
    except Exception as error:  # the frontend's kinds are all plain exceptions
        raise not_translated("OpenVINO", graph, error) from error
    model.inputs[0].set_names({INPUT})
    model.outputs[0].set_names({OUTPUT})
    stages = {node.name for node in decoder.fx_gm.graph.nodes if in_stage(node)}
    for operation in model.get_ops():
        if operation.get_friendly_name().partition("/")[0] in stages:
            operation.get_rt_info()[PRECISE] = ""
    return model


def _save(model: Any, info: ExportInfo, path: Path) -> None:
    """Writes a model and its weights, each of which says that it belongs to the other."""
    model.set_rt_info(info.to_text(), [KEY])
    empty = "0" * 64
    model.set_rt_info(empty, [DIGEST])
    importlib.import_module("openvino").save_model(model, str(path), compress_to_fp16=False)
    text = path.read_text(encoding="utf-8")
    assert text.count(empty) == 1
    path.write_text(text.replace(empty, _digest(path.with_suffix(".bin"))), encoding="utf-8")


def _told(model: Any, key: str) -> str | None:
    return str(model.get_rt_info([key]).astype(str)) if model.has_rt_info([key]) else None


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()
