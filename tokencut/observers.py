"""Looking on while something takes long: who is told how it goes, and may stop it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

LOGGER = logging.getLogger("tokencut")
LOGGER.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class TrainingProgress:
    """How far a fine-tune is.

    Attributes:
        epoch: The epoch, from 1 on.
        epochs: How many there are.
        step: Steps done in the epoch.
        steps: Steps an epoch.
        losses: `loss` and its terms per image, on average over the epoch so far.
        images_per_second: Trained on, over all processes, on average over the epoch so far.
        seconds_left: Estimated, for the whole run without its evaluations.
        updates: Steps done in the whole run.
        latest: As `losses`, of the last step alone.
        lr: The learning rate it has come to.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    losses: dict[str, float]
    images_per_second: float
    seconds_left: float
    updates: int
    latest: dict[str, float]
    lr: float


class Observer:
    """Is told how a long task goes, and may stop it: subclass it, and override what you want to hear.

    Notes and warnings go to the logger `tokencut` unless they are overridden; nothing else is done. A method that
    raises ends the task as any error does.

    Example:
        >>> import tokencut
        >>> from tokencut.models.loading import load_model
        >>> class Dots(tokencut.Observer):
        ...     def progress(self, task, done, total, values):
        ...         print(f"{task}: {done} of {total}, top-1 above 90: {values['top1'] > 90}")
        >>> digits = load_model("digits").model
        >>> report = tokencut.evaluate(digits, "digits", device="cpu", workers=0, batch_size=300, observer=Dots())
        evaluating digits: 300 of 600, top-1 above 90: True
        evaluating digits: 600 of 600, top-1 above 90: True
    """

    def note(self, text: str) -> None:
        """What a user should know, as soon as it is known: an archive is being unpacked, rows are taken from before."""
        LOGGER.info(text)

    def warning(self, text: str) -> None:
        """A note that something is missing or was mended, and the task goes on."""
        LOGGER.warning(text)

    def progress(self, task: str, done: float, total: float, values: Mapping[str, float]) -> None:
        """Some of a task is done.

        Args:
            task: What is being done, such as `evaluating deit_tiny` or `timing the model's parts`; one follows another.
            done: How much of it: images, rounds, steps, or the effort of a search.
            total: How much there is to do, an int where it can be counted; a task may end earlier.
            values: How it stands, by name: `top1` in percent and `images_per_second` where images are judged,
                `rows_left` in a sweep, `gmacs`, `divergence` and `agreement` of a search's best schedule so far,
                `epoch` and `loss` of a fine-tune, `seconds_left` where that is known better than by the pace so far.
        """

    def step(self, now: TrainingProgress) -> None:
        """A step of a fine-tune is done."""

    def epoch(self, history: list[dict[str, float]]) -> None:
        """An epoch of a fine-tune is done; its row is the last of the history."""

    def saving(self) -> None:
        """The state of a fine-tune is about to be written: a run that is killed goes on from here."""

    def should_stop(self) -> bool:
        """Whether to stop, asked by what can keep what it has: a search, before each batch; a fine-tune, after each
        step.
        """
        return False
