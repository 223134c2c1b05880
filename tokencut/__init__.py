"""tokencut: pretrained Vision Transformers made cheaper by reducing tokens (method of arXiv 2211.11315).

    import tokencut, timm
    model = tokencut.compress(timm.create_model("deit_small_patch16_224", pretrained=True), keep=0.7)
    tokencut.save(model, "out.safetensors")

The names below are imported when first used: `import tokencut` alone does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokencut.errors import TokencutError
from tokencut.version import __version__ as __version__

if TYPE_CHECKING:
    from tokencut.backbone import features_only
    from tokencut.evaluation.accuracy import EvaluationReport, evaluate
    from tokencut.evaluation.comparison import ComparisonReport, compare
    from tokencut.evaluation.prediction import PredictionReport, predict
    from tokencut.export.run import export_model
    from tokencut.model import CompressedModel, compress
    from tokencut.models.artifact import load, save
    from tokencut.models.quantized import quantize
    from tokencut.observers import Observer
    from tokencut.profiling.measuring import ProfileReport, profile
    from tokencut.runtime.capturing import capture
    from tokencut.search.levels import find_levels
    from tokencut.search.report import SearchSettings
    from tokencut.search.run import find_schedule
    from tokencut.search.targets import Target
    from tokencut.sweeping.run import SweepPlan, sweep
    from tokencut.training.recipe import TrainingRecipe
    from tokencut.training.run import finetune
    from tokencut.training.setup import TrainingSetup
    from tokencut.visualization.drawing import draw

__all__ = [
    "ComparisonReport",
    "CompressedModel",
    "EvaluationReport",
    "Observer",
    "PredictionReport",
    "ProfileReport",
    "SearchSettings",
    "SweepPlan",
    "Target",
    "TokencutError",
    "TrainingRecipe",
    "TrainingSetup",
    "capture",
    "compare",
    "compress",
    "draw",
    "evaluate",
    "export_model",
    "features_only",
    "find_levels",
    "find_schedule",
    "finetune",
    "load",
    "predict",
    "profile",
    "quantize",
    "save",
    "sweep",
]

_HOME = {
    "ComparisonReport": "evaluation.comparison",
    "CompressedModel": "model",
    "EvaluationReport": "evaluation.accuracy",
    "Observer": "observers",
    "PredictionReport": "evaluation.prediction",
    "ProfileReport": "profiling.measuring",
    "SearchSettings": "search.report",
    "SweepPlan": "sweeping.run",
    "Target": "search.targets",
    "TrainingRecipe": "training.recipe",
    "TrainingSetup": "training.setup",
    "capture": "runtime.capturing",
    "compare": "evaluation.comparison",
    "compress": "model",
    "draw": "visualization.drawing",
    "evaluate": "evaluation.accuracy",
    "export_model": "export.run",
    "features_only": "backbone",
    "find_levels": "search.levels",
    "find_schedule": "search.run",
    "finetune": "training.run",
    "load": "models.artifact",
    "predict": "evaluation.prediction",
    "profile": "profiling.measuring",
    "quantize": "models.quantized",
    "save": "models.artifact",
    "sweep": "sweeping.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tokencut' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tokencut.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
