"""What weights of eight bits cost in accuracy, and whether that is more than they may."""

from __future__ import annotations

from tokencut.errors import ArtifactError
from tokencut.evaluation.accuracy import EvaluationReport
from tokencut.evaluation.comparison import ComparisonReport, paired
from tokencut.evaluation.statistics import if_known

# Points of top-1 below the same model unquantised. What int8 and fp8 cost where all is well is a few tenths.
ALLOWED_DROP = 1.0


def quantized_beside(
    plain: EvaluationReport, quantized: EvaluationReport, *, kind: str, allowed: float, target: object
) -> ComparisonReport:
    """Compares a quantised model with what it was made from, on the same images.

    Args:
        plain: What an evaluation found of the model as it was.
        quantized: What it found of the quantised one.
        kind: What it was quantised to, for the message.
        allowed: How many points of top-1 that may cost.
        target: The file that was to be written.

    Returns:
        The comparison; the quantised model is the first.

    Raises:
        ArtifactError: It costs more.
    """
    found = paired(quantized, plain)
    lost = -found.difference.points
    if lost > allowed:
        error = if_known(found.difference.standard_error)
        raise ArtifactError(
            f"{kind} costs {lost:.2f} ± {'unknown' if error is None else f'{error:.2f}'} points of top-1 on "
            f"{found.images:,} images ({plain.top1:.2f} to {quantized.top1:.2f} %), and {allowed:g} are allowed, so "
            f"{target} was not written; type `allow_drop={lost + 0.05:.1f}` to have it all the same, or leave out "
            "`quantize`"
        )
    return found
