"""The options by which a model is compiled before it runs, for the commands that time or judge one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tokencut.cli.options import running_option

MODE_HELP = "default, reduce-overhead (CUDA graphs) or max-autotune; implies --compile."


@dataclass(frozen=True)
class CompileOptions:
    """Whether and how the model goes through `torch.compile`."""

    compiled: Annotated[
        bool, running_option("--compile", help="Run it through torch.compile; the first batch takes minutes.")
    ] = False
    compile_mode: Annotated[str | None, running_option("--compile-mode", metavar="MODE", help=MODE_HELP)] = None

    @property
    def mode(self) -> str | None:
        """torch's name for how to compile; None for not at all."""
        return self.compile_mode or ("default" if self.compiled else None)
