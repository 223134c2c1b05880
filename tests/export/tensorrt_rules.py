"""What TensorRT's parser takes of an .onnx, by its list of operators; TensorRT itself needs its wheel and a GPU.

The list: https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md, read as of TensorRT 10.15.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto

# Of the operators that the list has those that models and stages are made of: a new one is looked up there first. It
# has NonZero, Loop and If as well, but shapes that depend on data keep an engine from one plan of its memory.
OPERATORS = {
    "Abs", "Add", "And", "ArgMax", "ArgMin", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv", "CumSum",
    "Div", "Equal", "Erf", "Exp", "Expand", "Gather", "GatherElements", "Gelu", "Gemm", "Greater", "GreaterOrEqual",
    "Identity", "LayerNormalization", "Less", "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max", "Min", "Mul", "Neg",
    "Not", "Or", "Pad", "Pow", "Reciprocal", "ReduceMean", "ReduceSum", "Reshape", "ScatterElements", "Shape",
    "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
TOPK_BELOW = 3840


def assert_tensorrt_takes(model: Any) -> None:
    """Checks every node of a model, whose shapes have been inferred."""
    graph = model.graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    types = {each.name: each.type.tensor_type.elem_type for each in (*graph.value_info, *graph.input, *graph.output)}
    assert not {node.op_type for node in graph.node} - OPERATORS
    for node in graph.node:
        told = f"{node.name}: {node.op_type}"
        assert node.domain in ("", "ai.onnx"), told
        if node.op_type == "TopK":
            assert node.input[1] in constants, f"{told} of a number that is none of the file's constants"
            assert int(constants[node.input[1]].item()) < TOPK_BELOW, told
            assert all(each.i == 1 for each in node.attribute if each.name == "sorted"), told
        if node.op_type in ("CumSum", "LogSoftmax", "MatMul", "Softmax"):  # the others take int32 and int64 as well
            assert types[node.input[0]] == TensorProto.FLOAT, told
        if node.op_type == "CumSum":
            assert node.input[1] in constants, told
        if node.op_type == "ScatterElements":  # sums and extremes are a plugin's
            assert all(each.s == b"none" for each in node.attribute if each.name == "reduction"), told
        if node.op_type == "Slice" and len(node.input) > 3:
            assert node.input[3] in constants, told
        if node.op_type in ("ReduceMean", "ReduceSum", "Squeeze", "Unsqueeze") and len(node.input) > 1:
            assert node.input[1] in constants, told
