"""An exported .onnx as something to time: on the CPU as the library runs it, on a GPU without copying images there."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor

from tokencut.errors import TokencutError
from tokencut.export.graph import INPUT, OUTPUT
from tokencut.export.runtimes import open_exported
from tokencut.profiling.latency import Forward

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def onnx_forward(path: Path, device: torch.device) -> Forward:
    """A file of `export_model`, on a device.

    Args:
        path: The file.
        device: The processor or a CUDA device.

    Raises:
        TokencutError: This onnxruntime has no provider for the device.
    """
    return open_exported(path) if device.type == "cpu" else BoundSession(path, device)


class BoundSession:
    """A session of onnxruntime that reads images where torch has them, and leaves logits on the same device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Opens a file.

        Args:
            path: The file.
            device: Where it runs, and where images will be.

        Raises:
            TokencutError: This onnxruntime has no provider for the device.
        """
        runtime = importlib.import_module("onnxruntime")
        there, wanted = runtime.get_available_providers(), PROVIDERS.get(device.type)
        if wanted not in there:
            raise TokencutError(f"this onnxruntime runs on {', '.join(there)} and not on {device.type}; type "
                                "pip install onnxruntime-gpu, or --device cpu")  # fmt: skip
        self.device, self.index = device.type, device.index or 0
        options = {"device_id": self.index} if self.device == "cuda" else {}
        self.session = runtime.InferenceSession(str(path), providers=[(wanted, options)])

    def __call__(self, images: Tensor) -> object:
        """Runs a batch `(B, C, H, W)`, fp32 and contiguous; returns when it has run, with onnxruntime's own value."""
        binding = self.session.io_binding()
        shape = tuple(images.shape)
        binding.bind_input(INPUT, self.device, self.index, "float32", shape, images.data_ptr())
        binding.bind_output(OUTPUT, self.device, self.index)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0]
