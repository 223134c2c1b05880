"""`tokencut compress`: makes a model cheaper, and writes it to a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokencut.cli import render
from tokencut.cli.finetune_options import FinetuneOptions
from tokencut.cli.observer import opened
from tokencut.cli.options import (
    PRECISION,
    DataOptions,
    JsonFlag,
    ModelArgument,
    ModelOptions,
    Precision,
    ReductionOptions,
    RunOptions,
    bounded,
    with_groups,
)
from tokencut.cli.search_options import CompressTargetOptions, LevelOptions
from tokencut.errors import UsageError

if TYPE_CHECKING:
    from tokencut.cli.finetune_run import FinetuneRun
    from tokencut.evaluation.accuracy import EvaluationReport
    from tokencut.model import CompressedModel
    from tokencut.training.setup import FinetuneReport


QUANTIZE_HELP = "Weights of the blocks in eight bits, for torch."
ALLOW_HELP = "With --quantize: so many points of top-1 on --data it may cost; else no file is written."
DRY_HELP = "Tell what a fine-tune or a search takes and writes. It is tried by a few steps, and nothing is written."


# Measured and told, but not kept in a file.
ONLY_TOLD = (
    "top1_before_finetuning", "top1_before_quantizing", "agreement", "quantize_difference", "quantize_standard_error",
)  # fmt: skip


@with_groups
def compress(
    model: ModelArgument,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write, *.safetensors.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_HELP)] = False,
    dtype: Annotated[Precision, typer.Option("--dtype", **PRECISION, help="How to store the weights.")] = "fp32",
    quantize: Annotated[str | None, typer.Option("--quantize", metavar="int8|fp8", help=QUANTIZE_HELP)] = None,
    allow_drop: Annotated[
        float | None, typer.Option("--allow-drop", **bounded("allow_drop", "P"), help=ALLOW_HELP)
    ] = None,
    reduction: ReductionOptions,
    target: CompressTargetOptions,
    levels: LevelOptions,
    tuning: FinetuneOptions,
    source: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    as_json: JsonFlag = False,
) -> None:
    """Compresses a model by reducing its tokens, and writes it to a file.

    With --data the accuracy before and after is measured and stored too. With
    --train-data the model is fine-tuned, which wins back most of what was lost.
    With a target and --calibration the schedule is found instead of typed.

    Examples:
      tokencut compress deit_tiny --keep 0.6 -o out.safetensors
      tokencut compress digits --keep 0.5 --data digits -o digits.safetensors
      tokencut compress deit_small --target-gmacs 2.6 \\
          --calibration /imagenet/train -o out.safetensors
      tokencut compress deit_small --keep 0.7 --finetune-epochs 5 \\
          --train-data /imagenet/train --data /imagenet/val -o out.safetensors
    """
    _check_quantize(quantize, allow_drop)
    from tokencut.cli.finetune_run import FinetuneRun, check_run, curves_for, fit_classes, refuse_finished
    from tokencut.cli.subject import gmacs, note_same_images, prepare
    from tokencut.data.sources import check_apart
    from tokencut.model import CompressedModel
    from tokencut.models.artifact import check_output, save
    from tokencut.runtime.devices import resolve_device
    from tokencut.runtime.distributed import process_group

    leveled = levels.requested(reduction, target)
    searching = not leveled and target.requested(reduction)
    refuse_finished(output, tuning, force=force)
    check_output(output, force=force)
    trained = tuning.requested()
    if leveled and (trained or dry_run):
        other = "--train-data" if trained else "--dry-run"
        raise UsageError(f"--mean-gmacs gives images different schedules, and {other} is for one; leave it out")
    if trained:
        tuning.training_recipe()
        check_run(output, tuning, force=force)
    device = resolve_device(run.device)
    with process_group(device) as group:
        images = None if data.data is None else opened(data.data, **data.reading())
        train = None
        if tuning.train_data:
            train = opened(tuning.train_data, split="train", **data.reading())
        if train is not None:
            for place in (output, *([] if tuning.tensorboard is None else [curves_for(tuning.tensorboard, output)])):
                check_apart(place, train, images)
        why = "an accuracy on images that the model was trained on is too good"
        note_same_images("--train-data", train, "--data", images, why)
        search = None
        if searching:
            from tokencut.cli.search_run import requested_search

            front = target.front or output.with_suffix(".front.json")
            search = requested_search(
                target, run, front=front, force=force or bool(tuning.resume), processes=group.size,
                workers=data.workers, batch_size=run.batch_size, form=target.form(), reading=data.reading(),
                dry=dry_run, form_option=True,
            )  # fmt: skip
            why = "an accuracy on images that the schedule was chosen by is too good"
            note_same_images("--calibration", search.source, "--data", images, why)
        sorting = None
        if leveled:
            from tokencut.cli.levels_run import LevelsRun

            sorting = LevelsRun(levels, target, run, processes=group.size, workers=data.workers, reading=data.reading())
            why = "an accuracy on images that the levels were chosen by is too good"
            note_same_images("--calibration", sorting.source, "--data", images, why)
        subject = prepare(model, source, reduction, seed=run.seed, to_be_trained=trained, search=search or sorting)
        assert isinstance(subject.model, CompressedModel)
        _refuse_quantized(subject.model, trained=trained, quantize=quantize)
        work = FinetuneRun(subject, output, tuning, train, images, data, run, group, force)
        if train is not None:
            work.setup()
            fit_classes(subject, train, images)
        if dry_run:
            from tokencut.cli.dry_run import tell_plan

            tell_plan(work, search, as_json=as_json)
            return
        measured: dict[str, Any] = {"dense_gmacs": gmacs(subject.dense), "gmacs": gmacs(subject.model)}
        report, after, accuracies = _train_and_measure(work)
        measured |= accuracies
        final = subject.model
        if quantize is not None:
            final, accuracies = _quantized(work, quantize, after, allow_drop)
            measured |= accuracies
        if search is not None and images is None and train is None and search.labelled:
            calibrated = replace(work, val=search.source, data=replace(data, limit=search.images))
            _warn_of_loss(calibrated, calibrated.measure(subject.dense, "dense"),
                          calibrated.measure(subject.model, "compressed"))  # fmt: skip
        if group.main:
            stored = {name: value for name, value in measured.items() if name not in ONLY_TOLD}
            save(final, output, force=force, dtype=dtype, measured=stored)
            if trained:
                work.done()
    recipe, found = subject.model.recipe, search or sorting
    made = {"output": str(output), "model": subject.name, "method": recipe.method, "keep": recipe.keep}
    made |= {} if quantize is None else {"quantize": quantize}
    if as_json:
        told = {} if report is None else {"finetune": work.summary(report)}
        told |= {} if search is None else {"search": search.summary()}
        told |= {} if sorting is None else {"levels": sorting.summary()}
        render.write_json({**made, "layers": recipe.layers, **measured, **told})
        return
    rows = _facts(str(output), subject.name, subject.describe(), measured, report)
    render.show(render.facts(rows + _quantized_facts(quantize, measured) + ([] if found is None else found.facts())))
    judge = f", or tokencut eval {output} --data DIR" if subject.model.num_classes else ""
    profiled = "" if leveled else f"tokencut profile {output}"
    render.note(f"next: {profiled}{judge}" if profiled else f"next: {judge.removeprefix(', or ')}")


def _check_quantize(kind: str | None, allow_drop: float | None) -> None:
    """Refuses a kind of weights that there is not, before anything is loaded or trained."""
    if kind is not None:
        from tokencut.models.quantized import check_kind

        check_kind(kind)
    elif allow_drop is not None:
        raise UsageError("--allow-drop says what --quantize may cost; type --quantize int8 as well, or leave it out")


def _refuse_quantized(model: CompressedModel, *, trained: bool, quantize: str | None) -> None:
    """Refuses what cannot be done with weights of eight bits before anything takes long."""
    from tokencut.models.quantized import refuse_quantized

    if trained:
        refuse_quantized(model, "trained")
    if quantize is not None:
        refuse_quantized(model, "quantised again")


def _quantized(
    work: FinetuneRun, kind: str, plain: EvaluationReport | None, allow_drop: float | None
) -> tuple[CompressedModel, dict[str, Any]]:
    """The model with weights of eight bits, and what they cost where there are images to judge by."""
    from tokencut.evaluation.quantized import ALLOWED_DROP, quantized_beside
    from tokencut.evaluation.statistics import if_known
    from tokencut.model import CompressedModel
    from tokencut.models.quantized import quantize

    assert isinstance(work.subject.model, CompressedModel)
    made = quantize(work.subject.model, kind)
    if plain is None:
        render.note(f"nothing was judged: what {kind} costs is not known; type --data DIR to measure it")
        return made, {}
    judged = work.measure(made, kind)
    allowed = ALLOWED_DROP if allow_drop is None else allow_drop
    found = quantized_beside(plain, judged, kind=kind, allowed=allowed, target=work.output)
    return made, {
        "top1": judged.top1,
        "top5": judged.top5,
        "top1_before_quantizing": plain.top1,
        "agreement": found.agreement,
        "quantize_difference": found.difference.points,
        "quantize_standard_error": if_known(found.difference.standard_error),
    }


def _quantized_facts(kind: str | None, measured: dict[str, Any]) -> list[tuple[str, str]]:
    """What is told of weights of eight bits."""
    if kind is None:
        return []
    rows = [("weights", f"{kind} in the blocks")]
    if "agreement" in measured:
        points, error = measured["quantize_difference"], measured["quantize_standard_error"]
        change = f"{points:+.2f} ± {'unknown' if error is None else f'{error:.2f}'} points"
        before = f"{measured['top1_before_quantizing']:.2f} %"
        rows.append((f"top-1 before {kind}", f"{before}; {change} by it, the same class for "
                                             f"{measured['agreement']:.1f} % of the images"))  # fmt: skip
    return rows


def _train_and_measure(
    work: FinetuneRun,
) -> tuple[FinetuneReport | None, EvaluationReport | None, dict[str, Any]]:
    """Fine-tunes where that was asked for; the accuracies before and after, where there are images to judge by."""
    subject = work.subject
    if work.val is None:
        return (None if work.train is None else work.train_model()), None, {}
    before = work.measure(subject.dense, "dense")
    after = work.measure(subject.model, "compressed")
    report, cut = None, after
    if work.train is not None:
        report = work.train_model()
        if report.chosen:  # else its weights are those that were cut
            after = work.judged or work.measure(subject.model, "fine-tuned")
    for text in after.notes:
        render.note(text)
    _warn_of_loss(work, before, after)
    measured = {"dense_top1": before.top1, "top1": after.top1, "dense_top5": before.top5, "top5": after.top5}
    untrained = {} if report is None else {"top1_before_finetuning": cut.top1}
    return report, after, {**measured, **untrained, "images": after.images}


def _warn_of_loss(work: FinetuneRun, before: EvaluationReport, after: EvaluationReport) -> None:
    """Says what may be typed where more is lost than is ordinary."""
    from tokencut.evaluation.unusual_loss import unusual_loss
    from tokencut.model import CompressedModel

    model = work.subject.model
    assert isinstance(model, CompressedModel) and work.val is not None
    loss = unusual_loss(model, before, after, None if work.train is not None else work.measure)
    if loss is not None:
        render.note(f"{loss}; compare methods and rates with tokencut sweep {work.subject.name} --methods all --data "
                    f"{work.val.name}, type a higher --keep, or let the loss choose the schedule: --max-drop 1 "
                    "--calibration DIR")  # fmt: skip


def _facts(
    output: str, model: str, reduction: str, measured: dict[str, Any], report: FinetuneReport | None
) -> list[tuple[str, str]]:
    before, after = measured["dense_gmacs"], measured["gmacs"]
    saved = render.change_text(before, after) or "nothing saved"
    rows = [
        ("wrote", output),
        ("model", model),
        ("reduction", reduction),
        ("GMACs per image", f"{render.gmacs_text(before)} -> {render.gmacs_text(after)} ({saved})"),
    ]
    if report is not None:
        taken = f"epoch {report.chosen} of {report.epochs}" if report.chosen else "no, the weights from before are kept"
        rows.append(("fine-tuned", taken))
        if (found := report.held_out) is not None:
            rows.append(("held out", f"{found.before:.2f} % -> {found.after:.2f} % ({found.difference}) on "
                                     f"{found.images:,} training images"))  # fmt: skip
    if "top1" in measured:
        drop = measured["top1"] - measured["dense_top1"]
        change = f"{measured['dense_top1']:.2f} % -> {measured['top1']:.2f} % ({drop:+.2f} points)"
        if report is not None:
            change += f", {measured['top1_before_finetuning']:.2f} % before fine-tuning"
        rows.append(("top-1", f"{change} on {measured['images']:,} images"))
    return rows
