"""`tokencut compare`: two models on the same images, paired."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from tokencut.cli import render
from tokencut.cli.observer import opened, watched
from tokencut.cli.options import (
    MODEL_HELP,
    CompileOptions,
    DataOptions,
    DenseFlag,
    JsonFlag,
    ModelArgument,
    ModelOptions,
    ReductionOptions,
    RunOptions,
    reduction_option,
    with_groups,
)
from tokencut.errors import UsageError

if TYPE_CHECKING:
    from tokencut.cli.subject import Subject
    from tokencut.evaluation.comparison import ComparisonReport

METHODS_HELP = (
    "With one MODEL: two methods of it, joined by a comma. Settings stand behind colons, as in bat,bat:preset=paper."
)
OTHER_HELP = f"What to compare it with; the same model, dense, if left out. {MODEL_HELP}"


@with_groups
def compare(
    model: ModelArgument,
    other: Annotated[str | None, typer.Argument(metavar="OTHER", help=OTHER_HELP)] = None,
    *,
    data: DataOptions,
    methods: Annotated[str | None, reduction_option("--methods", metavar="A,B", help=METHODS_HELP)] = None,
    reduction: ReductionOptions,
    dense: DenseFlag = False,
    source: ModelOptions,
    run: RunOptions,
    compiling: CompileOptions,
    as_json: JsonFlag = False,
) -> None:
    """Compares two models on the same images: accuracy, difference, agreement.

    The difference is paired over the images, with its standard error, and said
    to be none beyond chance within two of them. Two models, two methods of one
    model, or one model and what it is without reduction.

    Examples:
      tokencut compare a.safetensors b.safetensors --data /imagenet/val
      tokencut compare out.safetensors --data /imagenet/val
      tokencut compare deit_small --methods bat,tome --keep 0.5 \\
          --data /imagenet/val
      tokencut compare digits --data digits
    """
    if data.data is None:
        raise UsageError(
            f"compare needs images; type tokencut compare {model} {other or ''}".rstrip() + " --data DIR, a folder "
            "with one sub-folder a class or a .tar of one, or try it with tokencut compare digits --data digits"
        )
    if methods is not None and other is not None:
        raise UsageError(f"--methods {methods} are of one model, beside which {other} cannot stand; leave one out")
    if dense and other is None:
        raise UsageError(f"--dense beside one model would compare {model} with itself; name another one, or leave "
                         "--dense out")  # fmt: skip
    from tokencut.cli.subject import gmacs, run_facts
    from tokencut.evaluation.comparison import compare as compare_models
    from tokencut.runtime.devices import resolve_device

    device = resolve_device(run.device)
    variants = None if methods is None else _variants(methods, reduction)
    images = opened(data.data, **data.reading())
    if variants is not None:
        first, second = _methods(model, source, variants, run)
    elif other is not None:
        first, second = (_open(spec, source, reduction, run, compiling, dense=dense) for spec in (model, other))
    else:
        first, second = _with_dense(_open(model, source, reduction, run, compiling, dense=False))
    with watched(f"comparing {first.name} and {second.name}") as observer:
        report = compare_models(
            first.model, second.model, images, batch_size=run.batch_size, workers=data.workers, device=device,
            precision=run.precision, compile_mode=compiling.mode, capture=compiling.capture, limit=data.limit,
            names=(first.name, second.name), gmacs=(gmacs(first.model), gmacs(second.model)), observer=observer,
        )  # fmt: skip
    for text in report.notes:
        render.note(text)
    if as_json:
        values, facts = report.to_dict(), [run_facts(subject, device, run.precision) for subject in (first, second)]
        for name, of_model in zip(("first", "second"), facts, strict=True):
            values[name] |= {key: of_model[key] for key in ("method", "keep", "layers")}
        shared = {key: facts[0][key] for key in ("device", "precision")}
        render.write_json({**values, **shared, "versions": {**facts[0]["versions"], **facts[1]["versions"]}})
        return
    _show(report, first, second)


def _open(
    spec: str,
    source: ModelOptions,
    reduction: ReductionOptions,
    run: RunOptions,
    compiling: CompileOptions,
    *,
    dense: bool,
) -> Subject:
    from tokencut.cli.exported_subject import open_subject
    from tokencut.cli.subject import prepare

    exported = open_subject(spec, source, reduction, run, compiling, dense=dense)
    return exported or prepare(spec, source, reduction, seed=run.seed, dense=dense)


def _with_dense(subject: Subject) -> tuple[Subject, Subject]:
    """A compressed model, and the same without its stages."""
    if subject.model is subject.dense:
        raise UsageError(f"{subject.name} is exported, and holds no dense model to compare it with; name that, too")
    return subject, replace(subject, name=f"{subject.name}, dense", model=subject.dense)


def _variants(methods: str, reduction: ReductionOptions) -> dict[str, ReductionOptions]:
    """The two reductions, by the methods as typed."""
    from tokencut.sweeping.rows import read_variants

    given = [option for option in reduction.given() if option in ("--method", "--method-option")]
    if given:
        raise UsageError(f"--methods {methods} names the methods, beside which {' and '.join(given)} cannot stand; put "
                         "settings behind colons, as in --methods bat,bat:preset=paper")  # fmt: skip
    found = read_variants(methods.split(","))
    if len(found) != 2:
        raise UsageError(f"--methods {methods} is {len(found)} method{'s' * (len(found) != 1)}, and compare takes two, "
                         "such as --methods bat,tome; for more type tokencut sweep")  # fmt: skip
    return {
        one.label: replace(reduction, method=one.method, method_option=[f"{k}={v}" for k, v in one.options.items()])
        for one in found
    }


def _methods(
    spec: str, source: ModelOptions, variants: dict[str, ReductionOptions], run: RunOptions
) -> tuple[Subject, Subject]:
    """Two reductions of one model, with one set of weights."""
    from tokencut.cli.subject import prepare, warn_recipe_ignored
    from tokencut.model import CompressedModel, compress

    arguments = {label: options.arguments() for label, options in variants.items()}
    warn_recipe_ignored(spec, taken_by="--methods", instead="leave --methods out, or name the original model")
    subject = prepare(spec, source, ReductionOptions(), seed=run.seed, dense=True)
    first, second = (
        replace(subject, name=f"{subject.name}, {label}",
                model=CompressedModel(subject.dense, compress(subject.dense, **values).recipe).eval())
        for label, values in arguments.items()
    )  # fmt: skip
    return first, second


def _show(report: ComparisonReport, first: Subject, second: Subject) -> None:
    one, two = report.first, report.second
    alone = (report.only_first_right, report.only_second_right)
    render.show(render.facts([
        ("first", f"{one.model} ({first.describe()})"),
        ("second", f"{two.model} ({second.describe()})"),
        ("data", f"{report.data}, {report.images:,} images"),
    ]))  # fmt: skip
    rows = [
        (f"GMACs per {first.seen}", *(render.gmacs_text(found.gmacs or 0.0) for found in (one, two))),
        ("top-1", f"{one.top1:.2f} %", f"{two.top1:.2f} %"),
        ("top-5", f"{one.top5:.2f} %", f"{two.top5:.2f} %"),
        ("loss", f"{one.loss:.4f}", f"{two.loss:.4f}"),
        ("right alone", *(f"{count:,} image{'s' * (count != 1)}" for count in alone)),
    ]
    render.show(render.table(("", "first", "second"), rows))
    render.show(render.facts([
        ("difference in top-1", f"{report.difference.verdict()} points, the first less the second"),
        ("same class", f"for {report.agreement:.2f} % of the images, right or wrong"),
    ]))  # fmt: skip
