"""An exported .onnx file as MODEL: what it takes of the options of `profile` and `eval`, and what it does not."""

from __future__ import annotations

from pathlib import Path

from tokencut.cli.options import CompileOptions, ModelOptions, ReductionOptions, RunOptions
from tokencut.cli.subject import Subject
from tokencut.errors import UsageError
from tokencut.export.onnx_model import ONNX_SUFFIX, OnnxModel
from tokencut.files import user_path


def is_onnx(spec: str) -> bool:
    """Whether a MODEL is an existing .onnx file."""
    return Path(spec).suffix.lower() == ONNX_SUFFIX and user_path(spec).is_file()


def open_onnx(
    spec: str,
    source: ModelOptions,
    reduction: ReductionOptions,
    run: RunOptions,
    compiling: CompileOptions,
    *,
    dense: bool = False,
    by_block: bool = False,
) -> Subject:
    """Opens a MODEL that is an .onnx file.

    Args:
        spec: MODEL.
        source: Where weights come from; all of it is in the file already.
        reduction: How to reduce; likewise.
        run: Where and how it runs: on the CPU, in fp32.
        compiling: onnxruntime does that.
        dense: Whether `--dense` was typed.
        by_block: Whether `--by-block` was typed.

    Raises:
        UsageError: An option was typed that cannot apply to what is exported.
        TokencutError: The file cannot be run.
    """
    fixed = {
        **dict.fromkeys(reduction.given(), True),
        "--dense": dense,
        "--by-block": by_block,
        "--checkpoint": source.checkpoint is not None,
        "--no-pretrained": source.no_pretrained,
        "--model-kwargs": bool(source.model_kwargs),
        "--num-classes": source.num_classes is not None,
        "--img-size": source.img_size is not None,
        **{f"--{name.replace('_', '-')}": True for name in source.preprocessing()},
        "--compile": compiling.mode is not None,
        "--capture": compiling.capture,
        f"--precision {run.precision}": run.precision != "fp32",
        f"--device {run.device}": run.device not in ("auto", "cpu"),
    }
    given = [option for option, typed in fixed.items() if typed]
    if given:
        raise UsageError(f"{spec} is exported, so onnxruntime runs it as it is, on the CPU in fp32, and it takes no "
                         f"{' and no '.join(given)}; leave that out, or name the model that it came from")  # fmt: skip
    model = OnnxModel(spec)
    return Subject(spec, model, model)
