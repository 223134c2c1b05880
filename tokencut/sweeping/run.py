"""Many methods at many budgets on the same images: each pair judged once, with the dense model to stand against."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tokencut.adapters import Adapter, adapter_for, plain_model
from tokencut.data.image_set import HELD_BYTES, HeldBatches, ImageSet, open_images
from tokencut.data.sources import Source, check_apart
from tokencut.errors import ArtifactError, UsageError
from tokencut.evaluation.accuracy import EvaluationReport, MetricAccumulator
from tokencut.evaluation.forwards import over_views
from tokencut.evaluation.statistics import paired_difference
from tokencut.model import CompressedModel, compress, predicted_gmacs
from tokencut.models.pretrained_cfg import architecture_of
from tokencut.observers import Observer
from tokencut.profiling.latency import Timing, measure
from tokencut.profiling.measuring import BUSY
from tokencut.recipe import Recipe
from tokencut.runtime import extras
from tokencut.runtime.devices import (
    describe_device,
    inference_state,
    precision_dtype,
    resolve_device,
    versions,
    weights_dtype,
)
from tokencut.schedule import Keep as KeepRate
from tokencut.schedule import Layers
from tokencut.sweeping.picture import picture_of, tiles_of
from tokencut.sweeping.report import JSON as RESULTS
from tokencut.sweeping.report import SweepReport
from tokencut.sweeping.rows import DENSE, Keep, Row, Variant, compare, pair_name, read_variants, refuse_repeats
from tokencut.sweeping.state import Key, Speed, State, conditions_of, load_state, with_speed
from tokencut.sweeping.writing import check_folder, write_report

DENSE_KEY: Key = (DENSE, 1.0)
# A model's share of the timing: some 20 rounds of what takes a fifth of a second; fewer of what takes longer.
TIMING_SECONDS = 4.0
COMPARED = ("bat", "evit", "tome")


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep judges, and how.

    Attributes:
        methods: Method names, each with settings behind colons where wanted (`bat:preset=paper`); or `("all",)`. The
            first is compared with each of the others. `bat`, `evit` and `tome` where None, or that of the family.
        keeps: Fractions of the image tokens entering a stage that leave it: numbers, or sequences with one a layer.
        layers: As in `compress`.
        prop_attn: As in `compress`, for every method.
        limit: Judge an evenly spread sample of so many images.
        batch_size: Images a batch, judged or timed.
        workers: Processes that decode images; one a processor, 4 at most, where None.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `fp32`, or `bf16` or `fp16`, to which weights and images are cast.
        latency: Whether to measure speeds.
        held_bytes: Decoded images are held in memory up to this size, in bytes; beyond, every model decodes them anew.
    """

    methods: Sequence[str] | None = None
    keeps: Sequence[KeepRate] = (0.9, 0.7, 0.5)
    layers: Layers | None = None
    prop_attn: bool | None = None
    limit: int | None = None
    batch_size: int = 64
    workers: int | None = None
    device: str | torch.device = "auto"
    precision: str = "fp32"
    latency: bool = True
    held_bytes: int = HELD_BYTES

    def pairs(self, adapter: Adapter | None = None) -> list[tuple[Variant, Keep]]:
        """The rows beside the dense one, keep by keep.

        Args:
            adapter: That of the model; where None it is taken for no hierarchical one.

        Raises:
            UsageError: A method or keep rate stands twice, there is none, or a method is unknown or needs training.
        """
        hierarchical = adapter is not None and adapter.hierarchical
        usual = (adapter.default_method,) if adapter is not None and hierarchical else COMPARED
        variants = read_variants(usual if self.methods is None else self.methods, keeps_grid=hierarchical)
        keeps = [float(keep) if isinstance(keep, (int, float)) else tuple(map(float, keep)) for keep in self.keeps]
        if not keeps:
            raise UsageError("no keep rate given; type `keeps=[0.9, 0.7, 0.5]`")
        refuse_repeats("keeps", "keep", keeps)
        return [(variant, keep) for keep in keeps for variant in variants]


def sweep(
    model: nn.Module,
    data: str | os.PathLike[str] | Source,
    folder: str | os.PathLike[str],
    plan: SweepPlan | None = None,
    *,
    force: bool = False,
    name: str | None = None,
    observer: Observer | None = None,
    wording: Callable[[str], str] = str,
) -> SweepReport:
    """Judges a model under several methods and budgets on the same images, and writes a report; the model stays as is.

    Finished rows are kept in the folder: called again with the same model, images and options, a sweep goes on where it
    was interrupted, and one with more methods or budgets adds theirs; one whose report would lack rows of the report
    that is there is refused. Speeds are measured last, with all models taking turns, and again whenever models were
    added.

    Args:
        model: A timm model with a classification head, of a supported family.
        data: As `open_source` takes it: an image folder, an archive of one, a list, the word `digits`, or a source.
        folder: Where the report goes; it is made if its parent exists.
        plan: What to judge, and how; the defaults where None.
        force: Whether to drop rows found in the folder instead of going on with them.
        name: What the report calls the model; by default its architecture.
        observer: Told how far it is, and what is taken from an earlier run.
        wording: Words the notes in the files; the command line has its options there for arguments.

    Returns:
        The report, whose files are in the folder.

    Raises:
        TokencutError: matplotlib is missing; a setting is out of range; the model, the images or the folder won't do;
            or the folder holds rows that were made for something else.

    Example:
        >>> import tokencut
        >>> from tokencut.models.loading import load_model
        >>> plan = tokencut.SweepPlan(["bat", "evit"], [0.5], limit=40, latency=False, workers=0, device="cpu")
        >>> report = tokencut.sweep(load_model("digits").model, "digits", "report", plan)
        >>> [row.method for row in report.rows]
        ['dense', 'bat', 'evit']
    """
    extras.require("the plots need", "matplotlib", extra="plot")
    plan, into, told = plan or SweepPlan(), check_folder(folder, force=force), observer or Observer()
    model = plain_model(model)
    device = resolve_device(plan.device)
    dtype = precision_dtype(plan.precision)
    recipes = _recipes(model, plan)
    images = open_images(model, data, limit=plan.limit, observer=told)
    check_apart(into, images.source)
    batches = images.batches(plan.batch_size, workers=plan.workers, device=device, held_bytes=plan.held_bytes)
    state = None if force else load_state(into)
    conditions = {
        **conditions_of(model, images, told),
        "precision": plan.precision,
        "kind of device": device.type,
        "layers": str(_layers(recipes)),
        "proportional attention": "by method" if plan.prop_attn is None else "on" if plan.prop_attn else "off",
    }
    if state is not None:
        state.require(conditions, {key: recipe.to_json() for key, recipe in recipes.items()}, into)
        if (into / RESULTS).exists():
            state.require_named((DENSE_KEY, *recipes), into)
    run = _Run(recipes, images, batches, state or State(conditions), into, plan, device, told)
    run.refuse_dropping_speeds()
    finished = len(recipes) + 1 - len(run.left())
    if finished:
        told.note(f"{finished} of {len(recipes) + 1} rows were finished before and are taken from {into}")
    with inference_state(model, device, dtype), torch.no_grad():
        notes = run.run(model)
        pictured = picture_of(model, recipes, images, device=device, precision=plan.precision, observer=told)
        tiles = tiles_of(model, recipes, images, device=device, precision=plan.precision)
    report = run.report(name or architecture_of(model), notes)
    report = replace(report, notes=tuple(map(wording, report.notes)))
    if pictured is not None:
        report = replace(report, pictured=pictured.images, pictured_keep=pictured.keep)
    write_report(report, into, pictured, tiles)
    return report


def _recipes(model: nn.Module, plan: SweepPlan) -> dict[Key, Recipe]:
    """What each row but the dense one does to the model.

    `compress` returns a copy of the model, of which only the recipe is taken: all rows share one set of weights.
    """
    return {
        (variant.label, keep): compress(
            model, keep=keep, layers=plan.layers, method=variant.method, prop_attn=plan.prop_attn,
            method_options=variant.options,
        ).recipe
        for variant, keep in plan.pairs(adapter_for(model))
    }  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """A sweep under way."""

    recipes: Mapping[Key, Recipe]
    images: ImageSet
    batches: HeldBatches
    state: State
    folder: Path
    plan: SweepPlan
    device: torch.device
    observer: Observer

    def left(self) -> list[Key]:
        """The rows that are not finished."""
        return [key for key in (DENSE_KEY, *self.recipes) if key not in self.state.rows]

    @property
    def _setting(self) -> dict[str, str]:
        """Under which speeds are comparable."""
        return {"device": describe_device(self.device), "batch size": str(self.plan.batch_size)}

    @property
    def _timed(self) -> bool:
        """Whether the speeds that are there are those of this sweep's models, in its setting."""
        return self.state.timed_on == self._setting and {DENSE_KEY, *self.recipes} <= set(self.state.speeds)

    def refuse_dropping_speeds(self) -> None:
        """Refuses a report without the speeds that are in the one that is there.

        Raises:
            ArtifactError: Nothing is to be timed, and what was timed does not go for this sweep.
        """
        if not self.plan.latency and self.state.speeds and not self._timed:
            raise ArtifactError(f"{self.folder} holds speeds, which a report of this sweep would lack; leave out "
                                f"`latency=False`, or give another folder, such as `folder={f'{self.folder}-2'!r}`"
                                )  # fmt: skip

    def run(self, model: nn.Module) -> tuple[str, ...]:
        """Judges what is left, then times all; returns what a user should know of the timing."""
        wrapped = {key: CompressedModel(model, recipe).eval() for key, recipe in self.recipes.items()}
        models = {DENSE_KEY: model, **wrapped}
        left = self.left()
        for position, key in enumerate(left):
            report = self._judge(models[key], key, position, len(left))
            gmacs = predicted_gmacs(models[key])
            row = Row(*key, gmacs, report.top1, report.top5, None, report.images, report.loss, report.correct)
            self.state.notes = report.notes
            self.state.add(row, self.recipes[key].to_json() if key in self.recipes else None)
            self.state.save(self.folder)
        return self._time(models) if self.plan.latency else ()

    def _judge(self, model: nn.Module, key: Key, position: int, rows: int) -> EvaluationReport:
        count, name = len(self.images), pair_name(*key)
        tally = MetricAccumulator(self.images, self.plan.precision)
        with closing(iter(self.batches)) as batches:
            for batch in batches:
                # A batch is empty where none of its images could be read.
                logits = over_views([self._logits(model, view) for view in batch.views()]) if len(batch) else None
                tally.add(batch, logits)
                values = {**tally.values, "rows_left": rows - position}
                self.observer.progress(name, position * count + tally.done, rows * count, values)
        return tally.report(name, None)

    def _logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        images = self.images.prepared.normalise(pixels, self.device, weights_dtype(model))
        logits: Tensor = model(images)
        return logits.float()

    def _time(self, models: Mapping[Key, nn.Module]) -> tuple[str, ...]:
        """Times all models in turn, unless they were timed together before."""
        if not self._timed:
            timings = self._measure(models)
            self.state.timed_on = self._setting
            self.state.speeds = {key: _speed(timings[pair_name(*key)], self.plan.batch_size) for key in models}
            self.state.save(self.folder)
        spread = max((speed.high - speed.low) / speed.median for speed in self.state.speeds.values())
        busy = f"times differ by {spread:.0%} from round to round, so this machine has other work; speeds say little"
        return (busy,) if spread > BUSY else ()

    def _measure(self, models: Mapping[Key, nn.Module]) -> dict[str, Timing]:
        size = self.images.prepared.input_shape
        noise = torch.randn((self.plan.batch_size, *size), generator=torch.Generator().manual_seed(0))
        return measure(
            {pair_name(*key): model for key, model in models.items()},
            noise.to(self.device, weights_dtype(models[DENSE_KEY])),
            max_seconds=TIMING_SECONDS * len(models),
            observer=self.observer,
            task="timing all models in turn",
        )

    def report(self, model: str, notes: tuple[str, ...]) -> SweepReport:
        """The report of the finished run."""
        dense = self.state.rows[DENSE_KEY]
        reduced = [self.state.rows[key] for key in self.recipes]
        paired = [replace(row, to_dense=paired_difference(row.correct, dense.correct)) for row in reduced]
        rows = [dense, *paired]
        if self._timed:
            rows = [with_speed(row, self.state.speeds[row.method, row.keep]) for row in rows]
        return SweepReport(
            model=model,
            data=self.images.name,
            images=dense.images,
            rows=tuple(rows),
            comparisons=compare(rows),
            layers=_layers(self.recipes),
            precision=self.plan.precision,
            device=describe_device(self.device),
            batch_size=self.plan.batch_size,
            versions=versions(),
            notes=(*self.state.notes, *notes),
        )


def _layers(recipes: Mapping[Key, Recipe]) -> tuple[int, ...]:
    """The blocks that reduce, the same in all rows."""
    return tuple(next(iter(recipes.values())).layers)


def _speed(timing: Timing, batch: int) -> Speed:
    fast, slow = timing.spread_ms
    return Speed(timing.images_per_second, 1000 * batch / slow, 1000 * batch / fast)
