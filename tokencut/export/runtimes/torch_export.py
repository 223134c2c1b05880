"""torch.export: `.pt2`, a graph of torch's operators, which torch itself runs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch

from tokencut.export.graph import Graph, quiet, without_paths
from tokencut.export.info import KEY
from tokencut.export.runtimes.base import ExportedModel, Runtime, info_of, not_loaded, register
from tokencut.models.fields import MAX_LENGTH

# Where a file may run code of its author's: torch reads expressions of sizes by evaluating them, and unpickles what is
# neither a tensor nor a number.
RUNS_CODE = "may hold code, which opening it runs: open only files whose author you trust"


@register
class TorchExport(Runtime):
    """Files for `torch.export.load`."""

    name = "pt2"
    suffix = ".pt2"
    label = "torch.export"

    def write(self, graph: Graph, path: Path) -> None:
        """Writes one file; see `Runtime.write`."""
        # Through memory: torch turns a full disk into a RuntimeError of its own.
        buffer = io.BytesIO()
        with quiet():
            torch.export.save(without_paths(graph.program), buffer, extra_files={KEY: graph.info.to_text()})
        path.write_bytes(buffer.getbuffer())

    def _open(self, path: Path) -> ExportedModel:
        text = archive_text(path)
        info_of(path, text)  # before anything of the file is run
        try:
            with quiet():
                module = torch.export.load(io.BytesIO(path.read_bytes())).module()
        except Exception as error:  # torch has a dozen kinds
            raise not_loaded("torch.export", path, error) from error
        return ExportedModel(path, text, module, ("torch", torch.__version__), notes=(f"{path} {RUNS_CODE}",))


def archive_text(path: Path) -> str | None:
    """What a file of torch's says about its model, read without running anything of it; None where it says nothing.

    Raises:
        ArtifactError: It is damaged, or no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((each for each in archive.infolist() if each.filename.endswith(f"/extra/{KEY}")), None)
            if entry is None or entry.file_size > MAX_LENGTH:
                return None
            return archive.read(entry).decode("utf-8")
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        raise not_loaded("torch", path, error) from error
