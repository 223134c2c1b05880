"""What a runtime is here, and an exported file as a module: written, opened and called alike, whatever runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokencut.errors import ArtifactError, ModelError
from tokencut.export.graph import Graph
from tokencut.export.info import ExportInfo, export_info_from_text
from tokencut.files import atomic_files, atomic_package, check_writable, check_writable_package
from tokencut.messages import one_line
from tokencut.runtime import extras
from tokencut.runtime.compiling import in_batches


class ExportedModel(nn.Module):
    """A file that `export_model` wrote; images in, logits out, with the attributes of a timm model that others read.

    Attributes:
        path: The file.
        info: What it says about its model.
        runtime: The runtime and its version.
        device: Where it computes.
        largest_batch: The most images that it takes at once; None where there is no such limit.
        notes: What a user should know of running it.
    """

    def __init__(
        self,
        path: Path,
        text: str | None,
        run: Callable[[Tensor], Tensor],
        runtime: tuple[str, str],
        *,
        device: torch.device | str = "cpu",
        largest_batch: int | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Wraps what a runtime has opened.

        Args:
            path: The file.
            text: What it says about its model, as `ExportInfo.to_text` writes it; None where it says nothing.
            run: From images `(B, C, H, W)` in fp32, contiguous and on `device`, to logits `(B, classes)`.
            runtime: Name and version.
            device: Where it computes.
            largest_batch: The most images that it takes at once; None where there is no such limit.
            notes: What a user should know of running it.

        Raises:
            ArtifactError: The file was not written by tokencut, or by a newer one.
        """
        super().__init__()
        self.path, self.runtime, self.device, self.notes = path, runtime, torch.device(device), notes
        self.info: ExportInfo = info_of(path, text)
        self.largest_batch, self._call = largest_batch, run

    @property
    def num_classes(self) -> int:
        """Classes of the head, 0 for none."""
        return self.info.num_classes

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """A description as timm has it, of the images that the file takes."""
        return self.info.timm_description()

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, classes)` for images `(B, C, H, W)`: any number, whatever the file was made for."""
        size, given = self.info.batch_size, images.detach().to(self.device, torch.float32).contiguous()
        if size is not None:
            return in_batches(self._call, given, size)
        if self.largest_batch is None or len(given) <= self.largest_batch:
            return self._call(given)
        return torch.cat([self._call(part) for part in given.split(self.largest_batch)])


def info_of(path: Path, text: str | None) -> ExportInfo:
    """What a file says about its model.

    Raises:
        ArtifactError: It says nothing, or what this tokencut cannot read.
    """
    if text is None:
        raise ArtifactError(f"{path} was not written by tokencut, so nobody knows what images it takes; type "
                            f"`tokencut.export_model(model, 'FILE{path.suffix}')`")  # fmt: skip
    try:
        return export_info_from_text(text)
    except ArtifactError as error:
        raise ArtifactError(f"cannot load {path}: {error}") from error


def not_translated(by: str, graph: Graph, error: Exception, *, instead: str = ".onnx") -> ModelError:
    """What to raise where a model cannot be written.

    Args:
        by: What does not know it.
        graph: The model.
        error: What that said.
        instead: How the name of a file ends that can be had.
    """
    return ModelError(f"{by} cannot translate {graph.info.model} ({one_line(error)}); type `path='FILE{instead}'`, "
                      "and please report the model's name and options")  # fmt: skip


def not_loaded(by: str, path: Path, error: Exception) -> ArtifactError:
    """What to raise where a file cannot be opened, by what, and what that said."""
    return ArtifactError(f"{by} cannot load {path} ({one_line(error)}); export the model again")


class Runtime(ABC):
    """One kind of exported file: how it is written, and how it is run.

    A subclass in a module of this package, registered, is all that a new kind takes. Its packages are imported when it
    writes or opens, not before.

    Attributes:
        name: What `format` calls it.
        suffix: How its files' names end; of two that fit, the longer one counts.
        label: What runs it, as messages call it.
        extra: The extra of tokencut that installs it; None where it is there anyway.
        to_write: Import names that writing needs.
        to_run: Import names that running needs.
        advice: What a user should know who runs such files elsewhere.
        beside: How the names of files end that are written beside it, such as weights.
        folder_with: What lies in each, where a file of this kind is a folder; else None.
        runs_here: Whether tokencut runs such files.
        default_opset: ONNX opset; None where the kind has none.
        largest_batch: The most images that a file for any number takes at once; None where there is no limit.
        one_batch: Whether a file takes one number of images only: `batch_size` where that is asked for, else 1.
        device: Where files compute: `cpu` or `cuda`.
        most_weights: The most bytes of weights that a file holds; None where there is no limit.
        quantizes: What a file can be quantised to, such as `int8`, by `quantize`.
        to_quantize: Import names that that needs, beside those for writing; the extra `quantize` installs them.
        needs_calibration: Whether it takes images.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    label: ClassVar[str]
    extra: ClassVar[str | None] = None
    to_write: ClassVar[tuple[str, ...]] = ()
    to_run: ClassVar[tuple[str, ...]] = ()
    advice: ClassVar[tuple[str, ...]] = ()
    beside: ClassVar[tuple[str, ...]] = ()
    folder_with: ClassVar[str | None] = None
    runs_here: ClassVar[bool] = True
    default_opset: ClassVar[int | None] = None
    largest_batch: ClassVar[int | None] = None
    one_batch: ClassVar[bool] = False
    device: ClassVar[str] = "cpu"
    most_weights: ClassVar[int | None] = None
    quantizes: ClassVar[tuple[str, ...]] = ()
    to_quantize: ClassVar[tuple[str, ...]] = ()
    needs_calibration: ClassVar[bool] = False

    def check_writable(self, target: Path) -> None:
        """Refuses what could not be written here, before any work is done for it.

        Args:
            target: The file to be written.

        Raises:
            TokencutError: Something that writing or checking needs is missing.
        """
        if self.extra is not None:
            packages = dict.fromkeys((*self.to_write, *self.to_run))
            extras.require(f"writing {target} needs", *packages, extra=self.extra)

    @abstractmethod
    def write(self, graph: Graph, path: Path) -> None:
        """Writes a model, with `graph.info` in the file.

        Args:
            graph: The model.
            path: Where to; it ends in `suffix`, its folder is empty, and files beside it are named like it.

        Raises:
            ModelError: The runtime has no such operators.
        """

    def quantize(
        self, graph: Graph, info: ExportInfo, source: Path, target: Path, batches: Iterable[Tensor] | None
    ) -> None:
        """Writes another file, of whole numbers of eight bits, of one that `write` wrote; for kinds with `quantizes`.

        Args:
            graph: What the file was written of.
            info: What the new file says, what it is quantised to among it.
            source: The file in fp32.
            target: Where to, named like `source`, in another folder.
            batches: Images to take the ranges of numbers from, as the file takes them; None where there are none,
                unless `needs_calibration`.
        """
        raise NotImplementedError

    def open(self, path: Path) -> ExportedModel:
        """Opens a file, with as many threads as torch uses.

        Args:
            path: The file.

        Raises:
            TokencutError: The runtime is not installed.
            ArtifactError: The file does not exist, is damaged, or was not written by tokencut.
        """
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist; type `tokencut.export_model(model, {str(path)!r})` to make it")
        if self.extra is not None:
            extras.require(f"running {path} needs", *self.to_run, extra=self.extra)
        return self._open(path)

    @abstractmethod
    def _open(self, path: Path) -> ExportedModel:
        """Opens a file that is there, with packages that are there; see `open`."""

    def checked(self, graph: Graph, path: Path) -> ExportedModel:
        """What is compared with the model: what was written, as its runtime runs it.

        Args:
            graph: The model.
            path: The file.
        """
        return self.open(path)

    def writing(self, target: Path, *, force: bool) -> AbstractContextManager[Path]:
        """Gives a temporary path for `write`, which takes its place when the block ends well; see `atomic_files`."""
        if self.folder_with is not None:
            return atomic_package(target, force=force, holding=self.folder_with)
        return atomic_files(target, *self.files(target)[1:], force=force)

    def require_writable(self, target: Path, *, force: bool) -> None:
        """Refuses names that cannot be written to, before any work is done.

        Raises:
            ArtifactError: As `check_writable` and `check_writable_package` do.
        """
        if self.folder_with is not None:
            check_writable_package(target, force=force, holding=self.folder_with)
            return
        for file in self.files(target):
            check_writable(file, force=force)

    def size(self, target: Path) -> int:
        """The bytes of a file, with all that belongs to it."""
        every = target.rglob("*") if self.folder_with is not None else self.files(target)
        return sum(file.stat().st_size for file in every if file.is_file())

    def files(self, target: Path) -> tuple[Path, ...]:
        """All that is written for a file: itself, and what stands beside it under the same name."""
        stem = target.name[: len(target.name) - len(self.suffix)]
        return (target, *(target.with_name(stem + ending) for ending in self.beside))

    def form(self, opset: int | None) -> str:
        """What was written, in words; `opset` where the kind has one."""
        return self.label


_RUNTIMES: dict[str, Runtime] = {}


def register(kind: type[Runtime]) -> type[Runtime]:
    """Makes a kind of file known by its name; for use as a decorator."""
    _RUNTIMES[kind.name] = kind()
    return kind


def registered() -> dict[str, Runtime]:
    """What has been registered so far, by name."""
    return _RUNTIMES
