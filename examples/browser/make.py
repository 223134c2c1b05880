"""Writes what index.html shows: a model as .onnx, dense and compressed, and what the page has to know of it.

    cd examples/browser
    npm install onnxruntime-web
    python make.py deit_small --keep 0.5
    python -m http.server

and open http://localhost:8000. The compressed file has more outputs than `tokencut export` gives: for each stage the
token that every patch of the image is in. The page draws those; a page of your own needs none of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import tokencut
from tokencut.data.preprocessing import preprocessing_of
from tokencut.export.graph import Graph, Normalised
from tokencut.export.info import KEY, describe_export
from tokencut.export.runtimes.onnxruntime import onnx_program
from tokencut.model import CompressedModel
from tokencut.models.loading import load_model

HERE = Path(__file__).resolve().parent
OPSET = 20


class WithTokens(nn.Module):
    """A compressed model that also tells which token each patch is in behind each stage, -1 where it was dropped."""

    def __init__(self, model: CompressedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits `(B, classes)`, and for each stage `(B, patches)` in int32."""
        logits, traces = self.model.trace(images)
        sources = [trace.tokens.source for trace in traces[:-1]]  # behind the last is the end of the model
        return logits, *(source.to(torch.int32) for source in sources if source is not None)


def write(model: nn.Module, path: Path, outputs: list[str]) -> None:
    """Writes a model that takes RGB from 0 to 1, as a canvas has it once it is divided by 255."""
    served = WithTokens(model) if isinstance(model, CompressedModel) else model
    info = describe_export(model, normalises=True)
    program = onnx_program(Graph(Normalised(served, preprocessing_of(model)), info), OPSET, outputs)
    program.model.metadata_props[KEY] = info.to_text()
    program.save(str(path), external_data=False)


def make(model: CompressedModel, folder: Path) -> None:
    """Writes the page's three files into a folder."""
    info = describe_export(model)
    stages = [f"stage{stage.block}" for stage in model.recipe.stages]
    write(model.model.eval(), folder / "dense.onnx", ["logits"])
    write(model.eval(), folder / "compressed.onnx", ["logits", *stages])
    _, height, width = info.preprocessing["input_size"]
    labels = list(info.label_names) if isinstance(info.label_names, tuple) else info.label_names
    told = {
        "model": info.model, "method": model.recipe.method, "height": height, "width": width,
        "crop": info.preprocessing["crop_pct"], "labels": labels, "gmacs": [info.dense_gmacs, info.gmacs],
        "stages": [{"output": name, "block": stage.block, "tokens": stage.tokens_out}
                   for name, stage in zip(stages, model.recipe.stages, strict=True)],
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(told), encoding="utf-8")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as every tokencut command takes it: a timm name, local-dir:FOLDER, a file")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--method", default="bat")
    parser.add_argument("--folder", type=Path, default=HERE, help="where to; beside the page where left out")
    args = parser.parse_args()
    loaded = load_model(args.model)
    model = loaded.model if loaded.recipe else tokencut.compress(loaded.dense, keep=args.keep, method=args.method)
    with torch.no_grad():
        make(model, args.folder)


if __name__ == "__main__":
    main()
