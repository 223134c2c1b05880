"""The names of an ONNX file's nodes: after timm's modules, and after the stages, so that either can be picked out.

A node is called like the module that it comes from, by timm's own name, and its operator: `blocks.3.attn.qkv/MatMul`.
What stage N does stands under `tokencut.stages.N/`: whoever quantises a file by other means leaves those out. What is
done between modules has the operator's name alone.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from tokencut.adapters import adapter_for
from tokencut.export.graph import Normalised
from tokencut.model import CompressedModel

STAGES = "tokencut.stages"
# Where torch's exporter says which modules a node comes from, from the model itself down to the operator.
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(nodes: Any, model: nn.Module) -> None:
    """Names the nodes of a graph that torch.onnx has made, in place.

    Args:
        nodes: The graph, whose nodes still have torch's metadata.
        model: What it was made from.
    """
    seen: Counter[str] = Counter()
    for node in nodes:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        module = module_name(scopes[:-1], model)
        name = f"{module}/{node.op_type}" if module else node.op_type
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1


def block_names(model: nn.Module) -> tuple[str, ...]:
    """timm's names of a model's blocks.

    Args:
        model: Dense or compressed, or either behind its normalisation.
    """
    inner = model.model if isinstance(model, Normalised) else model
    inner = inner.model if isinstance(inner, CompressedModel) else inner
    known = set(map(id, adapter_for(inner).blocks(inner)))
    return tuple(name for name, part in inner.named_modules() if id(part) in known)


def is_of_blocks(name: str, blocks: tuple[str, ...]) -> bool:
    """Whether a node comes from a block and not from a stage, or from between modules: families call some layers so.

    Args:
        name: The node's.
        blocks: What `block_names` gave.
    """
    module = name.rpartition("/")[0]
    return not module or any(module == block or module.startswith(f"{block}.") for block in blocks)


def module_name(paths: Sequence[str], model: nn.Module) -> str:
    """The module that a node comes from: timm's name, `tokencut.stages.N...`, or nothing where it is the model itself.

    Args:
        paths: Those of the modules around it, from the model down to the innermost.
        model: What was exported.
    """
    module = next((path for path in reversed(paths) if path and not path.startswith("_")), "")
    if isinstance(model, Normalised):
        module, model = module.removeprefix("model").removeprefix("."), model.model
    if not isinstance(model, CompressedModel):
        return module
    own, _, rest = module.partition(".")
    return rest if own == "model" else f"tokencut.{module}" if module else ""
