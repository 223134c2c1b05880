"""An exported .onnx file as a module: run by onnxruntime, on the CPU, wherever a model is profiled or evaluated."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokencut.errors import ArtifactError
from tokencut.export.info import KEY, ExportInfo, export_info_from_text
from tokencut.files import user_path
from tokencut.messages import one_line
from tokencut.runtime import extras
from tokencut.runtime.compiling import in_batches

ONNX_SUFFIX = ".onnx"
INPUT, OUTPUT = "images", "logits"


class OnnxModel(nn.Module):
    """A file that `export_model` wrote; images in, logits out, with the attributes of a timm model that others read.

    Attributes:
        path: The file.
        info: What it says about its model.
        runtime: The runtime and its version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a file, with as many threads as torch uses.

        Args:
            path: An .onnx file.

        Raises:
            TokencutError: onnxruntime is not installed.
            ArtifactError: The file is damaged, not ONNX, or was not written by tokencut.
        """
        super().__init__()
        self.path = user_path(path)
        extras.require(f"running {path} needs", "onnxruntime", extra="onnx")
        runtime = importlib.import_module("onnxruntime")
        self.runtime = f"onnxruntime {runtime.__version__}"
        self._session: Any = _open(runtime, self.path)
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise ArtifactError(f"{path} was not written by tokencut, so nobody knows what images it takes; type "
                                "`tokencut.export_model(model, 'FILE.onnx')`")  # fmt: skip
        try:
            self.info: ExportInfo = export_info_from_text(text)
        except ArtifactError as error:
            raise ArtifactError(f"cannot load {path}: {error}") from error

    @property
    def num_classes(self) -> int:
        """Classes of the head, 0 for none."""
        return self.info.num_classes

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """A description as timm has it, of the images that the file takes."""
        return self.info.timm_description()

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, classes)` on the CPU, for images `(B, C, H, W)`: any number, whatever the file was made for."""
        size = self.info.batch_size
        return self._run(images) if size is None else in_batches(self._run, images, size)

    def _run(self, images: Tensor) -> Tensor:
        array = images.detach().to("cpu", torch.float32).contiguous().numpy()
        return torch.from_numpy(self._session.run([OUTPUT], {INPUT: array})[0])


def _open(runtime: Any, path: Path) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Idle threads would go on spinning for a while, and slow down what is timed next, another file above all.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # what fails is raised
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; type `tokencut.export_model(model, {str(path)!r})` to make it")
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a dozen kinds, all of them plain exceptions
        raise ArtifactError(f"onnxruntime cannot load {path} ({one_line(error)}); export the model again") from error
