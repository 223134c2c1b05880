"""An OpenVINO model in int8, by NNCF: the blocks' products with their weights and nothing else, as in `onnx_int8`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor

from tokencut.export.graph import Graph, quiet
from tokencut.export.node_names import block_names, is_of_blocks, module_name
from tokencut.export.openvino_thread import off_this_thread

# By this NNCF is told to tell its makers nothing of each call over the network.
_SILENCE = "NNCF_CI"


def quantize_openvino(model: Any, graph: Graph, batches: Iterable[Tensor]) -> Any:
    """Another model with the ranges of numbers fixed, for what computes in int8.

    Args:
        model: OpenVINO's, in fp32, whose operations are named after those of torch's graph.
        graph: What it was made of.
        batches: Images to take the ranges from, as the model takes them.
    """
    blocks = block_names(graph.model)
    linear = {
        node.name
        for node in graph.program.graph.nodes
        if str(node.target) == "aten.linear.default" and is_of_blocks(f"{_module_of(node, graph)}/linear", blocks)
    }
    names = {operation.get_friendly_name(): operation.get_type_name() for operation in model.get_ops()}
    left = [name for name, kind in names.items() if kind != "MatMul" or name.partition("/")[0] not in linear]
    with quiet():
        nncf = _nncf()
        images = [batch.numpy() for batch in batches]
        return off_this_thread(partial(
            nncf.quantize, model, nncf.Dataset(images), subset_size=len(images), model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=left, validate=False),
        ))  # fmt: skip


def _module_of(node: Any, graph: Graph) -> str:
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return module_name([path for path, _ in stack], graph.model)


def _nncf() -> Any:
    before = os.environ.get(_SILENCE)
    os.environ[_SILENCE] = "1"
    try:
        return importlib.import_module("nncf")
    finally:
        if before is None:
            del os.environ[_SILENCE]
        else:
            os.environ[_SILENCE] = before
