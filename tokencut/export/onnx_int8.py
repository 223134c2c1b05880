"""An .onnx file in int8, by onnxruntime's quantiser: the weights of the blocks' linear layers, and what they meet.

Only matrix products of a block with its weights are quantised. Patches, norms, attention's own products, the classifier
and all that a stage decides by stay in fp32: quantised whole, `bat` lost 11 points of top-1 on CIFAR-10.

What was chosen was chosen by a rule: of the settings within 5 % of the lowest divergence from the fp32 file (the
geometric mean over three checkpoints with `bat` at keep 0.5, on training images, 128 others to calibrate by), the
simplest. See `docs/deployment.md`.
"""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from tokencut.export.graph import INPUT, quiet
from tokencut.export.info import KEY, ExportInfo
from tokencut.export.node_names import is_of_blocks

# An operator's output is not quantised: what comes next (a bias, GELU, a sum) computes in fp32 anyway.
_STATIC = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
OPERATORS = ("MatMul", "Gemm")


def quantize_onnx(
    source: Path, target: Path, info: ExportInfo, blocks: tuple[str, ...], batches: Iterable[Tensor] | None
) -> None:
    """Writes a file in int8: static, with ranges taken from images, or dynamic, with ranges taken anew in each forward.

    Args:
        source: The file in fp32, whose nodes are named (`node_names`).
        target: Where to write.
        info: What the file says.
        blocks: timm's names of the model's blocks.
        batches: Images as the file takes them, `(B, C, H, W)`; dynamic where None.
    """
    onnx, tools = importlib.import_module("onnx"), importlib.import_module("onnxruntime.quantization")
    prepare = importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    prepared = target.with_name(f"prepared-{target.name}")
    with quiet():
        # Not optimised: that joins and renames nodes, and is done again when the file is opened.
        prepare(str(source), str(prepared), skip_optimization=True)
        model = onnx.load(prepared)
        known = {weight.name for weight in model.graph.initializer}
        nodes = [
            node.name
            for node in model.graph.node
            if node.op_type in OPERATORS and known.intersection(node.input[:2]) and is_of_blocks(node.name, blocks)
        ]
        settings: dict[str, Any] = {
            "op_types_to_quantize": list(OPERATORS), "nodes_to_quantize": nodes, "per_channel": True,
            "weight_type": tools.QuantType.QInt8, "reduce_range": overflows(),
        }  # fmt: skip
        if batches is None:
            tools.quantize_dynamic(str(prepared), str(target), **settings)
        else:
            tools.quantize_static(
                str(prepared), str(target), _Reader(batches), quant_format=tools.QuantFormat.QDQ,
                activation_type=tools.QuantType.QUInt8, extra_options=dict(_STATIC), **settings,
            )  # fmt: skip
        made = onnx.load(target)
        del made.metadata_props[:]
        made.metadata_props.add(key=KEY, value=info.to_text())
        onnx.save(made, target)
    prepared.unlink()


def overflows() -> bool:
    """Whether products of eight bits may overflow on this processor, so that weights are given seven.

    x86 without VNNI adds two products of eight bits in sixteen.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    described = Path("/proc/cpuinfo")
    told = described.read_text(errors="replace") if described.is_file() else ""
    return re.search(r"\b(avx512_vnni|avx_vnni)\b", told) is None


class _Reader:
    """Batches as onnxruntime's calibration asks for them, one after the other."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.left: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by the name of the input; None behind the last."""
        batch = next(self.left, None)
        return None if batch is None else {INPUT: batch.numpy()}
