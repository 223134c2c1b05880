"""The layout: modules import downwards only, without cycles, and no module shares its name with a public function."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tokencut"

# A module imports only from lower layers, or from its own. A package's name stands for all its modules.
LAYERS = {
    "errors": 1,
    "extras": 2,
    "tokens": 2,
    "cost": 2,
    "schedule": 2,
    "files": 2,
    "attention": 3,
    "unmerging": 3,
    "kernels": 2,
    "reduction": 3,
    "adapters": 4,
    "recipe": 5,
    "artifact": 7,
    "compression": 7,
    "description": 7,
    "intermediates": 7,
    "metadata": 7,
    "metadata_fields": 7,
    "model_args": 7,
    "names": 7,
    "tracing": 7,
    "weights": 7,
    "archives": 8,
    "building": 8,
    "counting": 8,
    "compiling": 8,
    "data": 8,
    "dense_features": 8,
    "digits": 8,
    "distributed": 8,
    "evaluation": 8,
    "export": 8,
    "export_check": 8,
    "export_formats": 8,
    "export_info": 8,
    "finetuning": 8,
    "flop_handles": 8,
    "held_images": 8,
    "hub": 8,
    "labels": 8,
    "latency": 8,
    "listing": 8,
    "memory": 8,
    "modelzoo": 8,
    "objective": 8,
    "onnx_model": 8,
    "onnx_profiling": 8,
    "pairing": 8,
    "photos": 8,
    "picture_grid": 8,
    "plots": 8,
    "preprocessing": 8,
    "profile_report": 8,
    "profiling": 8,
    "region_pictures": 8,
    "runtime": 8,
    "search": 8,
    "search_climb": 8,
    "search_drop": 8,
    "search_front": 8,
    "search_images": 8,
    "search_latency": 8,
    "search_probe": 8,
    "search_report": 8,
    "search_space": 8,
    "search_targets": 8,
    "sources": 8,
    "spread_evaluation": 8,
    "stage_views": 8,
    "sweep_picture": 8,
    "sweep_report": 8,
    "sweep_rows": 8,
    "sweep_state": 8,
    "sweeping": 8,
    "tensorboard_log": 8,
    "training_step": 8,
    "training_state": 8,
    "training_setup": 8,
    "training_recipe": 8,
    "training_data": 8,
    "visualization": 8,
    "": 9,  # tokencut/__init__.py, which names the public functions
    "cli": 9,
    "__main__": 9,
}

# (who, what it must not import, where that is allowed all the same): whole packages by their first name.
BANNED = [
    ("reduction", {"timm", "tokencut.adapters"}, set()),
    ("adapters", {"tokencut.reduction"}, set()),
    ("cost", {"torch", "timm", "numpy"}, set()),
    ("schedule", {"torch", "timm", "numpy"}, set()),
    ("", {"rich"}, {"tokencut.cli.render"}),
    ("", {"matplotlib"}, {"tokencut.plots"}),
    ("", {"tensorboard", "torch.utils.tensorboard"}, {"tokencut.tensorboard_log"}),
]


def module_name(path: Path) -> str:
    """`tokencut/cli/app.py` is `tokencut.cli.app`, `tokencut/cli/__init__.py` is `tokencut.cli`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """Everything a module imports, wherever in it, as full module names; those inside functions count as well."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write tokencut.NAME instead of a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                # The version is a constant at the top: reading it ties nothing to the modules named there.
                if full != "tokencut.__version__":
                    found.add(full if full in known else str(node.module))
    return found


def part(module: str) -> str:
    """The module's own name in `LAYERS`: `tokencut.cli.app` belongs to `cli`, `tokencut` itself to the empty name."""
    return module.partition(".")[2].partition(".")[0]


def within(module: str, names: set[str]) -> bool:
    """Whether `module` is one of `names` or lies inside one."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


IMPORTS = {name: imports(tree, set(TREES)) for name, tree in TREES.items()}


@pytest.mark.parametrize("module", sorted(TREES))
def test_module_imports_from_its_own_layer_or_lower(module: str) -> None:
    assert part(module) in LAYERS, f"{module} has no layer: add {part(module)!r} to LAYERS in tests/test_layers.py"
    own = LAYERS[part(module)]
    higher = {name for name in IMPORTS[module] if within(name, {"tokencut"}) and LAYERS.get(part(name), 0) > own}
    assert not higher, f"{module} (layer {own}) imports from a higher layer: {sorted(higher)}"


def test_imports_have_no_cycle() -> None:
    try:
        TopologicalSorter({name: found & set(TREES) - {name} for name, found in IMPORTS.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize(("who", "banned", "allowed"), BANNED)
def test_banned_imports(who: str, banned: set[str], allowed: set[str]) -> None:
    members = [name for name in TREES if within(name, {f"tokencut.{who}".rstrip(".")}) and name not in allowed]
    found = {name: sorted(i for i in IMPORTS[name] if within(i, banned)) for name in members}
    assert not {name: names for name, names in found.items() if names}


def test_no_module_shares_its_name_with_a_public_function() -> None:
    functions = {
        node.name: module
        for module, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    shared = {
        module: functions[module.rpartition(".")[2]] for module in TREES if module.rpartition(".")[2] in functions
    }
    assert not shared, f"modules named like a function, with where that function is: {shared}"


def test_the_rules_see_every_form_of_import() -> None:
    tree = ast.parse(
        "import torch.nn\n"
        "from tokencut import __version__, cost\n"
        "from tokencut.cost import Macs\n"
        "def late():\n    from tokencut.cli.app import main\n"
    )
    known = {"tokencut", "tokencut.cost", "tokencut.cli.app"}
    assert imports(tree, known) == {"torch.nn", "tokencut.cost", "tokencut.cli.app"}
