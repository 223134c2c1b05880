"""What `compress` and `profile` do to find a schedule: checks, progress, the front's file, and what is said of it.

Imports torch: commands import this when they run, not before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencut import cost
from tokencut.cli import render
from tokencut.cli.observer import CommandObserver, opened, watched
from tokencut.cli.options import RunOptions
from tokencut.cli.process import StopRequest
from tokencut.cli.search_options import TargetOptions
from tokencut.cli.wording import typed
from tokencut.data.preprocessing import preprocessing_of
from tokencut.errors import TokencutError, UsageError
from tokencut.files import atomic_write, check_writable, with_ending
from tokencut.model import predicted_macs
from tokencut.models.loading import Loaded
from tokencut.profiling.latency import measure
from tokencut.profiling.measuring import random_images
from tokencut.runtime.devices import inference_state, precision_dtype, resolve_device
from tokencut.search.report import ClockReport, ParetoPoint
from tokencut.search.run import SearchReport, SearchSettings, find_schedule
from tokencut.search.targets import Target

# What messages of the library name, as `--target-form` says it.
FORM_WORDS = {"`capture=True`": "`target_form='captured'`", "`compile_mode`": "`target_form`"}


class SearchRun:
    """A search as typed: called with a model, it gives the schedule; then it tells what it found.

    Attributes:
        target: What is asked for.
        report: What was found; None before that.
        source: The calibration images.
    """

    def __init__(
        self, options: TargetOptions, run: RunOptions, *, front: Path | None, force: bool, workers: int | None = None,
        batch_size: int | None = None, form: Mapping[str, Any] | None = None, reading: Mapping[str, Any] | None = None,
        dry: bool = False, form_option: bool = False,
    ) -> None:  # fmt: skip
        """Checks what can be checked before the model is there.

        Args:
            options: As typed.
            run: Where the search runs, and how many images a forward that is timed takes.
            front: The file for the front; none is written where None.
            force: Whether it may be replaced.
            workers: Processes that decode images.
            batch_size: Images a batch that schedules are tried on; as is usual where None.
            form: In which form a model is timed for a target of seconds, as `SearchSettings` takes it.
            reading: How the images are read, as `open_source` takes it.
            dry: Whether only to tell what it would take: the model it is called with stays dense.
            form_option: Whether the form is typed by `--target-form`.

        Raises:
            TokencutError: The target means nothing, the file could not be written or is not named as JSON, or the
                images are not there.
        """
        self.target = Target(options.target_gmacs, options.target_speedup, options.max_drop, options.target_latency)
        self.target.check()
        self.front = None if front is None else _checked(front, force=force)
        self.report: SearchReport | None = None
        self.source = opened(options.calibration or "", split="train", **(reading or {}))
        self._form_option = form_option
        self.dry, self.planned = dry, dict[str, float]()
        default = SearchSettings()
        self._settings = SearchSettings(
            images=default.images if options.calibration_limit is None else options.calibration_limit,
            effort=default.effort if options.search_effort is None else options.search_effort,
            seed=run.seed,
            batch_size=batch_size or default.batch_size,
            timing_batch_size=run.batch_size,
            workers=workers,
            device=run.device,
            precision=run.precision,
            **(form or {}),
        )

    @property
    def images(self) -> int:
        """How many calibration images are looked at, at most."""
        return self._settings.images

    @property
    def labelled(self) -> bool:
        """Whether the classes of the calibration images are known, after the search."""
        return self.report is not None and self.report.found.top1 is not None

    @property
    def _asked(self) -> str:
        """The target as typed, such as `--target-gmacs 2.6`."""
        return typed(f"`{self.target}`")

    @property
    def option(self) -> str:
        """The option that asks for it, such as `--target-gmacs`."""
        return self._asked.partition(" ")[0]

    def __call__(self, loaded: Loaded, arguments: dict[str, Any]) -> dict[str, Any]:
        """Finds the schedule.

        Args:
            loaded: The model.
            arguments: Those of `tokencut.compress`, without a schedule.

        Returns:
            The arguments with the schedule.

        Raises:
            TokencutError: The target cannot be met.
            KeyboardInterrupt: It was interrupted before it had anything.
        """
        if self.dry:
            self.planned = self._plan(loaded)
            return arguments
        settings = {name: arguments[name] for name in ("layers", "method", "prop_attn", "method_options")}
        with watched(f"searching {loaded.name}") as observer, StopRequest(lambda: _acknowledge(observer)) as stop:
            observer.stop = stop
            try:
                self.report = find_schedule(
                    loaded.dense, self.source, self.target, **settings, settings=self._settings,
                    observer=observer,
                )  # fmt: skip
            except TokencutError as error:
                raise type(error)(self._form_typed(str(error))) from error
        for text in self.report.notes:
            render.note(self._form_typed(text))
        if self.report.interrupted:
            render.note("the search was interrupted: going on with the best schedule so far")
        if self.front is not None:
            about = {"model": loaded.name, **settings, **self._told(self.report)}
            text = render.json_text({**about, "front": list(map(_told_of, self.report.front))})
            with atomic_write(self.front) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
            render.note(f"wrote {_counted(len(self.report.front), 'schedule')} to choose from to {self.front}")
        found = self.report.found
        return {**arguments, "keep": list(found.keep), "layers": list(found.layers)}

    def _form_typed(self, message: str) -> str:
        """A message in the words of the command that runs it, where the form has an option of its own."""
        for name, own in FORM_WORDS.items() if self._form_option else ():
            message = message.replace(name, own)
        return message

    def _plan(self, loaded: Loaded) -> dict[str, float]:
        """Images, effort, multiply-adds (in units of 1e9) and seconds that the search may take here at most."""
        settings, device = self._settings, resolve_device(self._settings.device)
        images = min(settings.images, len(self.source))
        with inference_state(loaded.dense, device, precision_dtype(settings.precision)):
            size = preprocessing_of(loaded.dense).input_shape
            batch = random_images(loaded.dense, (min(settings.batch_size, images), *size), device)
            timing = measure({"dense": loaded.dense}, batch, rounds=3, min_seconds=0.0)["dense"]
        forwards, macs = images * settings.effort, cost.total(predicted_macs(loaded.dense))
        return {"images": images, "effort": settings.effort, "gmacs": macs / 1e9 * forwards,
                "seconds": forwards / timing.images_per_second}  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """What `--json` tells of the search."""
        assert self.report is not None
        return {**self._told(self.report), "front": None if self.front is None else str(self.front)}

    def _told(self, report: SearchReport) -> dict[str, Any]:
        return {**report.to_dict(), "target": self._asked, "found": _told_of(report.found)}

    def facts(self) -> list[tuple[str, str]]:
        """What people are told of it."""
        assert self.report is not None
        report, found = self.report, self.report.found
        known = math.isfinite(report.drop_error)
        sure = f"{report.sure_drop:.2f} with one standard error on top" if known else "one image tells no error of that"
        error = f" ± {report.drop_error:.2f}" if known else ""
        rows = [
            ("asked for", f"{self._asked}, searched by {_counted(report.images, 'image')} of {self.source.name}"),
            ("found", _options(found)),
            ("to lose", f"{report.expected_drop:.2f} {report.metric_name}, as expected on other images; "
                        f"{sure}"),
            ("calibration", f"{report.drop:+.2f}{error} of them lost on these images"),
        ]  # fmt: skip
        return rows + ([] if report.clock is None else _clock_rows(report.clock))


def _clock_rows(clock: ClockReport) -> list[tuple[str, str]]:
    """What is told of a target of seconds: what was reached, and where."""
    on = clock.conditions
    where = f"batches of {on.batch_size} in {on.precision}, {on.form}, on {on.device}"
    if clock.measured is None:
        return [("measured", f"not at the end; by a table of {where}")]
    before, after = clock.measured.dense_ms, clock.measured.found_ms
    return [
        ("speed-up", f"{clock.measured.speedup:.2f} x as fast as dense: {before:.4g} -> {after:.4g} ms a batch"),
        ("measured", f"{where}, the two in turns"),
    ]  # fmt: skip


def _checked(front: Path, *, force: bool) -> Path:
    if front.suffix != ".json":
        raise UsageError(f"--front {front} does not end in .json, and a front is written as JSON; type --front "
                         f"{with_ending(front, '.json', 'front')}")  # fmt: skip
    return check_writable(front, force=force, argument="front")


def _options(point: ParetoPoint) -> str:
    """What to type for a schedule, such as `--keep 0.9/0.7 --layers 2,5`."""
    return typed(f"`{point.arguments}`")


def _told_of(point: ParetoPoint) -> dict[str, Any]:
    return {**point.to_dict(), "options": _options(point)}


def _acknowledge(observer: CommandObserver) -> None:
    """Says what a search that is told to stop has found so far."""
    found = "the best schedule so far is kept" if "gmacs" in observer.values else "nothing was found yet"
    render.note(f"stopping the search: {found}; Ctrl-C again stops at once")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def requested_search(
    options: TargetOptions, run: RunOptions, *, front: Path | None, force: bool, processes: int = 1,
    workers: int | None = None, batch_size: int | None = None, form: Mapping[str, Any] | None = None,
    reading: Mapping[str, Any] | None = None, dry: bool = False, form_option: bool = False,
) -> SearchRun:  # fmt: skip
    """A search that fits its processes; arguments as `SearchRun`'s.

    Raises:
        UsageError: There are several processes, which would each find their own.
    """
    if processes > 1:
        raise UsageError(f"a search runs in one process, and torchrun started {processes}; type tokencut profile MODEL "
                         "with the target first, then this with the --keep and --layers that it finds")  # fmt: skip
    return SearchRun(options, run, front=front, force=force, workers=workers, batch_size=batch_size, form=form,
                     reading=reading, dry=dry, form_option=form_option)  # fmt: skip
