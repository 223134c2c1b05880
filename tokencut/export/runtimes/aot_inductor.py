"""AOTInductor: `.aoti.pt2`, machine code that torch's compiler makes of a model, run by torch on the CPU."""

from __future__ import annotations

import importlib
import json
import platform
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencut.errors import ArtifactError, ModelError, TokencutError
from tokencut.export.graph import Graph, quiet, without_paths
from tokencut.export.info import KEY
from tokencut.export.runtimes.base import ExportedModel, Runtime, info_of, not_loaded, register
from tokencut.export.runtimes.torch_export import archive_text
from tokencut.messages import one_line

# As many threads as torch has where the file runs, not as it had where it was written.
SETTINGS = {"cpp.dynamic_threads": True}
# What torch says of a library in the archive: the processor that it was made for, above all.
METADATA, MACHINE, PROCESSOR = "_metadata.json", "AOTI_MACHINE", "AOTI_CPU_ISA"
LEVELS = ("AVX2", "AVX512")  # each has the one before
# What the library was compiled from: it is not run, and its comments tell how it was compiled, and where. The names
# stay, for torch 2.11 finds the rest by them.
SOURCES = (".cpp", ".h")


@register
class AotInductor(Runtime):
    """Files for `torch._inductor.aoti_load_package`, and for C++ without Python."""

    name = "aoti"
    suffix = ".aoti.pt2"
    label = "AOTInductor"
    advice = ("it is machine code, for processors such as this one and this version of torch",)

    def check_writable(self, target: Path) -> None:
        """Refuses to begin where there is no compiler; see `Runtime.check_writable`."""
        builder = importlib.import_module("torch._inductor.cpp_builder")
        kinds = importlib.import_module("torch._inductor.exc")
        try:
            with quiet():
                builder.get_cpp_compiler()
        except (kinds.InvalidCxxCompiler, RuntimeError) as error:
            raise TokencutError(f"writing {target} needs a C++ compiler, and torch finds none; install g++ or clang++, "
                                "or name one in the environment by CXX") from error  # fmt: skip

    def write(self, graph: Graph, path: Path) -> None:
        """Compiles a model; see `Runtime.write`. It takes from half a minute to several."""
        program, inductor = graph.program, importlib.import_module("torch._inductor")
        made = path.with_name("made.pt2")
        try:
            with quiet():
                inductor.aoti_compile_and_package(
                    without_paths(program), package_path=str(made), inductor_configs=dict(SETTINGS)
                )
        except Exception as error:  # of the compiler behind it, and of torch's own a dozen kinds
            raise ModelError(f"AOTInductor cannot compile {graph.info.model} ({one_line(error)}); type "
                             "`path='FILE.pt2'`, and please report the model's name and "
                             "options") from error  # fmt: skip
        _copy_without_paths(made, path, graph.info.to_text())

    def _open(self, path: Path) -> ExportedModel:
        text = archive_text(path)
        info_of(path, text)  # before anything of the file is run
        _check_processor(path)
        inductor = importlib.import_module("torch._inductor")
        try:
            with quiet():
                loaded: Any = inductor.aoti_load_package(str(path))
        except Exception as error:  # the loader's are all plain RuntimeErrors
            raise not_loaded("torch", path, error) from error

        def run(images: Tensor) -> Tensor:
            with torch.no_grad():
                logits: Tensor = loaded(images)
            return logits

        note = f"{path} is machine code, which opening it loads: open only files whose author you trust"
        return ExportedModel(path, text, run, ("torch", torch.__version__), notes=(note,))


def _copy_without_paths(made: Path, path: Path, text: str) -> None:
    """Copies what torch has packed, without sources and without the names of folders of this machine."""
    folders = [Path(torch.__file__).parents[1], Path(_cache_folder())]
    with zipfile.ZipFile(made) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as copy:
        entries = archive.infolist()
        for entry in entries:
            content = b"" if entry.filename.endswith(SOURCES) else archive.read(entry)
            for folder in folders:
                # Names of torch's headers, which only its messages show; what follows in the library keeps its place.
                name = str(folder).encode()
                content = content.replace(name, b"." * len(name))
            copy.writestr(zipfile.ZipInfo(entry.filename), content)
        top = entries[0].filename.partition("/")[0]
        copy.writestr(zipfile.ZipInfo(f"{top}/extra/{KEY}"), text)
    made.unlink()


def _cache_folder() -> str:
    return str(importlib.import_module("torch._inductor.runtime.cache_dir_utils").cache_dir())


def _check_processor(path: Path) -> None:
    """Refuses machine code of another kind of processor, which would end the process at its first instruction."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(METADATA))
            told = json.loads(archive.read(name))
            machine, wanted = (str(told[key]) for key in (MACHINE, PROCESSOR))
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"torch cannot load {path}: it holds no library of AOTInductor's; export the model "
                            "again") from error  # fmt: skip
    there = torch.backends.cpu.get_cpu_capability()
    needed = max((level for level in LEVELS if level in wanted.split()), key=LEVELS.index, default=None)
    lacking = needed is not None and (there not in LEVELS or LEVELS.index(there) < LEVELS.index(needed))
    if machine != platform.machine() or lacking:
        raise ArtifactError(f"{path} was compiled for {machine} with {wanted}, and this is {platform.machine()} with "
                            f"{there}; export the model again here")  # fmt: skip
