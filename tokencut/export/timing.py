"""What an exported file costs where it is deployed: its time in its runtime, alone or beside the dense model's."""

from __future__ import annotations

from tokencut.errors import UsageError
from tokencut.export.runtimes import ExportedModel
from tokencut.limits import check_number
from tokencut.observers import Observer
from tokencut.profiling.latency import measure, speedup
from tokencut.profiling.measuring import DEFAULT_BATCH_SIZE, random_images, time_notes
from tokencut.profiling.report import Figures, ProfileReport
from tokencut.runtime.devices import describe_device, versions


def profile_exported(
    model: ExportedModel,
    *,
    dense: ExportedModel | None = None,
    latency: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    rounds: int = 21,
    name: str | None = None,
    observer: Observer | None = None,
) -> ProfileReport:
    """Times an exported file; its multiply-adds and parameters are those that it was exported with.

    Args:
        model: The file.
        dense: The dense model, exported to the same kind of file, to time in turns with it; where None there is no
            speed-up to tell.
        latency: Whether to time it.
        batch_size: Images in a forward; a file made for one size is timed with that.
        rounds: How many samples to take, at least 3; fewer are taken of large models, that it may end.
        name: What the report calls the model; by default what the file does.
        observer: Told rounds done and rounds in all.

    Returns:
        A report as of any model; `stages` are those of its recipe, and `blocks` is empty.

    Raises:
        UsageError: An argument is out of range, or `dense` is not the same model uncompressed.
    """
    info, called = model.info, name or model.info.model
    check_number("batch_size", batch_size)
    if dense is not None:
        _check_dense(model, dense)
    size = info.batch_size or (dense.info.batch_size if dense else None) or batch_size
    size = size if model.largest_batch is None or info.batch_size else min(size, model.largest_batch)
    sides = {"compressed": model} if dense is None else {"dense": dense, "compressed": model}
    timings = {}
    if latency:
        images = random_images(model, (size, *info.input_shape), model.device)
        timings = measure(sides, images, rounds=rounds, observer=observer, task=f"timing {called}")
    before, after = timings.get("dense"), timings.get("compressed")
    ratio, spread = speedup(before, after) if before and after else (None, None)
    recipe = info.recipe
    other_size = latency and size != batch_size
    which = "only" if info.batch_size or (dense and dense.info.batch_size) else "largest"
    fixed = (f"timed with batches of {size}, the {which} ones that the file takes",) if other_size else ()
    return ProfileReport(
        model=called,
        method=recipe.method if recipe else None,
        keep=recipe.keep if recipe else 1.0,
        dense=Figures.of(info.dense_gmacs, info.dense_params, before if recipe else after),
        compressed=Figures.of(info.gmacs, info.params, after),
        flops_reduction=1 - info.gmacs / info.dense_gmacs,
        speedup=ratio if recipe else (1.0 if latency else None),
        stages=recipe.stages if recipe else (),
        device=describe_device(model.device),
        precision=info.quantized or "fp32",
        batch_size=size,
        versions={**versions(), model.runtime[0]: model.runtime[1]},
        speedup_spread=spread,
        stage_share=None,
        uncounted={},
        not_counted={},
        blocks=(),
        notes=(*fixed, *time_notes(ratio if recipe and recipe.stages else None, before, after)),
    )


def _check_dense(model: ExportedModel, dense: ExportedModel) -> None:
    if dense.runtime[0] != model.runtime[0]:
        raise UsageError(f"{dense.path} runs by {dense.runtime[0]} and {model.path} by {model.runtime[0]}, so times of "
                         f"the two say nothing of the reduction; export the dense model to a file as {model.path.name}"
                         )  # fmt: skip
    if dense.info.recipe is not None:
        raise UsageError(f"{dense.path} was exported with a reduction, so it is not the dense side; type "
                         f"`tokencut.export_model(dense, {str(dense.path)!r}, force=True)`")  # fmt: skip
    mine, other = model.info, dense.info
    if (mine.dense_gmacs, mine.dense_params) != (other.gmacs, other.params):
        raise UsageError(f"{dense.path} is not the dense side of {model.path}: it has {other.gmacs:.3f} GMACs and "
                         f"{other.params} parameters, expected {mine.dense_gmacs:.3f} and {mine.dense_params}; export "
                         "the same model with `dense=True`")  # fmt: skip
