"""Core ML: `.mlpackage`, a folder that counts as one file, converted here and run on a Mac, an iPhone or an iPad."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokencut.errors import ArtifactError
from tokencut.export.graph import INPUT, OUTPUT, Graph, quiet
from tokencut.export.info import KEY
from tokencut.export.lowering import lowered
from tokencut.export.runtimes.base import ExportedModel, Runtime, not_translated, register

# What the converter leaves in a package for the debugger of another runtime.
DEBUGGING = "executorch_debug_handle_mapping.json"


@register
class CoreML(Runtime):
    """Packages for Core ML, in fp32, for one number of images."""

    name = "coreml"
    suffix = ".mlpackage"
    label = "Core ML"
    extra = "coreml"
    to_write = ("coremltools",)
    folder_with = "Manifest.json"
    one_batch = True
    runs_here = False
    advice = ("what Core ML was given was compared; the package itself was not run, which takes a Mac",)

    def write(self, graph: Graph, path: Path) -> None:
        """Writes one package; see `Runtime.write`."""
        program = graph.program
        try:
            with quiet():
                tools = importlib.import_module("coremltools")
                made = tools.convert(
                    lowered(program),
                    convert_to="mlprogram",
                    outputs=[tools.TensorType(name=OUTPUT)],
                    minimum_deployment_target=tools.target.iOS17,
                    compute_precision=tools.precision.FLOAT32,
                    skip_model_load=True,
                )
                _named(tools, made, graph.info.to_text()).save(str(path))
        except Exception as error:  # of torch, and of the converter, which asserts much
            raise not_translated("Core ML", graph, error) from error
        (path / DEBUGGING).unlink(missing_ok=True)

    def checked(self, graph: Graph, path: Path) -> ExportedModel:
        """What the converter was given, since the package does not run here; see `Runtime.checked`."""
        module = lowered(graph.program).module()
        return ExportedModel(path, graph.info.to_text(), module, ("coremltools", version("coremltools")))

    def open(self, path: Path) -> ExportedModel:
        """Refuses, whether it is there or not: nothing here runs it; see `Runtime.open`."""
        return self._open(path)

    def _open(self, path: Path) -> ExportedModel:
        raise ArtifactError(f"{path} runs on a Mac, an iPhone or an iPad, in Core ML, and not in tokencut; type "
                            "`tokencut.export_model(model, 'FILE.onnx')` for a file to judge and time "
                            "here")  # fmt: skip


def _named(tools: Any, made: Any, text: str) -> Any:
    """A model with its input named as everywhere, and with what it says about itself."""
    spec = made.get_spec()
    tools.utils.rename_feature(spec, spec.description.input[0].name, INPUT)
    named = tools.models.MLModel(spec, weights_dir=made.weights_dir, skip_model_load=True)
    named.user_defined_metadata[KEY] = text
    return named
