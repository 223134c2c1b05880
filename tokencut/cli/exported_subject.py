"""An exported file as MODEL: what it takes of the options of `profile` and `eval`, and what it does not."""

from __future__ import annotations

from pathlib import Path

import torch

from tokencut.cli import render
from tokencut.cli.options import CompileOptions, ModelOptions, ReductionOptions, RunOptions
from tokencut.cli.subject import Subject
from tokencut.errors import UsageError
from tokencut.export.runtimes import ExportedModel, exported_kind, open_exported
from tokencut.files import user_path
from tokencut.runtime.devices import resolve_device


def is_exported(spec: str) -> bool:
    """Whether a MODEL is an existing file of a kind that is exported here."""
    return exported_kind(spec) is not None and user_path(spec).is_file()


def open_file(path: str | Path) -> ExportedModel:
    """Opens an exported file, and shows what a user should know of it."""
    model = open_exported(path)
    for text in model.notes:
        render.note(text)
    return model


def open_subject(
    spec: str,
    source: ModelOptions,
    reduction: ReductionOptions,
    run: RunOptions,
    compiling: CompileOptions,
    *,
    dense: bool = False,
    by_block: bool = False,
) -> Subject | None:
    """Opens a MODEL that is an exported file; None where it is none.

    Args:
        spec: MODEL.
        source: Where weights come from; all of it is in the file already.
        reduction: How to reduce; likewise.
        run: Where and how it runs: where it was made for, in fp32.
        compiling: Its runtime does that.
        dense: Whether `--dense` was typed.
        by_block: Whether `--by-block` was typed.

    Raises:
        UsageError: An option was typed that cannot apply to what is exported.
        TokencutError: The file cannot be run.
    """
    kind = exported_kind(spec)
    if kind is None or not is_exported(spec):
        return None
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
        f"--device {run.device}": run.device not in ("auto", kind.device),
    }
    given = [option for option, typed in fixed.items() if typed]
    if given:
        place = {"cpu": "CPU", "cuda": "GPU"}[kind.device]
        raise UsageError(f"{spec} is exported, so {kind.label} runs it as it is, on the {place} in fp32, and it takes "
                         f"no {' and no '.join(given)}; leave that out, or name the model that it came from"
                         )  # fmt: skip
    model = open_file(spec)
    return Subject(spec, model, model)


def device_of(exported: Subject | None, wanted: str) -> torch.device:
    """Where a model runs: an exported file where it was made for, any other where the user says."""
    if exported is not None and isinstance(exported.model, ExportedModel):
        return exported.model.device
    return resolve_device(wanted)
