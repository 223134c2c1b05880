"""The options by which a schedule is found instead of typed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tokencut.cli.options import DATA_HELP, ReductionOptions, bounded
from tokencut.errors import UsageError
from tokencut.messages import shorten

target_option = functools.partial(typer.Option, rich_help_panel="Targets, instead of --keep")

GMACS_HELP = "At most so many multiply-adds an image, in units of 1e9. The schedule that harms least is found."
SPEEDUP_HELP = (
    "So many times as fast as the dense model, measured here. In batches of -b images on this --device, by a table of "
    "the model's parts that is timed first."
)
LATENCY_HELP = "The same in milliseconds a batch of -b images."
FORM_HELP = (
    "For a target of seconds: how the model will run, eager, compiled (torch.compile) or captured (CUDA graphs)."
)
DROP_HELP = (
    "At most so many points of top-1 lost, as cheap as can be. Points of agreement with the dense model where "
    "calibration labels do not map to the head; of cosine similarity without a head."
)
CALIBRATION_HELP = f"Images to search by, never those of --data. {DATA_HELP}"
LIMIT_HELP = "Search by an evenly spread sample of N images."
EFFORT_HELP = (
    "What the search may take, in dense forwards of those images. Ctrl-C takes the best found so far, if "
    "anything meets the target by then."
)
MEAN_HELP = (
    "A keep rate for each image, by how varied it is: so many multiply-adds on average over images like those of "
    "--calibration, in units of 1e9. Worth it for images that differ much, such as scans beside photos."
)
LEVELS_HELP = "With --mean-gmacs: how many rates there may be; 4 where nothing is said."
FRONT_HELP = "Write all schedules that nothing tried beats, as JSON."


@dataclass(frozen=True)
class TargetOptions:
    """What a schedule is to reach, as typed."""

    target_gmacs: Annotated[float | None, target_option("--target-gmacs", **bounded("gmacs", "G"), help=GMACS_HELP)] = (
        None
    )
    target_speedup: Annotated[
        float | None, target_option("--target-speedup", **bounded("speedup", "S"), help=SPEEDUP_HELP)
    ] = None
    target_latency: Annotated[
        float | None, target_option("--target-latency", **bounded("latency_ms", "MS"), help=LATENCY_HELP)
    ] = None
    max_drop: Annotated[float | None, target_option("--max-drop", **bounded("max_drop", "P"), help=DROP_HELP)] = None
    calibration: Annotated[str | None, target_option("--calibration", metavar="DIR", help=CALIBRATION_HELP)] = None
    calibration_limit: Annotated[
        int | None, target_option("--calibration-limit", **bounded("images"), help=LIMIT_HELP)
    ] = None
    search_effort: Annotated[
        float | None, target_option("--search-effort", **bounded("effort", "F"), help=EFFORT_HELP)
    ] = None
    front: Annotated[Path | None, target_option("--front", metavar="FILE.json", help=FRONT_HELP)] = None

    def requested(self, reduction: ReductionOptions) -> bool:
        """Whether a schedule is to be found.

        Raises:
            UsageError: One is, and the options do not fit together; or none is, and an option is only for that.
        """
        targets = {"--target-gmacs": self.target_gmacs, "--target-speedup": self.target_speedup,
                   "--target-latency": self.target_latency, "--max-drop": self.max_drop}  # fmt: skip
        given = [name for name, value in targets.items() if value is not None]
        others = {"--calibration": self.calibration, "--calibration-limit": self.calibration_limit,
                  "--search-effort": self.search_effort, "--front": self.front}  # fmt: skip
        if not given:
            alone = [name for name, value in others.items() if value is not None]
            if alone:
                raise UsageError(f"{alone[0]} is for finding a schedule; add a target, such as --target-gmacs 2.6, "
                                 "--target-speedup 1.6, --target-latency 20 or --max-drop 0.5")  # fmt: skip
            return False
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other; type one of them")
        typed = [name for name in ("--keep", "--reduce-by") if name in reduction.given()]
        if typed:
            raise UsageError(f"{given[0]} finds the keep rates and {typed[0]} gives them; type one of them")
        if reduction.static_keep is not None:
            raise UsageError(f"{given[0]} finds a schedule for all tubelets, and --static-keep leaves some out; type "
                             "one of them")  # fmt: skip
        if self.calibration is None:
            raise UsageError(f"{given[0]} needs images to search by; add --calibration DIR, a folder with one "
                             "sub-folder a class or a .tar of one, or --calibration digits")  # fmt: skip
        return True


def _form(text: str) -> str:
    """Parser of an option: how a model runs."""
    if text not in FORMS:
        raise typer.BadParameter(f"{shorten(text)} is not one of {', '.join(FORMS)}")
    return text


# As `SearchSettings` has them.
FORMS: dict[str, dict[str, Any]] = {"eager": {}, "compiled": {"compile_mode": "default"}, "captured": {"capture": True}}


@dataclass(frozen=True)
class CompressTargetOptions(TargetOptions):
    """The same where the options do not say otherwise in which form the model will run."""

    target_form: Annotated[str | None, target_option("--target-form", metavar="FORM", parser=_form, help=FORM_HELP)] = (
        None
    )

    def requested(self, reduction: ReductionOptions) -> bool:
        found = super().requested(reduction)
        if self.target_form is not None and self.target_speedup is None and self.target_latency is None:
            raise UsageError("--target-form says how a target of seconds is timed; add --target-speedup 1.6 or "
                             "--target-latency 20, or leave it out")  # fmt: skip
        return found

    def form(self) -> dict[str, Any]:
        """The form, as `SearchSettings` takes it."""
        return FORMS[self.target_form or "eager"]


@dataclass(frozen=True)
class LevelOptions:
    """A keep rate for each image, as typed."""

    mean_gmacs: Annotated[float | None, target_option("--mean-gmacs", **bounded("gmacs", "G"), help=MEAN_HELP)] = None
    levels: Annotated[int | None, target_option("--levels", **bounded("levels"), help=LEVELS_HELP)] = None

    def requested(self, reduction: ReductionOptions, target: CompressTargetOptions) -> bool:
        """Whether levels are to be found.

        Raises:
            UsageError: They are, and the options do not fit together; or they are not, and one is only for that.
        """
        if self.mean_gmacs is None:
            if self.levels is not None:
                raise UsageError("--levels is for a keep rate for each image; add --mean-gmacs G --calibration DIR")
            return False
        others = {"--target-gmacs": target.target_gmacs, "--target-speedup": target.target_speedup,
                  "--target-latency": target.target_latency, "--target-form": target.target_form,
                  "--max-drop": target.max_drop, "--search-effort": target.search_effort, "--front": target.front,
                  "--static-keep": reduction.static_keep}  # fmt: skip
        given = [name for name, value in others.items() if value is not None]
        given += [name for name in ("--keep", "--reduce-by") if name in reduction.given()]
        if given:
            raise UsageError(f"--mean-gmacs finds keep rates for levels of images, and {given[0]} is for one schedule; "
                             "leave one out")  # fmt: skip
        if target.calibration is None:
            raise UsageError("--mean-gmacs needs images to choose by, like those to come; add --calibration DIR, a "
                             "folder with one sub-folder a class, or --calibration digits")  # fmt: skip
        return True
