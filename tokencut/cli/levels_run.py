"""What `compress` does to find a keep rate for each image, and what is said of it.

Imports torch: the command imports this when it runs, not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tokencut.cli import render
from tokencut.cli.observer import opened, watched
from tokencut.cli.options import RunOptions
from tokencut.cli.process import StopRequest
from tokencut.cli.search_options import LevelOptions, TargetOptions
from tokencut.errors import UsageError
from tokencut.models.loading import Loaded
from tokencut.search.levels import LevelsReport, find_levels
from tokencut.search.report import SearchSettings

DEFAULT_LEVELS = 4


class LevelsRun:
    """Levels as typed: called with a model, it finds them; then it tells what it found.

    Attributes:
        option: The option that asks for it.
        report: What was found; None before that.
        source: The calibration images.
    """

    option = "--mean-gmacs"

    def __init__(
        self, options: LevelOptions, target: TargetOptions, run: RunOptions, *, processes: int,
        workers: int | None, reading: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Checks what can be checked before the model is there.

        Args:
            options: As typed.
            target: Likewise: the calibration images.
            run: Where it runs.
            processes: How many run the command.
            workers: Processes that decode images.
            reading: How the images are read, as `open_source` takes it.

        Raises:
            TokencutError: The images are not there, or there are several processes, which would each find their own.
        """
        if processes > 1:
            raise UsageError(f"levels are found in one process, and torchrun started {processes}; run this without "
                             "torchrun")  # fmt: skip
        assert options.mean_gmacs is not None
        self.gmacs, self.most = options.mean_gmacs, options.levels or DEFAULT_LEVELS
        self.report: LevelsReport | None = None
        self.source = opened(target.calibration or "", split="train", **reading)
        self._settings = SearchSettings(
            images=SearchSettings().images if target.calibration_limit is None else target.calibration_limit,
            seed=run.seed,
            batch_size=run.batch_size,
            workers=workers,
            device=run.device,
            precision=run.precision,
        )

    def __call__(self, loaded: Loaded, arguments: dict[str, Any]) -> dict[str, Any]:
        """Finds the levels.

        Args:
            loaded: The model.
            arguments: Those of `tokencut.compress`, without a schedule.

        Returns:
            The arguments with the levels.
        """
        settings = {name: arguments[name] for name in ("layers", "method", "prop_attn", "method_options")}
        with watched(f"finding levels for {loaded.name}") as observer, StopRequest(lambda: None) as stop:
            observer.stop = stop
            self.report = find_levels(loaded.dense, self.source, self.gmacs, most=self.most, **settings,
                                      settings=self._settings, observer=observer)  # fmt: skip
        for text in self.report.notes:
            render.note(text)
        if len(self.report.levels.keeps) == 1 or self.report.divergence >= self.report.one_rate_divergence:
            render.note(f"one rate for all of these images does no more damage and costs no more; type --keep "
                        f"{self.report.one_rate:g} instead, whose file can be exported and fine-tuned too")  # fmt: skip
        return {**arguments, "levels": self.report.levels}

    def summary(self) -> dict[str, Any]:
        """What `--json` tells of it."""
        assert self.report is not None
        return asdict(self.report)

    def facts(self) -> list[tuple[str, str]]:
        """What people are told of it."""
        assert self.report is not None
        report, levels = self.report, self.report.levels
        each = ", ".join(
            f"keep {keep:g} for {share:.0%}" for keep, share in zip(levels.keeps, levels.shares, strict=True)
        )
        return [
            ("asked for", f"{self.option} {self.gmacs:g}, chosen by {report.images:,} images of {self.source.name}"),
            ("levels", f"{each} of them, from the plainest to the most varied"),
            ("damage", f"{report.divergence:.4g} on these, {report.one_rate_divergence:.4g} by --keep "
                       f"{report.one_rate:g} for all, which costs no more"),
        ]  # fmt: skip
