"""Runs a benchmark; without a name it lists them.

    python examples/benchmarks/run.py
    python examples/benchmarks/run.py speed --help

A benchmark is a module in this folder, or in one of its folders, with a `main()` that reads its own command line.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import jobs  # noqa: F401  (first of all: its clock starts when it is imported)

from tokencut.cli.wording import typed
from tokencut.errors import TokencutError

HERE = Path(__file__).resolve().parent


def benchmarks() -> dict[str, tuple[str, str]]:
    """For each benchmark its module and the first line of its docstring, without importing any."""
    found = {}
    for path in sorted(HERE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body) and path.stem != "run":
            module = ".".join(path.relative_to(HERE).with_suffix("").parts)
            found[path.stem] = module, (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main() -> None:
    """Runs the benchmark that is named first; the rest of the command line is its own."""
    known = benchmarks()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"{name:10} {about}" for name, (_, about) in known.items()))
        return
    if name not in known:
        sys.exit(f"error: there is no benchmark {name}, expected one of {', '.join(known)}")
    sys.argv = [f"{Path(sys.argv[0]).name} {name}", *sys.argv[2:]]
    try:
        importlib.import_module(known[name][0]).main()
    except TokencutError as error:
        sys.exit(f"error: {typed(str(error))}")


if __name__ == "__main__":
    main()
