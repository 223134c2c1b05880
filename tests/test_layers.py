"""The layout: folders import downwards only, without cycles, and no module is named like what its package hands out."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tokencut"

# A folder, or a module beside the folders, imports only what stands in lines above its own. Inside a folder modules may
# import each other, without cycles.
LAYERS = (
    "errors messages cost observers calling composite version",
    "limits",
    "files schedule schema ops",
    "tokens",
    "attention unmerging",
    "methods adapters",
    "recipe tracing features",
    "blocks",
    "timm_protocol",
    "model",
    "backbone over_frames runtime",
    "models",
    "data",
    "evaluation profiling",
    "search training export visualization",
    "sweeping",
    "cli tokencut",  # tokencut/__init__.py, which names the public functions
    "__main__",
)
LAYER = {name: number for number, line in enumerate(LAYERS) for name in line.split()}

# (who, what it must not import, where that is allowed all the same): whole packages by their first name.
BANNED = [
    ("ops", {"timm"}, set()),
    ("methods", {"timm"}, set()),
    ("data", {"tokencut.methods", "tokencut.adapters"}, set()),
    ("cost", {"torch", "timm", "numpy"}, set()),
    ("schedule", {"torch", "timm", "numpy"}, set()),
    ("", {"rich"}, {"tokencut.cli.render"}),
    ("", {"matplotlib"}, {"tokencut.visualization.plots", "tokencut.visualization.saving"}),
    ("", {"tensorboard", "torch.utils.tensorboard"}, {"tokencut.training.tensorboard_log"}),
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
                found.add(full if full in known else str(node.module))
    return found


def part(module: str) -> str:
    """The module's own name in `LAYERS`: `tokencut.cli.app` belongs to `cli`, `tokencut` itself to its own name."""
    return (module.split(".") + [module])[1]


def within(module: str, names: set[str]) -> bool:
    """Whether `module` is one of `names` or lies inside one."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


IMPORTS = {name: imports(tree, set(TREES)) for name, tree in TREES.items()}


def not_above(module: str, imported: set[str]) -> list[str]:
    """What a module must not import, since it stands beside or below the module's own folder."""
    own = part(module)
    others = {name for name in imported if within(name, {"tokencut"}) and part(name) != own}
    return sorted(name for name in others if LAYER.get(part(name), 0) >= LAYER[own])


@pytest.mark.parametrize("module", sorted(TREES))
def test_module_imports_only_what_stands_above(module: str) -> None:
    assert part(module) in LAYER, f"{module} has no layer: add {part(module)!r} to LAYERS in tests/test_layers.py"
    wrong = not_above(module, IMPORTS[module])
    assert not wrong, f"{module} imports what does not stand above {part(module)!r} in LAYERS: {wrong}"


def test_an_import_from_beside_or_below_is_seen() -> None:
    imported = {"torch", "tokencut.data.sources", "tokencut.evaluation.statistics", "tokencut.training.order"}
    assert not_above("tokencut.evaluation.accuracy", imported) == ["tokencut.training.order"]
    assert not_above("tokencut.search.run", imported) == ["tokencut.training.order"]
    assert not_above("tokencut.model", imported) == sorted(imported - {"torch"})


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


def test_no_module_shares_its_name_with_what_its_package_hands_out() -> None:
    shared = [
        module
        for module in TREES
        if module != "tokencut" and module.rpartition(".")[2] in handed_out(module.rpartition(".")[0])
    ]
    assert not shared, f"a package hands out something else under the names of its modules {shared}"


# Another program's option, which is typed whoever calls.
TORCHRUN = "torchrun --nproc-per-node"


@pytest.mark.parametrize("module", sorted(name for name in TREES if not within(name, {"tokencut.cli"})))
def test_only_the_command_line_names_options(module: str) -> None:
    """The library speaks Python: `batch_size=64`, of which tokencut/cli/wording.py makes ``batch_size=64``."""
    found = [
        node.value
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"(?<![\w-])--[a-z]", node.value.replace(TORCHRUN, ""))
    ]
    assert not found


@pytest.mark.parametrize("package", ["tokencut.methods", "tokencut.adapters"])
def test_an_extension_finds_all_that_the_packages_own_modules_need(package: str) -> None:
    """Whatever a method or an adapter of ours imports from the rest of tokencut, its package hands out to others."""
    shown = handed_out(package)
    needed = {
        alias.name
        for module, tree in TREES.items()
        if within(module, {package}) and module not in (package, f"{package}.base")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and within(str(node.module), {"tokencut"})
        for alias in node.names
        if f"{node.module}.{alias.name}" not in TREES and not within(str(node.module), {"tokencut.ops.kernels"})
    }
    assert len(needed) > 10
    assert not needed - shown, f"add to __all__ of {package}: {sorted(needed - shown)}"


def handed_out(package: str) -> set[str]:
    """The names that `__all__` of a package lists, where it has one."""
    lists = [
        node.value
        for node in TREES[package].body
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "__all__" for to in node.targets)
    ]
    return {name for value in lists for name in ast.literal_eval(value)}


def test_the_rules_see_every_form_of_import() -> None:
    tree = ast.parse(
        "import torch.nn\n"
        "from tokencut import cost\n"
        "from tokencut.cost import Macs\n"
        "def late():\n    from tokencut.cli.app import main\n"
    )
    known = {"tokencut", "tokencut.cost", "tokencut.cli.app"}
    assert imports(tree, known) == {"torch.nn", "tokencut.cost", "tokencut.cli.app"}
