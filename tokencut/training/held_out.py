"""Training images that are held out: by them a fine-tune that does harm is known, and the best epoch is chosen.

Held-out images alone decide. A fine-tune may cost them what a model remembers of images that it is shown no longer, and
not what it knows of new ones; but of 62 fine-tunes of three models, none of those that lost on them gained on images
of validation, while images that were trained on hid half of those that did harm (docs/fine-tuning.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokencut.evaluation.statistics import Difference, paired_difference

# For each image that could be judged, by its number, whether the model is right.
Right = Mapping[int, bool]

# Share of the training images that choosing an epoch takes, and the share that knowing harm takes, within its limits:
# of fewer images hardly any harm would be clear, more would only cost time.
CHOICE = 0.1
GUARD, GUARD_LEAST, GUARD_MOST = 0.05, 400, 2_000
# Images are not held out to know harm where more than this share would be lost to training.
GUARD_LARGEST_SHARE = 0.1


def guard_size(images: int) -> int:
    """How many of the training images are held out to know harm by; 0 where they are too few for that."""
    count = min(GUARD_MOST, max(GUARD_LEAST, round(GUARD * images)))
    return count if count <= GUARD_LARGEST_SHARE * images else 0


def top1_of(right: Right) -> float:
    """Percent right."""
    return 100 * sum(right.values()) / len(right)


@dataclass(frozen=True)
class HeldOutComparison:
    """A model before and after its fine-tune, on training images that were held out.

    Attributes:
        images: How many of them.
        before: Top-1 before the first step, in percent.
        after: Top-1 of the weights that the fine-tune came to, in percent.
        difference: After less before, paired.
    """

    images: int
    before: float
    after: float
    difference: Difference

    @property
    def is_worse(self) -> bool:
        """Whether the fine-tune did harm, by more than two standard errors."""
        return self.difference.is_clear and self.difference.points < 0

    @property
    def kept(self) -> str:
        """Whose weights are the result: `before` or `after`."""
        return "before" if self.is_worse else "after"

    def warning(self, lr: float) -> str:
        """What is said of a fine-tune that did harm, with what to type.

        Args:
            lr: The learning rate that it had.
        """
        return (
            f"the fine-tune did harm: top-1 on {self.images:,} training images held out went from {self.before:.2f} to "
            f"{self.after:.2f} % ({self.difference}), so the weights from before are kept; type `lr={lr / 10:.2g}`"
        )


def compared(before: Right, after: Right) -> HeldOutComparison:
    """A model before and after, on the images that could be judged both times.

    Raises:
        ValueError: There are none.
    """
    both = [number for number in before if number in after]
    first, second = ({number: right[number] for number in both} for right in (before, after))
    difference = paired_difference(list(second.values()), list(first.values()))
    return HeldOutComparison(len(both), top1_of(first), top1_of(second), difference)
