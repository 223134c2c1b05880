"""What a program would compute from weights alone, each time anew, computed once where runtimes lack the operators.

timm resamples its table of positions in every exported model that takes images of several sizes, though exported
files take one: its bicubic resampling is what OpenVINO, ExecuTorch and LiteRT do not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.utils._pytree import tree_map_only

_RESAMPLING = "upsample"
_FROM_SIZES = {torch.ops.aten.arange.start_step, torch.ops.aten.full.default}
_MOST = 2**20  # numbers in one tensor: more is computed anew, as before
_WEIGHTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


def bake_resampling(program: Any) -> None:
    """Puts tensors in the place of what is resampled weights, in a program of torch.export."""
    known = _known_tensors(program)
    resampled: dict[Any, None] = {}  # in the graph's order
    for node in program.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and all(each in known for each in node.all_input_nodes):
            given = tree_map_only(torch.fx.Node, known.__getitem__, (node.args, node.kwargs))
            # Views of weights cost nothing; what comes behind a resampling is kept until something else uses it.
            known[node] = node.target(*given[0], **given[1])
            if _RESAMPLING in str(node.target) or any(each in resampled for each in node.all_input_nodes):
                resampled[node] = None
    last = [node for node in resampled if any(user not in resampled for user in node.users)]
    _bake(program, {node: known[node] for node in last}, "resampled")


def bake_sizes(program: Any) -> None:
    """The same for what follows from sizes alone: the numbers of tokens, and how each compares with each.

    Args:
        program: Of torch's core operators, none of which writes into what it is given.
    """
    known: dict[Any, Any] = {}
    for node in program.graph.nodes:
        if _is_constant(node, known):
            args, kwargs = tree_map_only(torch.fx.Node, known.__getitem__, (node.args, node.kwargs))
            known[node] = node.target(*args, **kwargs)
    used = {node: value for node, value in known.items() if any(user not in known for user in node.users)}
    _bake(program, used, "sizes")


def _is_constant(node: Any, known: dict[Any, Any]) -> bool:
    made = node.meta.get("val")
    if node.op != "call_function" or not isinstance(made, torch.Tensor):
        return False
    if not all(isinstance(size, int) for size in made.shape) or made.numel() > _MOST:
        return False
    given = node.all_input_nodes
    return all(each in known for each in given) if given else node.target in _FROM_SIZES


def _bake(program: Any, values: dict[Any, Any], name: str) -> None:
    """Puts tensors in the place of nodes."""
    for number, (node, value) in enumerate(values.items()):
        _put_constant(program, node, value.detach().contiguous(), f"baked_{name}_{number}")
    if values:
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()


def _known_tensors(program: Any) -> dict[Any, Any]:
    """The weights by the nodes that stand for them."""
    kept = {**program.state_dict, **program.constants}
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.kind in _WEIGHTS}
    places = (node for node in program.graph.nodes if node.op == "placeholder" and node.name in targets)
    return {node: kept[targets[node.name]] for node in places}


def _put_constant(program: Any, node: Any, value: Any, name: str) -> None:
    """Makes a tensor an input that the program brings along, in the place of a node."""
    specs = program.graph_signature.input_specs
    first = next(index for index, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT)
    places = [each for each in program.graph.nodes if each.op == "placeholder"]
    with program.graph.inserting_before(places[first]):
        place = program.graph.placeholder(name)
    place.meta["val"] = node.meta["val"]
    specs.insert(first, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(place.name), name, None))
    program.constants[name] = value
    node.replace_all_uses_with(place)
